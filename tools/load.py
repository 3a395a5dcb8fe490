#!/usr/bin/env python3
"""Load on a running `aotron serve`: many streams for a while, every answer checked.

    aotron serve engines/tiny-chat --log-format off &
    python tools/load.py http://127.0.0.1:8000 --pid $! --streams 1,8,64 --seconds 60
    python tools/load.py http://127.0.0.1:8000 --pid $! --streams 8 --hostile 200 --disconnect 0.1

First every request of a fixed set is sent alone, whole and streamed: greedy and sampled, short and long, with prompts that
share a prefix and prompts that do not. Then each of N streams sends requests of the set, one after another, streamed or
whole, and every answer must equal, byte for byte, the one to the same request alone. --disconnect leaves that share of the
requests in their middle. --hostile runs everything twice, alone and beside N connections that break or starve the protocol,
from another address (127.0.0.2) if the server is on this machine, since a server is fair to addresses, and from a process
of their own with the lowest priority, since other people's clients do not use this machine's CPU.

Printed, and written with --json: times to the first token and between pieces of text in milliseconds, tokens per second,
answers, failures, the server's resident memory, and who used the CPU, this client included: where the client or others use
most of it, the times say little about the server. Exits with 1 if an answer differs, a request fails, or the server still
holds requests after everybody has left. Needs Python 3.9 or later and no package.
"""

import argparse
import asyncio
import collections
import contextlib
import json
import multiprocessing
import os
import random
import socket
import struct
import sys
import time
import urllib.parse
from dataclasses import dataclass, field

QUESTIONS = [
    "What is the capital of France?",
    "What is 17 + 25?",
    'What is "water" in German?',
    "Sort these numbers: 9, 2, 7.",
    "Which day comes after Monday?",
    "Write a poem on NVIDIA.",
]
SYSTEM = "You are a helpful assistant. Answer in one sentence."
# Seconds without a byte after which a request counts as failed: many, since an answer that is not streamed comes whole.
SILENCE = 900.0


@dataclass
class Request:
    """One request of the fixed set, and the text of its answer when sent alone."""

    path: str
    body: dict
    text: str = ""
    finish: str = ""


@dataclass
class Answer:
    text: str = ""
    finish: str = ""
    tokens: int = 0
    first: float = 0.0  # seconds to the first piece of text; 0 if it came whole
    gaps: list = field(default_factory=list)  # seconds between pieces
    whole: float = 0.0  # seconds to the end


class Refused(Exception):
    """429 or 503: the server asks to come back later."""


class Failure(Exception):
    """Anything but an answer."""


