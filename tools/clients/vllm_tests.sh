#!/usr/bin/env bash
# Runs vLLM's own tests of its server against `aotron serve` with tiny-chat: tools/clients/vllm_tests.sh [SOURCE]
#
# Those that ask for what both servers have; vllm_tests.txt beside it lists them, and the others in their files with the
# reason. SOURCE is vLLM's source, which otherwise comes from PyPI; only its folder tests is used. Neither vLLM nor torch is
# installed: vllm_server.py stands in for them. Exits with 1 if a test fails that is not expected to, or passes though it is
# expected to fail.
#
# AOTRON: the program (default target/release/aotron). CLIENTS_DIR: where the source, the virtual environment and the engine
# are kept (default target/clients).
set -euo pipefail

version=0.32.0
sha256=d2c957d5eee3d0985012151315ddc62cbe0cd368fc96a5fc3510438d9dddf2ad
here=$(cd "$(dirname "$0")" && pwd)
if [ $# -gt 1 ]; then
    echo "usage: $0 [SOURCE]" >&2
    exit 2
fi
. "$here/server.sh"
environment vllm-tests

source=${1:-$kept/vllm-$version}
if [ $# -eq 0 ] && [ ! -e "$source/.complete" ]; then
    # pip would build what it downloads, to learn what it needs.
    "${python%/*}/unearth" --no-binary --download "$kept" "vllm==$version" >/dev/null
    echo "$sha256  $kept/vllm-$version.tar.gz" | sha256sum --check --quiet
    tar xzf "$kept/vllm-$version.tar.gz" -C "$kept" --wildcards "vllm-$version/tests/*"
    touch "$source/.complete"
fi

# The tests ask for contexts of 8,192 tokens, with which the model can be built, since nothing in it depends on their number.
checkpoint=$kept/tiny-chat-8192-checkpoint
mkdir -p "$checkpoint"
cp "$root"/tests/data/tiny-chat/*.{json,safetensors,model} "$checkpoint/"
sed -i 's/"max_position_embeddings": 512/"max_position_embeddings": 8192/' "$checkpoint/config.json"
ENGINE=$kept/tiny-chat-8192
build "$checkpoint" "$ENGINE" --slots 8

names=()
for name in HuggingFaceH4/zephyr-7b-beta facebook/opt-125m Qwen/Qwen2.5-1.5B-Instruct Qwen/Qwen2-1.5B-Instruct Qwen/Qwen3-0.6B \
    Qwen/Qwen3-8B HuggingFaceTB/SmolLM2-135M-Instruct claude-3-7-sonnet-latest; do
    names+=(--served-model-name "$name")
done
start "${names[@]}"
mapfile -t files < <(sed -nE 's/^(run|fails) \| (tests[^ :]*\.py).*/\2/p' "$here/vllm_tests.txt" | sort -u)
# vLLM's conftest.py starts engines, so only the two with the fixtures of these tests are loaded.
cd "$source"
SERVER_URL=$url TOKENIZER=$root/tests/data/tiny-chat/tokenizer.json PYTHONPATH=$here:. TEST_LIST=$here/vllm_tests.txt \
    "$python" -m pytest -c /dev/null -o asyncio_default_fixture_loop_scope=function --rootdir . --noconftest \
    -p no:cacheprovider -p peer_tests -p vllm_server -p tests.entrypoints.conftest \
    -p tests.entrypoints.openai.responses.conftest -q --tb=short -rxX "${files[@]}"
