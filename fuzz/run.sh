#!/usr/bin/env bash
# Builds and runs the fuzz targets with stable Rust, without cargo-fuzz (docs/fuzzing.md).
#
#   fuzz/run.sh build            compiles all targets
#   fuzz/run.sh seed TARGET      fills fuzz/corpus/TARGET with files from the tests
#   fuzz/run.sh run TARGET SECONDS [libFuzzer's flags]
set -euo pipefail
cd "$(dirname "$0")/.."

build() {
    # The flags that cargo-fuzz passes to rustc. With --target they do not apply to build scripts and procedural macros.
    local flags=(
        -Cpasses=sancov-module
        -Cllvm-args=-sanitizer-coverage-level=4
        -Cllvm-args=-sanitizer-coverage-inline-8bit-counters
        -Cllvm-args=-sanitizer-coverage-pc-table
        -Cllvm-args=-sanitizer-coverage-trace-compares
        --cfg fuzzing
    )
    RUSTFLAGS="${flags[*]}" cargo build --manifest-path fuzz/Cargo.toml --release --locked --bins --target "$(host)"
}

host() {
    rustc -vV | sed -n 's/^host: //p'
}

seed() {
    local corpus=fuzz/corpus/$1
    mkdir -p "$corpus" "fuzz/artifacts/$1"
    case $1 in
        json) for file in tests/data/shapes/*/*config.json tests/data/*/*/*.index.json; do copy "$file" "$corpus"; done ;;
        pickle) for file in tests/data/torch/*.pt; do pickle "$file" "$corpus"; done ;;
        zip) for file in tests/data/torch/*.pt; do copy "$file" "$corpus"; done ;;
        metadata) for file in tests/data/torch_dist/*.metadata tests/data/torch_dist/*/.metadata; do copy "$file" "$corpus"; done ;;
        nemo) for name in ckpt-gnu torch-dist-pp2 zarr-tp2; do copy "tests/data/nemo/$name.nemo" "$corpus"; done ;;
        torch_dist) for name in one-rank two-ranks; do pack "tests/data/torch_dist/$name" "$corpus/$name.tar"; done ;;
        yaml) copy src/checkpoint/nemo/config/8b.yaml "$corpus" ;;
        safetensors) copy tests/data/shapes/gqa/golden.safetensors "$corpus" ;;
    esac
    for folder in "fuzz/seeds/$1" "tests/data/fuzz/$1"; do
        if [ -d "$folder" ]; then cp "$folder"/* "$corpus"; fi
    done
}

# Copies a file to the corpus, named after its origin.
copy() {
    cp "$1" "$2/$(tr / - <<<"${1#tests/data/}")"
}

# Packs a folder into a tar archive, if a tool for that is installed.
pack() {
    tar --format=ustar -C "$1" -cf "$2" . 2>/dev/null || true
}

# Extracts the pickle from a file written by torch.save, if it is a zip archive and a tool for that is installed.
pickle() {
    python3 - "$1" "$2/$(basename "$1" .pt).pkl" 2>/dev/null <<'PYTHON' || true
import sys, zipfile
archive = zipfile.ZipFile(sys.argv[1])
name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
open(sys.argv[2], "wb").write(archive.read(name))
PYTHON
}

run() {
    local target=$1 seconds=$2
    shift 2
    seed "$target"
    local log=fuzz/artifacts/$target/log flags=(
        -max_total_time="$seconds" -print_final_stats=1 -timeout=10 -rss_limit_mb=512
        -artifact_prefix="fuzz/artifacts/$target/" "$@"
    )
    if [ -f "fuzz/dictionaries/$target.dict" ]; then flags+=(-dict="fuzz/dictionaries/$target.dict"); fi
    if ! "fuzz/target/$(host)/release/$target" "${flags[@]}" "fuzz/corpus/$target" >"$log" 2>&1; then
        echo "$target: failed; the end of $log:" >&2
        tail -n 40 "$log" >&2
        return 1
    fi
    local last executions
    last=$(grep -o 'cov: [0-9]* ft: [0-9]* corp: [^ ]*' "$log" | tail -n 1)
    executions=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
    echo "$target: $executions runs, $last"
}

case $1 in
    build | seed | run) "$@" ;;
    *) sed -n '2,6s/^# \?//p' "$0" >&2 && exit 2 ;;
esac
