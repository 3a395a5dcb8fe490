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
. "$here/server.sh"
environment schemathesis

# Not checked: that every request of the right form is served (a conversation may be too long, or a regular expression
# wrong) and that every other one is refused (fields without effect may have any value).
checks=not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance
checks+=,response_schema_conformance,unsupported_method,allow_header_conformance,ignored_auth
test_server() {
    (cd "$kept" && "$kept/schemathesis/bin/schemathesis" run "$url/openapi.json" --url "$url" --checks "$checks" \
        --max-examples "${EXAMPLES:-30}" --seed 1 --request-timeout 60 --suppress-health-check all "$@")
}

start
test_server "$@"
stop
start --api-key "key-of-the-test"
test_server --header "Authorization: Bearer key-of-the-test" "$@"
stop
