#!/bin/sh
# The files of an image that runs aotron and nothing else: the program, the libraries it is linked with and their loader.
#
#     deploy/container/rootfs.sh dist/aotron build/rootfs
set -eu
program=$1 root=$2
if [ -e "$root" ]; then
    echo "error: $root exists already; remove it or name another folder" >&2
    exit 1
fi
mkdir -p "$root/usr/local/bin" "$root/tmp"
chmod 1777 "$root/tmp"
install -m 755 "$program" "$root/usr/local/bin/aotron"
libraries=$(ldd "$program" | grep -o '/[^ ]*')
folder=$(dirname "$(printf '%s\n' "$libraries" | grep '/libc\.so')")
# NVIDIA's driver, where it is mounted into the container, names the parts of the C library by their old names.
for library in $libraries "$folder/libdl.so.2" "$folder/libpthread.so.0" "$folder/librt.so.1"; do
    mkdir -p "$root$(dirname "$library")"
    cp -L "$library" "$root$library"
done
