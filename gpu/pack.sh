#!/bin/bash
# Packs what gpu/run.sh needs into OUT: parts under 60 MB for a GPU host without network, of which README.md is the first page.
#
#   gpu/pack.sh OUT                             # on a machine with network
#   on the host:  cat OUT/aotron-gpu.part-* | tar xJ -C DIR && DIR/run.sh RESULTS --quick
#
# What cannot be had here is said in CONTENTS.txt, and the questions that need it are answered "failed". Environment:
#   PY=3.12            the host's Python
#   PROGRAM=file       a program, instead of building one for glibc 2.28 with cargo-zigbuild
#   TENSORRT=folder    TensorRT 11's libraries (libnvinfer.so.11 and its builder resources), from NVIDIA's index by default
#   LIBRARIES=folder   both libraries; nothing is downloaded, and no Python packages are packed
set -eu
out=${1:?usage: gpu/pack.sh OUT}
python=${PY:-3.12}
glibc=2.28 # of the oldest systems that TensorRT's own wheels are for
version=1.7.1.116
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$out"
out=$(cd "$out" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
dir=$work/aotron-gpu
mkdir -p "$dir/engines" "$dir/site" "$dir/tensorrt" "$work/wheels"
cd "$root"

note() { echo "$*" | tee -a "$dir/CONTENTS.txt"; }
wheels() { # package…: with their dependencies, for the host's Python
    python3 -m pip download --quiet --timeout 30 --retries 1 --only-binary=:all: --implementation cp --python-version "$python" \
        --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --platform manylinux_2_17_x86_64 --platform any \
        --extra-index-url "${NVIDIA_INDEX:-https://pypi.nvidia.com}" -d "$work/wheels" "$@"
}

# The program.
if [ -n "${PROGRAM:-}" ]; then
    program=$PROGRAM
elif cargo zigbuild --version >/dev/null 2>&1; then
    cargo zigbuild --release --locked --bin aotron --target x86_64-unknown-linux-gnu.$glibc
    program=target/x86_64-unknown-linux-gnu/release/aotron
else
    note "cargo-zigbuild is not installed (pip install ziglang cargo-zigbuild): the program is for systems as new as this one"
    cargo build --release --locked --bin aotron
    program=target/release/aotron
fi
strip -o "$dir/aotron" "$program"
needs=$(objdump -T "$dir/aotron" | grep -o 'GLIBC_[0-9.]*' | sort -Vu | tail -n 1)
note "aotron: $("$dir/aotron" --version), needs ${needs/_/ } or newer"

# The libraries.
if [ -n "${LIBRARIES:-}" ]; then
    cp -L "$LIBRARIES"/lib*tensorrt* "$LIBRARIES"/libnvinfer* "$dir/tensorrt/"
else
    for cuda in 13 12; do
        folder=$dir/tensorrt
        [ $cuda = 13 ] || folder=$dir/tensorrt-cu12
        python3 tools/fetch_tensorrt.py --cuda $cuda --parser "$folder" >/dev/null
        note "TensorRT for RTX $version for CUDA $cuda: ${folder#"$dir"/}"
    done
    if [ -n "${TENSORRT:-}" ]; then
        cp -L "$TENSORRT"/libnvinfer.so.11 "$TENSORRT"/libnv*.so* "$dir/tensorrt/"
        note "TensorRT 11: tensorrt, from $TENSORRT"
    elif wheels --no-deps "tensorrt-cu13-libs==11.4.*" 2>"$work/refused"; then
        # Of the builder's resources, those of the two cards.
        for wheel in "$work"/wheels/tensorrt_cu13_libs-*.whl; do
            python3 -m zipfile -e "$wheel" "$work/tensorrt-11"
            rm "$wheel"
        done
        find "$work/tensorrt-11" \( -name 'libnvinfer.so.11*' -o -name 'libnvinfer_builder_resource_sm[89]0.*' \
            -o -name 'libnvinfer_builder_resource_ptx.*' -o -name 'libnvonnxparser.so.11*' \) -exec cp {} "$dir/tensorrt/" \;
        note "TensorRT 11: tensorrt, from NVIDIA's index"
    else
        note "TensorRT 11 could not be fetched ($(tail -n 1 "$work/refused")): the host needs it for H100 plans (pip install tensorrt-cu13), or pack with TENSORRT=folder"
    fi
fi

# Python packages, unpacked: the host needs no pip. torch is too large; peer.py alone needs it, and hosts have their own.
if [ -z "${LIBRARIES:-}" ]; then
    for packages in "numpy" "transformers safetensors" "--no-deps tensorrt-rtx-cu13-bindings==$version" \
        "--no-deps tensorrt-cu13-bindings==11.4.*"; do
        # shellcheck disable=SC2086
        if wheels $packages 2>"$work/refused"; then
            note "Python $python: ${packages#--no-deps }"
        else
            note "Python $python: not ${packages#--no-deps } ($(tail -n 1 "$work/refused"))"
        fi
    done
    for wheel in "$work"/wheels/*.whl; do python3 -m zipfile -e "$wheel" "$dir/site"; done
fi

# The scripts, and packages of tiny-chat: to run as they are on an A100, to finish on an H100.
cp gpu/*.py gpu/run.sh gpu/README.md "$dir/"
export AOTRON_TENSORRT_DIR=$dir/tensorrt
for precision in bf16 int8 int4; do
    "$dir/aotron" build tests/data/tiny-chat --recipe "cpu:$precision,a100:$precision" -o "$dir/engines/a100-$precision" >/dev/null
done
for precision in bf16 fp8 int8 int4; do
    "$dir/aotron" build tests/data/tiny-chat --recipe "cpu:$precision,h100:$precision" --prepare \
        -o "$dir/engines/h100-$precision" >/dev/null
done
note "engines: $(cd "$dir/engines" && echo *)"

cp "$dir/README.md" "$dir/CONTENTS.txt" "$out/"
tar c -C "$dir" . | xz -"${LEVEL:-6}" -T2 | split -b 55m - "$out/aotron-gpu.part-"
ls -l "$out"
