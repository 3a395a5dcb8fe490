#!/bin/sh
# Checks the files of this folder, as far as their programs are here, and against a server that has answered a request:
#
#     deploy/check.sh http://127.0.0.1:8000
#
# promtool is in Debian's package prometheus, systemd-analyze in systemd. What is not here is said to be skipped.
set -eu
url=${1:?usage: deploy/check.sh URL}
cd "$(dirname "$0")"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
curl -sf "$url/metrics?names=aotron" >"$work/metrics"

if command -v promtool >/dev/null; then
    promtool check metrics <"$work/metrics"
    promtool check config prometheus/prometheus.yml
else
    echo "skipped: promtool is not here"
fi

# Every metric that the dashboard and the alerts ask for is one that the server has.
python3 - "$work/metrics" <<'PYTHON'
import json, re, sys

have = {"up"}
for line in open(sys.argv[1]):
    if line.startswith("# TYPE "):
        _, _, name, kind = line.split()
        have |= {name + end for end in ("_bucket", "_sum", "_count")} if kind == "histogram" else {name}
dashboard = json.load(open("grafana/aotron.json"))
queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
queries += [v["definition"] for v in dashboard["templating"]["list"] if "definition" in v]
queries += [line.split("expr:", 1)[1] for line in open("prometheus/aotron.rules.yml") if "expr:" in line]
asked = {name for query in queries for name in re.findall(r"\b(?:aotron|process|vllm)[_:][a-z_]+\b(?=[{\s)\[,]|$)", query)}
missing = sorted(asked - have)
if missing or not asked:
    sys.exit(f"error: the server has no {', '.join(missing)}")
print(f"{len(queries)} queries of {len(asked)} metrics: the server has them all")
PYTHON

if command -v systemd-analyze >/dev/null; then
    # The program need not be where the unit expects it.
    sed 's|^ExecStart=/usr/local/bin/aotron|ExecStart=/bin/true|' 'systemd/aotron@.service' >"$work/aotron@.service"
    mkdir "$work/aotron@.service.d"
    systemd-analyze verify "$work/aotron@.service"
    systemd-analyze security --offline=true --threshold=20 --no-pager "$work/aotron@.service" | tail -1
    cp systemd/gpu.conf "$work/aotron@.service.d/gpu.conf"
    systemd-analyze verify "$work/aotron@.service"
else
    echo "skipped: systemd-analyze is not here"
fi