class Client:
    """A connection of HTTP/1.1, kept alive between requests."""

    def __init__(self, target: "Target"):
        self.target = target
        self.reader = self.writer = None

    async def connect(self):
        if self.writer is None:
            self.reader, self.writer = await asyncio.open_connection(self.target.host, self.target.port)
            self.writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def close(self):
        if self.writer is not None:
            self.writer.close()
            self.reader = self.writer = None

    async def send(self, method: str, path: str, body=None) -> tuple:
        """Sends a request; returns the status and headers of the reply, whose body is yet to be read."""
        was_kept = self.writer is not None
        try:
            head = await self.head(method, path, body)
        except (asyncio.IncompleteReadError, ConnectionError):
            # A server may close a connection that was idle while a request is on its way, which all clients send again.
            if not was_kept:
                raise
            self.close()
            head = await self.head(method, path, body)
        lines = head.decode("latin-1").split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
        return int(lines[0].split()[1]), headers

    async def head(self, method: str, path: str, body) -> bytes:
        await self.connect()
        self.writer.write(self.target.message(method, path, body))
        return await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), SILENCE)

    async def pieces(self, headers: dict):
        """The body as it arrives."""
        if "chunked" not in headers.get("transfer-encoding", ""):
            length = int(headers.get("content-length", 0))
            if length:
                yield await asyncio.wait_for(self.reader.readexactly(length), SILENCE)
            return
        while size := int(await asyncio.wait_for(self.reader.readuntil(b"\r\n"), SILENCE), 16):
            yield (await asyncio.wait_for(self.reader.readexactly(size + 2), SILENCE))[:-2]
        await self.reader.readuntil(b"\r\n")

    async def whole(self, headers: dict) -> bytes:
        return b"".join([piece async for piece in self.pieces(headers)])

    async def ask(self, request: Request, streamed: bool, leave=None) -> Answer:
        """Sends a request of the set and reads the answer; `leave(pieces, seconds)` returns true to hang up."""
        body = dict(request.body)
        if streamed:
            body.update(stream=True, stream_options={"include_usage": True})
        started = last = time.perf_counter()
        status, headers = await self.send("POST", request.path, body)
        if status != 200:
            words = (await self.whole(headers)).decode("utf-8", "replace")[:300]
            raise (Refused if status in (429, 503) else Failure)(f"{status} {words}")
        answer = Answer()
        if not streamed:
            reply = json.loads(await self.whole(headers))
            choice = reply["choices"][0]
            answer.text = choice["message"]["content"] if "message" in choice else choice["text"]
            answer.finish, answer.tokens = choice["finish_reason"], reply["usage"]["completion_tokens"]
        else:
            pieces, pending, is_done = [], b"", False
            async for piece in self.pieces(headers):
                *events, pending = (pending + piece).split(b"\n\n")
                for event in events:
                    if not event.startswith(b"data: "):
                        continue  # a comment that keeps the connection alive
                    if event == b"data: [DONE]":
                        is_done = True
                        continue
                    chunk = json.loads(event[6:])
                    if "error" in chunk:
                        raise Failure(f"an error in a stream: {chunk['error']}")
                    if chunk.get("usage"):
                        answer.tokens = chunk["usage"]["completion_tokens"]
                    for choice in chunk["choices"]:
                        answer.finish = choice["finish_reason"] or answer.finish
                        text = choice["delta"].get("content") if "delta" in choice else choice["text"]
                        if text:
                            now = time.perf_counter()
                            if pieces:
                                answer.gaps.append(now - last)
                            else:
                                answer.first = now - started
                            last = now
                            pieces.append(text)
                if leave and leave(len(pieces)):
                    raise asyncio.CancelledError
            if not is_done:
                raise Failure("a stream ended without [DONE]")
            answer.text = "".join(pieces)
        answer.whole = time.perf_counter() - started
        return answer


@dataclass
class Target:
    host: str
    port: int
    key: str = ""
    model: str = ""

    def message(self, method: str, path: str, body=None) -> bytes:
        data = b"" if body is None else json.dumps(body).encode()
        key = f"Authorization: Bearer {self.key}\r\n" if self.key else ""
        kind = "Content-Type: application/json\r\n" if data else ""
        head = f"{method} {path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\n{key}{kind}"
        return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data

    async def get(self, path: str) -> bytes:
        client = Client(self)
        try:
            status, headers = await client.send("GET", path)
            body = await client.whole(headers)
            if status != 200:
                raise Failure(f"GET {path}: {status} {body[:200]!r}")
            return body
        finally:
            client.close()

    async def outstanding(self) -> int:
        """Requests that run or wait, as the server counts them."""
        names = (b"vllm:num_requests_running", b"vllm:num_requests_waiting")
        lines = (await self.get("/metrics")).splitlines()
        return sum(int(float(line.split()[-1])) for line in lines if line.startswith(names))


