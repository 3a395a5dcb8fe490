#!/usr/bin/env python3
"""Time to the first token of many conversations that take turns on few slots, with and without the prefix cache.

    python tools/prefix_cache.py target/release/aotron engines/tiny-chat --sizes 0,default,64MiB

For each size of the cache a server is started, with --slots. The conversations take turns, one request at a time: in each
round every one of them sends its whole prompt so far, the same in every run, and gets a few tokens. All begin with the same
tokens; the rest is their own. Answers must be the same whatever the cache holds. Printed for each size: times to the first
token after the first round in milliseconds, the share of prompt tokens that were found and where, and the server's memory.
Needs Python 3.9 or later and no package.
"""

import argparse
import http.client
import json
import random
import re
import subprocess
import sys
import time


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program")
    parser.add_argument("engine")
    parser.add_argument("--sizes", default="0,default")
    parser.add_argument("--conversations", type=int, default=32)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shared", type=int, default=32, help="tokens that all prompts begin with")
    parser.add_argument("--first", type=int, default=200, help="tokens of a conversation's own in the first round")
    parser.add_argument("--more", type=int, default=24, help="tokens that each round adds to the prompt")
    parser.add_argument("--answer", type=int, default=8, help="tokens of an answer")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    print("| cache | first token, ms: median, 90th, 99th percentile | prompt tokens found | in the slot, another, blocks | MiB |")
    print("| --- | --- | --- | --- | --- |")
    expected = None
    for size in options.sizes.split(","):
        answers, times, found, sources, memory = measure(options, size)
        expected = expected or answers
        if answers != expected:
            sys.exit(f"the answers with a cache of {size} differ from those with {options.sizes.split(',')[0]}")
        times.sort()
        median, ninety, most = (times[int(share * (len(times) - 1))] * 1e3 for share in (0.5, 0.9, 0.99))
        of_sources = ", ".join(f"{100 * share:.0f} %" for share in sources)
        print(f"| {size} | {median:.1f}, {ninety:.1f}, {most:.1f} | {100 * found:.0f} % | {of_sources} | {memory:.0f} |", flush=True)


def measure(options, size):
    command = [options.program, "serve", options.engine, "--port", "0", "--slots", str(options.slots), "--log-format", "off"]
    command += ["--threads", str(options.threads)] + ([] if size == "default" else ["--prefix-cache", size])
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            port = next(int(found[1]) for line in server.stderr if (found := re.search(r"listening on http://.*:(\d+)", line)))
            while get(port, "/ready")[0] != 200:
                time.sleep(0.1)
            return run(options, port)
        finally:
            server.terminate()
            server.stderr.read()


def run(options, port):
    draw = random.Random(1)
    ids = lambda count: [draw.randrange(300, 2000) for _ in range(count)]
    shared = ids(options.shared)
    conversations = [shared + ids(options.first) for _ in range(options.conversations)]
    connection = http.client.HTTPConnection("127.0.0.1", port)
    answers, times, prompt_tokens, before = [], [], 0, None
    for round_ in range(options.rounds):
        if round_ == 1:
            before = reused(port)
        for conversation in conversations:
            seconds, answer = ask(connection, conversation, options.answer)
            answers.append(answer)
            if round_ > 0:
                times.append(seconds)
                prompt_tokens += len(conversation)
            conversation += answer + ids(options.more)
    tokens = [after - earlier for after, earlier in zip(reused(port), before)]
    memory = value(get(port, "/metrics")[1], "process_resident_memory_bytes") / 2**20
    return answers, times, sum(tokens) / prompt_tokens, [count / prompt_tokens for count in tokens], memory


def ask(connection, prompt, tokens):
    """Seconds to the first token, and the answer's ids."""
    body = {"prompt": prompt, "max_tokens": tokens, "stream": True, "ignore_eos": True, "return_token_ids": True}
    start = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    reply = connection.getresponse()
    first, answer = None, []
    for line in reply:
        if not line.startswith(b"data: {"):
            continue
        first = first or time.perf_counter() - start
        for choice in json.loads(line[6:])["choices"]:
            answer += choice.get("token_ids") or []
    if reply.status != 200 or len(answer) != tokens:
        sys.exit(f"status {reply.status}, {len(answer)} tokens instead of {tokens}")
    return first, answer


def reused(port):
    metrics = get(port, "/metrics")[1]
    name = "aotron_prefix_cache_reused_tokens_total"
    return [value(metrics, f'{name}{{[^}}]*source="{source}"}}') for source in ("slot", "other_slot", "blocks")]


def value(metrics, pattern):
    return float(re.search(rf"^{pattern} (\S+)$", metrics, re.M)[1])


def get(port, path):
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", path)
    reply = connection.getresponse()
    return reply.status, reply.read().decode()


if __name__ == "__main__":
    main()
