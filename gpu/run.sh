#!/bin/sh
# Runs on the GPU host, in the folder that pack.sh packed: run.sh RESULTS [--quick | --shape mid|8b] [--only NAME]. README.md says
# what it does in which order.
case $0 in */*) here=${0%/*} ;; *) here=. ;; esac
exec "${PYTHON:-python3}" -u "$here/run.py" "$@"