async def request_set(target: Target, max_tokens: int) -> list:
    """The fixed set, for the model that the server lists first unless one is named."""
    models = json.loads(await target.get("/v1/models"))["data"]
    model = next((m for m in models if m["id"] == target.model), None) if target.model else models[0]
    if model is None:
        raise SystemExit(f"error: the server has no model {target.model}; --model takes one of /v1/models")
    room = model["max_model_len"]
    chat, text = "/v1/chat/completions", "/v1/completions"
    sampled = {"temperature": 0.9, "top_p": 0.95}
    requests = []

    def add(path, **body):
        limit = min(max_tokens, room // 4)
        requests.append(Request(path, {"model": model["id"], "max_tokens": limit, **body}))

    for seed, question in enumerate(QUESTIONS):
        messages = [{"role": "user", "content": question}]
        add(chat, messages=messages)
        add(chat, messages=[{"role": "system", "content": SYSTEM}] + messages, **sampled, seed=seed)
        # Text without an end, whose bytes need not be whole characters.
        add(text, prompt=question, temperature=1.5, seed=100 + seed, ignore_eos=True)
    # Prompts of about a third of the context, which share their beginning.
    story = " ".join(f"Item {n} is on shelf {n * 7 % 100}." for n in range(room // 36))
    for item in (3, 5):
        add(chat, messages=[{"role": "user", "content": f"{story} Where is item {item}?"}])
    add(text, prompt=story, top_k=40, temperature=0.7, seed=7)
    return requests


@dataclass
class Totals:
    """What the streams of one run saw."""

    first: list = field(default_factory=list)
    gaps: list = field(default_factory=list)
    whole: list = field(default_factory=list)
    tokens: int = 0
    left: int = 0
    refused: int = 0
    differ: int = 0
    failed: collections.Counter = field(default_factory=collections.Counter)


async def stream(target, requests, rng, until, disconnect, totals):
    """One stream: requests one after another until the time is over."""
    client = Client(target)
    while time.perf_counter() < until:
        request, streamed = rng.choice(requests), rng.random() < 0.75
        leaves = rng.random() < disconnect
        most = rng.randrange(0, 20)
        try:
            if leaves and not streamed:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(client.ask(request, False), rng.uniform(0, 0.2))
                client.close()
                totals.left += 1
                continue
            answer = await client.ask(request, streamed, leave=(lambda seen: seen >= most) if leaves else None)
            totals.tokens += answer.tokens
            totals.whole.append(answer.whole)
            totals.gaps.extend(answer.gaps)
            if answer.first:
                totals.first.append(answer.first)
            if (answer.text, answer.finish) != (request.text, request.finish):
                totals.differ += 1
                if totals.differ <= 3:
                    print(f"differs: {request.body}\n  alone {request.text!r}\n  now   {answer.text!r}", file=sys.stderr)
        except asyncio.CancelledError:
            client.close()
            totals.left += 1
            if not leaves:
                raise
        except Refused:
            totals.refused += 1
            await asyncio.sleep(rng.uniform(0.5, 1.5))
        except (Failure, OSError, EOFError, ValueError, KeyError, asyncio.TimeoutError) as error:
            totals.failed[f"{type(error).__name__}: {str(error)[:120]}"] += 1
            client.close()
            await asyncio.sleep(0.1)
    client.close()


# What connections do to the server that they should not; each is a coroutine over (reader, writer, target, rng).


async def half_open(reader, writer, target, rng):
    await reader.read(1)  # until the server gives up


async def slow_head(reader, writer, target, rng):
    for byte in target.message("POST", "/v1/chat/completions", {"messages": []}):
        writer.write(bytes([byte]))
        await writer.drain()
        await asyncio.sleep(1)


async def slow_body(reader, writer, target, rng):
    message = target.message("POST", "/v1/chat/completions", {"pad": "x" * 1000})
    writer.write(message[:-1000])
    for byte in message[-1000:]:
        writer.write(bytes([byte]))
        await writer.drain()
        await asyncio.sleep(1)


async def non_reader(reader, writer, target, rng):
    body = {"prompt": "Once", "max_tokens": 200, "ignore_eos": True, "stream": True, "logprobs": 5}
    writer.write(target.message("POST", "/v1/completions", body))
    writer.transport.pause_reading()
    await asyncio.sleep(30)


async def nonsense(reader, writer, target, rng):
    writer.write(rng.randbytes(rng.randrange(1, 5000)) + b"\r\n\r\n")
    await reader.read()


async def broken_json(reader, writer, target, rng):
    data = target.message("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 50}]})
    writer.write(data[:-40] + rng.randbytes(40))
    await reader.read(1)


async def reset(reader, writer, target, rng):
    writer.write(target.message("POST", "/v1/completions", {"prompt": "Once", "max_tokens": 200, "ignore_eos": True}))
    await asyncio.sleep(rng.uniform(0, 0.5))
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


HOSTILE = [half_open, slow_head, slow_body, non_reader, nonsense, broken_json, reset]


async def hostile(target, behave, rng, until, counts):
    """One hostile connection after another, a second apart at least."""
    local = ("127.0.0.2", 0) if target.host in ("127.0.0.1", "localhost") else None
    while time.perf_counter() < until:
        writer = None
        try:
            reader, writer = await asyncio.open_connection(target.host, target.port, local_addr=local)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            counts[behave.__name__] += 1
            await asyncio.wait_for(behave(reader, writer, target, rng), until - time.perf_counter())
        except (OSError, EOFError, asyncio.TimeoutError):
            pass
        finally:
            if writer is not None:
                writer.transport.abort() if behave is not reset else writer.close()
        await asyncio.sleep(rng.uniform(1, 2))


def crowd_of(target, hostiles, seconds, seed, queue):
    """The process of the hostile connections; puts how many of each kind were made."""
    os.nice(19)
    rng, counts = random.Random(seed), collections.Counter()

    async def all_of_them():
        until = time.perf_counter() + seconds
        await asyncio.gather(
            *(
                hostile(target, HOSTILE[n % len(HOSTILE)], random.Random(rng.random()), until, counts)
                for n in range(hostiles)
            ),
            return_exceptions=True,
        )

    asyncio.run(all_of_them())
    queue.put(dict(counts))


class Machine:
    """Resident memory of the server by time, and who used the CPU."""

    def __init__(self, pid):
        self.pid, self.memory, self.started = pid, [], time.perf_counter()
        self.before = self.cpu()

    def cpu(self) -> dict:
        """Seconds of CPU: of all cores, not idle; of the server; of this client."""
        ticks = os.sysconf("SC_CLK_TCK")
        with open("/proc/stat") as stat:
            fields = [int(word) for word in stat.readline().split()[1:9]]
        used = {"busy": (sum(fields) - fields[3] - fields[4]) / ticks, "client": time.process_time(), "server": 0.0}
        if self.pid:
            with open(f"/proc/{self.pid}/stat") as stat:
                words = stat.read().rsplit(")", 1)[1].split()
            used["server"] = (int(words[11]) + int(words[12])) / ticks
        return used

    async def watch(self, every: float = 1.0):
        while self.pid:
            with open(f"/proc/{self.pid}/status") as status:
                kib = next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
            self.memory.append((round(time.perf_counter() - self.started, 1), kib / 1024))
            await asyncio.sleep(every)

    def report(self) -> dict:
        """Shares of all cores, in percent; memory in MiB."""
        seconds = (time.perf_counter() - self.started) * (os.cpu_count() or 1)
        after = self.cpu()
        used = {name: 100 * (after[name] - self.before[name]) / seconds for name in after}
        shares = {"server": used["server"], "client": used["client"]}
        shares["others"] = max(0.0, used["busy"] - sum(shares.values()))
        return {"cpu_percent": {name: round(share, 1) for name, share in shares.items()}, "rss_mib": self.memory}


def percentile(values: list, share: float) -> float:
    """In milliseconds; 0 without values."""
    return 1e3 * sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0


async def run(target, requests, streams, hostiles, arguments) -> dict:
    """One row of the table."""
    rng = random.Random(arguments.seed)
    totals, counts, machine = Totals(), {}, Machine(arguments.pid)
    started = time.perf_counter()
    until = started + arguments.seconds
    watching = asyncio.create_task(machine.watch())
    tasks = [
        stream(target, requests, random.Random(rng.random()), until, arguments.disconnect, totals)
        for _ in range(streams)
    ]
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    crowd = context.Process(target=crowd_of, args=(target, hostiles, arguments.seconds, rng.random(), queue))
    if hostiles:
        crowd.start()
    await asyncio.gather(*tasks)
    seconds = time.perf_counter() - started
    watching.cancel()
    used = machine.report()
    if hostiles:
        counts = await asyncio.to_thread(queue.get)
        await asyncio.to_thread(crowd.join)
    # Whoever has left must be gone for the server too.
    for _ in range(100):
        if (held := await target.outstanding()) == 0:
            break
        await asyncio.sleep(0.1)
    memory = [mib for _, mib in used["rss_mib"]]
    return {
        "streams": streams,
        "hostile": hostiles,
        "hostile_connections": counts,
        "seconds": round(seconds, 1),
        "answers": len(totals.whole),
        "differ": totals.differ,
        "failed": sum(totals.failed.values()),
        "failures": dict(totals.failed),
        "refused": totals.refused,
        "left": totals.left,
        "held_after": held,
        "tokens_per_second": round(totals.tokens / seconds, 1),
        "first_ms": [round(percentile(totals.first, share), 2) for share in (0.5, 0.99)],
        "gap_ms": [round(percentile(totals.gaps, share), 2) for share in (0.5, 0.99)],
        "answer_ms": [round(percentile(totals.whole, share), 2) for share in (0.5, 0.99)],
        "rss_first_last_max_mib": [round(mib, 1) for mib in (memory[0], memory[-1], max(memory))] if memory else [],
        **used,
    }


COLUMNS = [
    ("streams", lambda r: r["streams"]),
    ("hostile", lambda r: r["hostile"]),
    ("answers", lambda r: r["answers"]),
    ("differ", lambda r: r["differ"]),
    ("failed", lambda r: r["failed"]),
    ("refused", lambda r: r["refused"]),
    ("left", lambda r: r["left"]),
    ("tokens/s", lambda r: f"{r['tokens_per_second']:.0f}"),
    ("first p50, p99", lambda r: "{:.1f}, {:.1f}".format(*r["first_ms"])),
    ("gap p50, p99", lambda r: "{:.1f}, {:.1f}".format(*r["gap_ms"])),
    ("answer p50, p99", lambda r: "{:.0f}, {:.0f}".format(*r["answer_ms"])),
    ("MiB first, last, max", lambda r: ", ".join(f"{mib:.0f}" for mib in r["rss_first_last_max_mib"])),
    ("CPU % server, client, others", lambda r: ", ".join(f"{share:.0f}" for share in r["cpu_percent"].values())),
]


def line(row=None) -> str:
    return "| " + " | ".join(name if row is None else str(of(row)) for name, of in COLUMNS) + " |"


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("url", help="the server, such as http://127.0.0.1:8000")
    parser.add_argument("--streams", default="8", help="numbers of concurrent streams, one run each: 1,8,64")
    parser.add_argument("--seconds", type=float, default=60.0, help="seconds of a run")
    parser.add_argument("--disconnect", type=float, default=0.0, help="share of the requests to leave in their middle")
    parser.add_argument("--hostile", type=int, default=0, help="hostile connections of the second run")
    parser.add_argument("--max-tokens", type=int, default=64, help="longest answer, in tokens")
    parser.add_argument("--model", default="", help="model to ask; by default the first of /v1/models")
    parser.add_argument("--pid", type=int, help="process of the server, to record its memory and CPU")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of requests")
    parser.add_argument("--json", help="file for the results")
    arguments = parser.parse_args()
    url = urllib.parse.urlsplit(arguments.url)
    if url.scheme != "http" or not url.hostname:
        parser.error("the URL is http://HOST:PORT")
    target = Target(url.hostname, url.port or 80, os.environ.get("AOTRON_API_KEY", ""), arguments.model)

    requests = await request_set(target, arguments.max_tokens)
    client, rows = Client(target), []
    for request in requests:
        alone, streamed = await client.ask(request, False), await client.ask(request, True)
        request.text, request.finish = alone.text, alone.finish
        if (streamed.text, streamed.finish, streamed.tokens) != (alone.text, alone.finish, alone.tokens):
            print(f"streamed, it differs: {request.body}: {alone} {streamed}", file=sys.stderr)
            return 1
    client.close()
    print(f"{len(requests)} requests; times in ms; load of the machine {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores\n")
    print(line() + "\n" + "|" + " --- |" * len(COLUMNS), flush=True)
    for streams in map(int, arguments.streams.split(",")):
        for hostiles in [0, arguments.hostile] if arguments.hostile else [0]:
            rows.append(await run(target, requests, streams, hostiles, arguments))
            print(line(rows[-1]), flush=True)
            for words, count in rows[-1]["failures"].items():
                print(f"failed {count} times: {words}", file=sys.stderr)
            if rows[-1]["held_after"]:
                print(f"the server still holds {rows[-1]['held_after']} requests", file=sys.stderr)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(rows, file, indent=1)
    return int(any(row["differ"] or row["failed"] or row["held_after"] for row in rows))


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
