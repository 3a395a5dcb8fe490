#!/usr/bin/env bash
# Tests a server with tiny-chat against its own OpenAPI document: schemathesis makes requests from the schemas, right and
# wrong ones, and no reply may be a failure of the server or differ from what the document says of it. It is run twice,
# without API keys and with one.
#
# tools/clients/schemathesis.sh [FLAGS of `schemathesis run`]
#
# AOTRON: the program (default target/release/aotron). CLIENTS_DIR: where the virtual environment and the engine are kept
# (default target/clients). EXAMPLES: requests per route and phase (default 30).
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
program=${AOTRON:-$root/target/release/aotron}
kept=${CLIENTS_DIR:-$root/target/clients}
[ -x "$program" ] || { echo "$program is not there: run cargo build --release first" >&2; exit 2; }
mkdir -p "$kept"
engine=$kept/tiny-chat
[ -e "$engine/engine.json" ] || "$program" build "$root/tests/data/tiny-chat" --recipe cpu -o "$engine"
environment=$kept/schemathesis
if ! cmp -s "$here/requirements-schemathesis.txt" "$environment/installed.txt"; then
    python3 -m venv --clear "$environment"
    "$environment/bin/pip" install --quiet --disable-pip-version-check -r "$here/requirements-schemathesis.txt"
    cp "$here/requirements-schemathesis.txt" "$environment/installed.txt"
fi

server=
stop() {
    if [ -n "$server" ]; then
        kill "$server" 2>/dev/null || true
        wait "$server" 2>/dev/null || true
        server=
    fi
}
trap stop EXIT

# Starts a server on a free port; sets `url`.
start() {
    local log=$kept/schemathesis.log
    "$program" serve "$engine" --port 0 --log-format off "$@" >"$log" 2>&1 &
    server=$!
    url=
    for _ in $(seq 600); do
        url=$(sed -n 's/.*listening on \(http[^ ]*\).*/\1/p' "$log" | head -n 1)
        if [ -n "$url" ] && grep -q 'is ready' "$log"; then
            return
        fi
        kill -0 "$server" 2>/dev/null || break
        sleep 0.1
    done
    cat "$log" >&2
    exit 1
}

# Not checked: that every request of the right form is served (a conversation may be too long, or a regular expression
# wrong) and that every other one is refused (fields without effect may have any value).
checks=not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance
checks+=,response_schema_conformance,unsupported_method,allow_header_conformance,ignored_auth
test_server() {
    (cd "$kept" && "$environment/bin/schemathesis" run "$url/openapi.json" --url "$url" --checks "$checks" \
        --max-examples "${EXAMPLES:-30}" --seed 1 --request-timeout 60 --suppress-health-check all "$@")
}

start
test_server "$@"
stop
start --api-key "key-of-the-test"
test_server --header "Authorization: Bearer key-of-the-test" "$@"
stop
