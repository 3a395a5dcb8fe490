"""Checks aiperf, NVIDIA's benchmark of servers, against a server of tiny-chat."""

import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version

from checks import CHECKPOINT, Checks, base_url, get

URL = base_url()
REQUESTS, CONCURRENCY, PROMPT_TOKENS, ANSWER_TOKENS = 20, 4, 64, 32
checks = Checks(f"aiperf {version('aiperf')}")
# With these, it takes a tokenizer's folder for a name on a hub.
environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}


def prompt_tokens():
    _, metrics = get(f"{URL}/metrics")
    lines = [line for line in metrics.splitlines() if line.startswith("aotron_prompt_tokens_total")]
    return sum(float(line.split()[-1]) for line in lines)


def profile(kind, *options):
    before = prompt_tokens()
    with tempfile.TemporaryDirectory() as folder:
        command = [
            os.path.join(os.path.dirname(sys.executable), "aiperf"), "profile", "-m", "Nemotron-3-8B-Chat-4K-RLHF", "--url", URL,
            "--endpoint-type", kind, "--tokenizer", CHECKPOINT, "--request-count", REQUESTS, "--concurrency", CONCURRENCY,
            "--synthetic-input-tokens-mean", PROMPT_TOKENS, "--synthetic-input-tokens-stddev", 0,
            "--output-tokens-mean", ANSWER_TOKENS, "--output-tokens-stddev", 0, "--extra-inputs", "ignore_eos:true",
            "--workers-max", 1, "--ui", "none", "--random-seed", 1, "--artifact-dir", folder, *options,
        ]
        run = subprocess.run([str(word) for word in command], env=environment, capture_output=True, text=True, timeout=300)
        if not checks.equal(f"{kind}: it ends well", run.returncode, 0):
            print(run.stdout[-2000:], run.stderr[-2000:])
            return
        with open(os.path.join(folder, "profile_export_aiperf.json"), encoding="utf-8") as file:
            found = json.load(file)
        with open(os.path.join(folder, "server_metrics_export.json"), encoding="utf-8") as file:
            metrics = json.load(file)["metrics"]
    average = {name: value.get("avg") for name, value in found.items() if isinstance(value, dict)}
    checks.equal(f"{kind}: requests, errors", (average["request_count"], found["error_summary"]), (REQUESTS, []))
    checks.equal(f"{kind}: answer tokens by usage", average["usage_completion_tokens"], ANSWER_TOKENS)
    checks.equal(f"{kind}: prompt tokens by usage and by the server's metrics", average["total_usage_prompt_tokens"], prompt_tokens() - before)
    # Encoded anew, an answer's text may have a few tokens less than were generated.
    checks.that(f"{kind}: answer tokens by the tokenizer", abs(average["output_sequence_length"] - ANSWER_TOKENS) <= 2, average)
    if "--streaming" in options:
        names = ["time_to_first_token", "inter_token_latency", "output_token_throughput_per_user"]
        checks.that(f"{kind}: times of the first and of later tokens", all(average.get(name, 0) > 0 for name in names), average)
    wanted = ["vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"]
    checks.that(f"{kind}: it reads the server's metrics", all(name in metrics for name in wanted), list(metrics))


checks.runs("chat", lambda: profile("chat", "--streaming"))
checks.runs("completions", lambda: profile("completions", "--use-server-token-count"))
checks.end()
