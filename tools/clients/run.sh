#!/usr/bin/env bash
# Runs existing clients against `aotron serve` with tiny-chat: tools/clients/run.sh NAME…, or `all`.
#
# Exits with 1 if a check fails, with 3 if a client cannot be installed.
#
# AOTRON: the program (default target/release/aotron). CLIENTS_DIR: where virtual environments and the engine are kept
# (default target/clients). Python's client libraries and node's are installed there, as the requirements files pin them.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
every=(pytriton-0.2.5 pytriton-0.3.1 pytriton-0.5.14 pytriton-0.7.0 pytriton-slow pytriton-late tritonclient openai openai-3 openai-node anthropic langchain litellm lm-eval
       guardrails aiperf)
if [ $# -eq 0 ]; then
    echo "usage: $0 all | NAME…, of: ${every[*]}" >&2
    exit 2
fi
[ "$*" = all ] && set -- "${every[@]}"
. "$here/server.sh"

failed=()
for name in "$@"; do
    options=()
    case $name in
        pytriton-slow) script=check_pytriton_slow.py requirements=pytriton-0.2.5 options=(--slots 1 --threads 1) ;;
        pytriton-late) script=check_pytriton_slow.py requirements=pytriton-0.2.5 options=(--slots 1 --threads 1 --request-timeout 15) ;;
        tritonclient) script=check_tritonclient.py requirements=pytriton-0.7.0 ;;
        pytriton-*) script=check_pytriton.py requirements=$name ;;
        openai-3) script=check_openai.py requirements=$name options=(--api-key secret) ;;
        openai | anthropic | langchain | litellm) script=check_$name.py requirements=$name options=(--api-key secret) ;;
        openai-node) script=check_openai.mjs requirements= options=(--api-key secret) ;;
        lm-eval) script=check_lm_eval.py requirements=$name ;;
        guardrails | aiperf) script=check_$name.py requirements=$name ;;
        *) echo "no client is named $name; there are: ${every[*]}" >&2; exit 2 ;;
    esac
    if [ -n "$requirements" ]; then
        environment "$requirements"
        command=("$python" "$here/$script")
    else
        modules=$kept/$name
        mkdir -p "$modules"
        # Node finds modules beside the script.
        cp "$here/$script" "$modules/"
        mapfile -t packages <"$here/requirements-$name.txt"
        (cd "$modules" && npm install --silent --no-audit --no-fund --no-package-lock --no-save "${packages[@]}")
        command=(node "$modules/$script")
    fi
    start --served-model-name Nemotron-3-8B-Chat-4K-RLHF "${options[@]}"
    echo "== $name"
    LATE=$([ "$name" = pytriton-late ] && echo 1 || echo 0) "${command[@]}" "$url" || failed+=("$name")
    stop
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
