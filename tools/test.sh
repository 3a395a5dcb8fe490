#!/usr/bin/env bash
# Runs the tests in the release profile; the last line lists the skipped ones.
#
#   tools/test.sh [cargo test's arguments]      what `make test` runs
#   tools/test.sh cpus                          all of them on each instruction set this machine has
#
# With AOTRON_REQUIRE=tensorrt,avx512, a test that is skipped because one of these is missing fails (tests/skips.rs).
set -euo pipefail
cd "$(dirname "$0")/.."

AOTRON_SKIPS=$(mktemp)
trap 'rm -f "$AOTRON_SKIPS"' EXIT
export AOTRON_SKIPS
# Fill the arena with NaN before each step, so that a kernel that reads uninitialized values is noticed.
export AOTRON_CPU_POISON=1

status=0
if [ "${1:-}" = cpus ]; then
    shift
    for set in $(python3 tools/compare_commits.py --list-sets); do
        echo "AOTRON_CPU=$set"
        AOTRON_CPU=$set cargo test --release --locked --no-fail-fast --quiet "$@" || { status=$?; echo "AOTRON_CPU=$set: failed"; }
    done
else
    cargo test --release --locked --no-fail-fast "$@" || status=$?
fi

sort -u "$AOTRON_SKIPS" | awk -F'\t' '
    !seen[$1, $2]++ { count[$1]++; all++; why[$1] = $3 }
    END {
        if (!all) { print "No test was skipped."; exit }
        printf "%d test%s skipped:", all, all == 1 ? "" : "s"
        for (kind in count) { printf "%s %d without %s (%s)", separator, count[kind], kind, why[kind]; separator = ";" }
        print ""
    }'
exit $status
