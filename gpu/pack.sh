#!/bin/bash
# Packs what is needed to answer the questions in docs/gpu.md into parts under 60 MB, for a GPU host without network.
#
#   make tensorrt && cargo build --release && gpu/pack.sh OUT        # PY=3.11 if the host's Python is not 3.12
#   on the host:  cat OUT/aotron-gpu.part-* | xz -d | tar x -C DIR && DIR/run.sh RESULTS
set -eu
out=${1:?usage: gpu/pack.sh OUT}
version=1.7.1.116
python=${PY:-3.12}
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$out"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
dir=$work/aotron-gpu
mkdir -p "$dir/engines" "$dir/site" "$dir/wheels"

strip -o "$dir/aotron" "$root/target/release/aotron"
mkdir "$dir/.tensorrt"
cp -L "$root"/.tensorrt/libtensorrt_rtx.so.1 "$dir/.tensorrt/"
cp "$root"/gpu/*.py "$root"/gpu/run.sh "$root/tools/make_checkpoint.py" "$dir/"
cp -r "$root/tools/checkpoints" "$dir/"
cp -r "$root/tests/data/tiny-chat" "$dir/checkpoint"

# Packages to run as they are, and one to finish on a Hopper card.
cd "$root"
for precision in bf16 int8 int4; do
    "$dir/aotron" build tests/data/tiny-chat --recipe "cpu:$precision,a100:$precision" -o "$dir/engines/a100-$precision"
done
for precision in bf16 fp8 int8 int4; do
    "$dir/aotron" build tests/data/tiny-chat --recipe "cpu:$precision,h100:$precision" --prepare -o "$dir/engines/h100-$precision"
done

# The Python bindings, for the questions about TensorRT itself. They use the library above.
python3 -m pip download -q --no-deps --only-binary=:all: --python-version "$python" --implementation cp \
    --platform manylinux_2_28_x86_64 -d "$dir/wheels" "tensorrt-rtx-cu13-bindings==$version"
for wheel in "$dir"/wheels/*.whl; do python3 -m zipfile -e "$wheel" "$dir/site"; done
rm -rf "$dir/wheels"

tar c -C "$dir" . | xz -6 -T2 | split -b 55m - "$out/aotron-gpu.part-"
ls -l "$out"
