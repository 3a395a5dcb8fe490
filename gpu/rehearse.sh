#!/bin/bash
# Runs everything in this folder once, without a GPU: packs with the fakes of tests/tensorrt_runtime as libraries, unpacks into a
# root that holds Python and nothing else, with the fake driver, and runs run.sh there, in a chroot. It proves that the scripts
# run from end to end and write what they should; of a GPU it says nothing: the fakes' logits are not the model's, so that
# comparisons with the CPU must fail, and do.
#
#   gpu/rehearse.sh FOLDER [run.sh's arguments, by default --quick --shape tiny]      needs root, a compiler and target/release/aotron
set -eu
work=${1:?usage: gpu/rehearse.sh FOLDER [ARGUMENTS]}
shift
[ $# -gt 0 ] || set -- --quick --shape tiny
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
mkdir -p "$work"
work=$(cd "$work" && pwd)
rm -rf "${work:?}/root" "$work/packed"
mkdir -p "$work/fakes" "$work/root/pack" "$work/packed"

# 1. The fakes.
headers=$(cargo metadata --format-version 1 --locked | python3 -c '
import json, pathlib, sys
packages = json.load(sys.stdin)["packages"]
print(next(pathlib.Path(p["manifest_path"]).parent for p in packages if p["name"] == "trtx-sys") / "TensorRT-Headers")')
compile() { # source, headers, RTX or not, library
    c++ -std=c++17 -O1 -shared -fPIC -w -Icpp/cuda "-DAOTRON_HEADER=\"$headers/$2/NvInfer.h\"" -DFAKE_RTX="$3" \
        "tests/tensorrt_runtime/fakes/$1" -ldl -static-libstdc++ -static-libgcc -o "$work/fakes/$4"
}
compile cuda.cpp TRT-RTX-1.7 1 libcuda.so.1
compile tensorrt_rtx.cpp TRT-RTX-1.7 1 libtensorrt_rtx.so.1
compile tensorrt_rtx.cpp TRT-Enterprise-11.4 0 libnvinfer.so.11

# 2. What a host gets.
PROGRAM=${PROGRAM:-target/release/aotron} LIBRARIES=$work/fakes LEVEL=0 gpu/pack.sh "$work/packed"
cat "$work"/packed/aotron-gpu.part-* | tar xJ -C "$work/root/pack"

# 3. The host: a shell, Python with its libraries, the fake driver, and in site/ what a real pack brings (numpy) or a host has
# (torch).
python=$(readlink -f "$(command -v python3)")
python3 - "$work/root" "$python" <<'PYTHON'
import importlib.util, os, shutil, subprocess, sys, sysconfig
from pathlib import Path

root, python = Path(sys.argv[1]), sys.argv[2]

def put(path):
    """A file and the shared libraries it needs, at the same places."""
    target = root / str(path).lstrip("/")
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    found = subprocess.run(["ldd", path], capture_output=True, text=True).stdout.split()
    for library in (word for word in found if word.startswith("/")):
        if not (root / library.lstrip("/")).exists():
            put(library)

put(python)
put(os.path.realpath("/bin/sh"))
(root / "bin").mkdir(exist_ok=True)
shutil.copy(os.path.realpath("/bin/sh"), root / "bin/sh")
library = Path(sysconfig.get_path("stdlib"))
unused = shutil.ignore_patterns("site-packages", "dist-packages", "test", "tests", "__pycache__", "idlelib", "tkinter", "config-*")
shutil.copytree(library, root / str(library).lstrip("/"), ignore=unused, dirs_exist_ok=True)
for extension in (library / "lib-dynload").glob("*.so"):
    put(extension)
for word in subprocess.run(["ldd", root / "pack/aotron"], capture_output=True, text=True).stdout.split():
    if word.startswith("/"):
        put(word)
numpy = importlib.util.find_spec("numpy")
if numpy is None:
    sys.exit("numpy is not installed: run with a Python that has it first in PATH")
packages = Path(numpy.origin).parent.parent
for folder in packages.glob("numpy*"):
    shutil.copytree(folder, root / "pack/site" / folder.name, ignore=shutil.ignore_patterns("__pycache__", "tests"), dirs_exist_ok=True)
for library in (root / "pack/site").rglob("*.so*"):
    for word in subprocess.run(["ldd", library], capture_output=True, text=True).stdout.split():
        if word.startswith("/") and not word.startswith(str(root)):
            put(word)
PYTHON
cp gpu/stand_ins/*.py "$work/root/pack/site/"
cp "$work/fakes/libcuda.so.1" "$work/root/lib/x86_64-linux-gnu/"
mkdir -p "$work/root/proc" "$work/root/dev" "$work/root/tmp"
[ -e "$work/root/dev/null" ] || mknod -m 666 "$work/root/dev/null" c 1 3

# 4. The runs, timed, on each card. A model of two layers stands for the ones that are timed on a card, copies are small.
as_expected=0
for gpu in a100 h100; do
    mkdir -p "$work/root/results-$gpu"
    started=$(date +%s)
    status=0
    env -i PATH=/bin:/usr/bin:/usr/sbin PYTHON="$python" HOME=/tmp AOTRON_COPY_BYTES=1048576 AOTRON_PROMPT=16 AOTRON_DECODED=4 \
        AOTRON_TOKENS=64 AOTRON_REHEARSAL=1 $([ $gpu = a100 ] || echo FAKE_GPU=$gpu) \
        unshare --mount --pid --fork --mount-proc="$work/root/proc" chroot "$work/root" \
        /bin/sh -c "exec /bin/sh /pack/run.sh /results-$gpu $*" || status=$?
    echo "$gpu: run.sh $*: $(($(date +%s) - started)) s, exit code $status; results in $work/root/results-$gpu"
    python3 - "$work/root/results-$gpu" <<'PYTHON' || as_expected=1
import json, sys
from pathlib import Path

answers = {path.stem: json.loads(path.read_text()) for path in Path(sys.argv[1]).glob("*.json")}
# Plans of the fakes do not compute the model, and --finish verifies what it compiled.
must_fail = {name for name in answers if name.startswith(("logits-", "verify-", "finish-"))}
failed = {name for name, answer in answers.items() if answer["status"] not in ("ok", "skipped")}
if not must_fail or failed != must_fail:
    sys.exit(f"unexpected: {sorted(failed ^ must_fail)}")
print(f"{len(answers)} questions: as expected")
PYTHON
done
exit $as_expected
