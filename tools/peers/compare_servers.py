#!/usr/bin/env python3
"""Tokens per second of two servers on the same weights, round by round: A B A B.

    python tools/peers/compare_servers.py --a http://127.0.0.1:8000 --b http://127.0.0.1:8080 --streams 8,64 --rounds 3

Each server is asked over `/v1/completions`, streamed, greedily, with prompts of random token ids, which no prefix cache can
shorten, and an answer of a fixed length. N streams ask one request after another for --seconds; a token counts if it arrives
in that time, so that a round has no tail. While one server is asked, the other is idle; both use the machine as they were
started, so give both the same number of threads and enough slots for all streams. A piece of text can hold several tokens, or
a token end no character: pieces count as many tokens as those of the round's finished answers had on average,
or one if none was finished.

Printed, and written with --json: tokens per second of each round, the ratio of the medians, times to the first token and
between tokens in milliseconds, and the share of all cores that this client used. Exits with 1 if a request fails. Needs
Python 3.9 or later and no package.
"""

import argparse
import asyncio
import json
import os
import pathlib
import random
import statistics
import sys
import time
import urllib.parse

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from load import Client, Failure, Target, percentile  # noqa: E402


async def ask(client, prompt, tokens, events):
    """One streamed request; appends (seconds to the first token or gap, is first, time) for each piece."""
    body = {
        "model": client.target.model,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started = last = time.perf_counter()
    status, headers = await client.send("POST", "/v1/completions", body)
    if status != 200:
        raise Failure(f"{status} {(await client.whole(headers))[:300]!r}")
    pending, count = b"", None
    async for piece in client.pieces(headers):
        *lines, pending = (pending + piece).split(b"\n\n")
        for line in lines:
            if not line.startswith(b"data: ") or line == b"data: [DONE]":
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise Failure(str(chunk["error"]))
            if chunk.get("usage"):
                count = chunk["usage"]["completion_tokens"]
            if chunk.get("choices"):
                now = time.perf_counter()
                events.append((now - last, last == started, now))
                last = now
    if count != tokens:
        raise Failure(f"asked for {tokens} tokens, got {count}")
    return count


async def round_of(target, streams, arguments, rng):
    """One round: every stream asks until the time is over."""
    vocabulary = arguments.vocabulary
    totals, failures, finished = [], [], []
    until = time.perf_counter() + arguments.seconds

    async def one(seed):
        own, client = random.Random(seed), Client(target)
        while time.perf_counter() < until and not failures:
            prompt = [own.randrange(arguments.first_id, vocabulary) for _ in range(arguments.prompt_tokens)]
            # The last answer is cut off with its round.
            events = []
            totals.append((len(prompt), events))
            left = until - time.perf_counter()
            try:
                count = await asyncio.wait_for(ask(client, prompt, arguments.decode_tokens, events), max(left, 0.01))
                finished.append((count, len(events)))
            except asyncio.TimeoutError:
                break
            except (Failure, OSError, EOFError, ValueError) as error:
                failures.append(str(error))
        client.close()

    before = time.process_time()
    await asyncio.gather(*(one(rng.random()) for _ in range(streams)))
    used = time.process_time() - before
    events = [event for _, own in totals for event in own if event[2] <= until]
    started = [prompt for prompt, own in totals if own]
    tokens_per_piece = 1.0
    if finished:
        tokens_per_piece = sum(count for count, _ in finished) / max(1, sum(pieces for _, pieces in finished))
    await asyncio.sleep(arguments.pause)  # until the server has noticed that all have left
    return {
        "tokens_per_second": len(events) * tokens_per_piece / arguments.seconds,
        "tokens_per_piece": tokens_per_piece,
        "prompt_tokens_per_second": sum(started) / arguments.seconds,
        "first_ms": [percentile([e[0] for e in events if e[1]], share) for share in (0.5, 0.99)],
        "gap_ms": [percentile([e[0] for e in events if not e[1]], share) for share in (0.5, 0.99)],
        "client_cpu_percent": 100 * used / arguments.seconds / (os.cpu_count() or 1),
        "failures": failures,
    }


def target_of(url, model):
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise SystemExit(f"error: {url}: the URL is http://HOST:PORT")
    return Target(parts.hostname, parts.port or 80, os.environ.get("AOTRON_API_KEY", ""), model)


async def until_ready(target, patience=300.0):
    """Waits while a server loads its weights."""
    end = time.perf_counter() + patience
    while True:
        try:
            await target.get("/health")
            return
        except (Failure, OSError, EOFError):
            if time.perf_counter() > end:
                raise
            await asyncio.sleep(1)


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--a", required=True, help="the first server, http://HOST:PORT")
    parser.add_argument("--b", required=True, help="the second server")
    parser.add_argument("--streams", default="8,64", help="numbers of concurrent streams")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each server, alternating")
    parser.add_argument("--seconds", type=float, default=60.0, help="seconds of a round")
    parser.add_argument("--pause", type=float, default=3.0, help="seconds between rounds")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--decode-tokens", type=int, default=64)
    parser.add_argument("--first-id", type=int, default=300, help="smallest id in a prompt: those below may be special")
    parser.add_argument("--vocabulary", type=int, default=2500, help="prompts hold ids below this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="file for the results")
    arguments = parser.parse_args()

    targets = {}
    for name, url in (("A", arguments.a), ("B", arguments.b)):
        target = target_of(url, "")
        await until_ready(target)
        target.model = json.loads(await target.get("/v1/models"))["data"][0]["id"]
        targets[name] = target
    print("| streams | server | tokens/s, median of rounds | each round | first p50, p99 | gap p50, p99 | client CPU % |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    results, failed = [], False
    for streams in map(int, arguments.streams.split(",")):
        rows = {"A": [], "B": []}
        for number in range(arguments.rounds):
            for name, target in targets.items():
                rng = random.Random(f"{arguments.seed} {streams} {number} {name}")
                rows[name].append(await round_of(target, streams, arguments, rng))
        medians = {}
        for name, rounds in rows.items():
            speeds = [r["tokens_per_second"] for r in rounds]
            medians[name] = statistics.median(speeds)
            of = lambda key: ", ".join(f"{statistics.median(r[key][i] for r in rounds):.0f}" for i in (0, 1))  # noqa: E731
            cpu = statistics.median(r["client_cpu_percent"] for r in rounds)
            each = " ".join(f"{speed:.0f}" for speed in speeds)
            print(f"| {streams} | {name} | {medians[name]:.1f} | {each} | {of('first_ms')} | {of('gap_ms')} | {cpu:.0f} |")
            for words in sorted({words for r in rounds for words in r["failures"]}):
                print(f"failed: {name}: {words}", file=sys.stderr)
                failed = True
        ratio = medians["A"] / medians["B"] if medians["B"] else float("nan")
        print(f"| {streams} | A / B | {ratio:.2f} | | | | |", flush=True)
        results.append({"streams": streams, "ratio": ratio, "rounds": rows})
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"arguments": vars(arguments), "results": results}, file, indent=1)
    return int(failed)


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
