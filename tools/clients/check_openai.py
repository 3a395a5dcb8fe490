"""Checks OpenAI's Python library against a server of tiny-chat that wants the API key `secret`."""

import asyncio
import json
import socket
import tempfile
import time
import urllib.parse
from importlib.metadata import version
from typing import Literal

import openai
import pydantic

from checks import Checks, aotron, base_url, card_prompt, get, run_raw, while_busy

URL = base_url()
MODEL = "Nemotron-3-8B-Chat-4K-RLHF"
client = openai.OpenAI(base_url=f"{URL}/v1", api_key="secret", max_retries=0, timeout=60)
checks = Checks(f"openai {version('openai')}")
PARIS, WATER = "What is the capital of France?", 'What is "water" in Chinese?'
PROMPT = card_prompt(PARIS)


def user(text):
    return [{"role": "user", "content": text}]


def run_chat(question, *arguments):
    """The answer of `aotron run`, with the chat template."""
    return json.loads(aotron("run", "--format", "json", *arguments, "--prompt", question))


def chat(question=PARIS, **settings):
    return client.chat.completions.create(model=MODEL, messages=user(question), **settings)


def tokenize(text):
    """Ids of a text, by the server."""
    return json.loads(get(f"{URL}/tokenize", {"prompt": text}, {"authorization": "Bearer secret"})[1])["tokens"]


def whole_answers():
    expected = run_chat(PARIS)
    reply = chat()
    choice = reply.choices[0]
    checks.equal("chat: the answer is that of aotron run", choice.message.content, expected["text"].strip())
    checks.equal("chat: role, finish_reason, object", (choice.message.role, choice.finish_reason, reply.object),
                 ("assistant", "stop", "chat.completion"))
    usage = reply.usage
    checks.equal("chat: usage", (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens),
                 (expected["prompt_tokens"], len(expected["token_ids"]), expected["prompt_tokens"] + len(expected["token_ids"])))
    checks.that("chat: system_fingerprint, id, created", reply.system_fingerprint and reply.id and reply.created > 1.6e9, reply)
    checks.that("chat: the request's id is that of the header", bool(reply._request_id), reply)
    checks.equal("chat: an answer that is not ASCII", chat(WATER).choices[0].message.content, "水")
    reply = chat(max_completion_tokens=3)
    checks.equal("chat: max_completion_tokens 3", (reply.choices[0].finish_reason, reply.usage.completion_tokens), ("length", 3))
    reply = chat(max_tokens=3)
    checks.equal("chat: max_tokens 3", (reply.choices[0].finish_reason, reply.usage.completion_tokens), ("length", 3))
    checks.equal("chat: max_tokens beyond the context", chat(max_tokens=100000).choices[0].message.content, expected["text"].strip())
    turns = [
        {"role": "system", "content": "Answer in capital letters."},
        {"role": "user", "content": [{"type": "text", "text": "What is the capital "}, {"type": "text", "text": "of France?"}]},
    ]
    shouted = run_chat(PARIS, "--system", "Answer in capital letters.")["text"].strip()
    reply = client.chat.completions.create(model=MODEL, messages=turns)
    checks.equal("chat: a system message, content in parts", reply.choices[0].message.content, shouted)
    turns[0]["role"] = "developer"
    reply = client.chat.completions.create(model=MODEL, messages=turns)
    checks.equal("chat: a developer message", reply.choices[0].message.content, shouted)
    turns = [*user("My name is Felix."), {"role": "assistant", "content": "Nice to meet you, Felix!"}, *user("What is my name?")]
    reply = client.chat.completions.create(model=MODEL, messages=turns)
    checks.equal("chat: three turns", reply.choices[0].message.content, "Your name is Felix.")


def streams():
    for question in (PARIS, WATER):
        expected = chat(question)
        chunks = list(chat(question, stream=True, stream_options={"include_usage": True}))
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        checks.equal(f"stream: the text of {question!r}", text, expected.choices[0].message.content)
        checks.equal("stream: the role comes first", chunks[0].choices[0].delta.role, "assistant")
        finish = [c.choices[0].finish_reason for c in chunks if c.choices]
        checks.equal("stream: one finish_reason, in the last piece", [f for f in finish if f], ["stop"])
        checks.equal("stream: the last chunk has usage and no choices", (chunks[-1].choices, chunks[-1].usage), ([], chunks[-1].usage))
        checks.equal("stream: its usage", chunks[-1].usage.total_tokens, expected.usage.total_tokens)
        checks.equal("stream: one id", len({c.id for c in chunks}), 1)
    without = list(chat(stream=True))
    checks.equal("stream: no usage unless asked", [c.usage for c in without if c.usage], [])
    with client.chat.completions.stream(model=MODEL, messages=user(PARIS)) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    checks.equal("stream: the library's own accumulation", final.choices[0].message.content, chat().choices[0].message.content)
    stream = chat("Count from 1 to 9.", stream=True, max_tokens=400)
    next(iter(stream))
    stream.close()
    checks.equal("stream: closed by the client, and another answered", chat(WATER).choices[0].message.content, "水")

    def late():
        return "".join(c.choices[0].delta.content or "" for c in chat(stream=True) if c.choices)

    text, seconds = while_busy(URL, late, {"authorization": "Bearer secret"})
    checks.that("stream: comments while it waits are skipped", text == chat().choices[0].message.content and seconds > 2, (text, seconds))

    async def several():
        own = openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key="secret", max_retries=0)
        asks = [own.chat.completions.create(model=MODEL, messages=user(q)) for q in (PARIS, WATER) * 8]
        return [reply.choices[0].message.content for reply in await asyncio.gather(*asks)]

    checks.equal("16 answers at once", asyncio.run(several()), [chat().choices[0].message.content, "水"] * 8)


def logprobs():
    reply = chat(logprobs=True, top_logprobs=3)
    content = reply.choices[0].logprobs.content
    text = reply.choices[0].message.content
    checks.equal("logprobs: the tokens make the text", b"".join(bytes(t.bytes or []) for t in content).decode().strip(), text)
    checks.that("logprobs: three alternatives, the most likely first, which greedy decoding took",
                all(len(t.top_logprobs) == 3 and t.top_logprobs[0].logprob == t.logprob for t in content), content)
    checks.that("logprobs: none above 0", all(t.logprob <= 0 for t in content), content)
    checks.equal("logprobs: true alone has no alternatives", chat(logprobs=True).choices[0].logprobs.content[0].top_logprobs, [])
    pieces = [c.choices[0] for c in chat(stream=True, logprobs=True, top_logprobs=3) if c.choices]
    streamed = [t.logprob for p in pieces if p.logprobs for t in p.logprobs.content or []]
    checks.equal("logprobs: those of the stream are the same", streamed, [t.logprob for t in content])
    water = chat(WATER, logprobs=True).choices[0].logprobs.content
    checks.equal("logprobs: bytes of text that is not ASCII", b"".join(bytes(t.bytes) for t in water).decode().strip(), "水")
    prompt = tokenize(PROMPT)
    echoed = client.completions.create(model=MODEL, prompt=prompt, echo=True, max_tokens=len(content), logprobs=1)
    found = echoed.choices[0].logprobs.token_logprobs[len(prompt):]
    checks.equal("logprobs: those of chat and of completions are the same", found[:len(content)], [t.logprob for t in content])


def choices():
    reply = chat(n=3, temperature=6.0, seed=5, max_tokens=20)
    texts = [c.message.content for c in reply.choices]
    checks.equal("n: three choices", [c.index for c in reply.choices], [0, 1, 2])
    checks.that("n: they differ", len(set(texts)) > 1, texts)
    again = [c.message.content for c in chat(n=3, temperature=6.0, seed=5, max_tokens=20).choices]
    checks.equal("seed: the same again", again, texts)
    other = [c.message.content for c in chat(n=3, temperature=6.0, seed=99, max_tokens=20).choices]
    checks.that("seed: another one, other texts", other != texts, other)
    by_index = {}
    for chunk in chat(n=3, temperature=6.0, seed=5, max_tokens=20, stream=True):
        for choice in chunk.choices:
            by_index[choice.index] = by_index.get(choice.index, "") + (choice.delta.content or "")
    checks.equal("n, seed: the stream's are the same", [by_index[i] for i in range(3)], texts)
    reply = chat(stop=[" is", "never"])
    checks.equal("stop: a list", (reply.choices[0].message.content, reply.choices[0].finish_reason), ("The capital of France", "stop"))
    checks.equal("stop: a string", chat(stop="France").choices[0].message.content, "The capital of")
    streamed = "".join(c.choices[0].delta.content or "" for c in chat(stop=" is", stream=True) if c.choices)
    checks.equal("stop: nothing of it is streamed", streamed, "The capital of France")
    paris = [t for t in chat(logprobs=True).choices[0].logprobs.content if "Paris" in t.token]
    if checks.that("logit_bias: there is a token for Paris", paris, chat(logprobs=True)):
        ids = [i for i in tokenize("x Paris") if i not in tokenize("x")]
        reply = chat(logit_bias={str(ids[-1]): -100})
        checks.that("logit_bias: -100 bans a token", "Paris" not in reply.choices[0].message.content, reply)
    checks.equal("temperature 0", chat(temperature=0).choices[0].message.content, chat().choices[0].message.content)
    extra = {"top_k": 1, "repetition_penalty": 1.0, "min_tokens": 2, "ignore_eos": False, "stop_token_ids": [5]}
    checks.equal("extra_body", chat(temperature=1.5, extra_body=extra).choices[0].message.content, chat().choices[0].message.content)


def completions():
    expected = run_raw(PROMPT)
    ids = tokenize(PROMPT)

    def complete(prompt, **settings):
        return client.completions.create(model=MODEL, prompt=prompt, **{"max_tokens": 200, **settings})

    reply = complete(PROMPT)
    checks.equal("completions: the text is that of aotron run --raw", reply.choices[0].text, expected["text"])
    checks.equal("completions: token ids as the prompt", complete(ids).choices[0].text, expected["text"])
    water = card_prompt(WATER)
    found = complete([PROMPT, water])
    checks.equal("completions: two prompts", [c.text for c in found.choices], [expected["text"], run_raw(water)["text"]])
    checks.equal("completions: usage of two prompts", found.usage.prompt_tokens, len(ids) + len(tokenize(water)))
    found = complete([ids, tokenize(water)])
    checks.equal("completions: two lists of ids", [c.text for c in found.choices], [expected["text"], run_raw(water)["text"]])
    checks.equal("completions: 16 tokens by default", client.completions.create(model=MODEL, prompt="a", extra_body={"ignore_eos": True}).usage.completion_tokens, 16)
    checks.equal("completions: stop", complete(PROMPT, stop=[" is"]).choices[0].text, expected["text"].split(" is")[0])
    found = complete([PROMPT, water], n=2)
    checks.equal("completions: n is for each prompt", [c.index for c in found.choices], [0, 1, 2, 3])
    streamed = "".join(c.choices[0].text for c in complete(PROMPT, stream=True) if c.choices)
    checks.equal("completions: the stream's text", streamed, expected["text"])
    usage = [c.usage for c in complete(PROMPT, stream=True, stream_options={"include_usage": True}) if c.usage]
    checks.equal("completions: the stream's usage", usage, [reply.usage])
    checks.equal("completions: seed", complete("a", temperature=2.0, seed=3, max_tokens=12).choices[0].text,
                 complete("a", temperature=2.0, seed=3, max_tokens=12).choices[0].text)
    found = complete(ids, echo=True, logprobs=2, max_tokens=1).choices[0].logprobs
    checks.equal("echo: an entry for each token of the prompt and the one generated", 
                 [len(x) for x in (found.tokens, found.token_logprobs, found.top_logprobs, found.text_offset)], [len(ids) + 1] * 4)
    checks.equal("echo: none for the first token", (found.token_logprobs[0], found.top_logprobs[0]), (None, None))
    checks.that("echo: a token is among the alternatives with the same number", all(
        found.top_logprobs[i][found.tokens[i]] == found.token_logprobs[i] for i in range(1, len(ids))), found)
    for most in (0, 1):
        found = complete(ids, echo=True, logprobs=0, max_tokens=most).choices[0].logprobs.token_logprobs
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            file.write(json.dumps([ids]))
            file.flush()
            score = json.loads(aotron("score", "--format", "json", "--ids", file.name))["lists"][0]
        checks.equal(f"echo with max_tokens {most}: the sum is that of aotron score", sum(found[1:len(ids)]), score["log_probability"])
        checks.equal(f"echo with max_tokens {most}: the number of tokens", len(found), len(ids) + most)
    plain = "Paris is a city."
    checks.equal("echo: the text", complete(plain, echo=True, max_tokens=1).choices[0].text[:len(plain)], plain)


def models():
    listed = client.models.list().data
    checks.equal("models: the list", [m.id for m in listed], [MODEL])
    checks.equal("models: retrieve", client.models.retrieve(MODEL).id, MODEL)
    checks.equal("models: retrieve, another spelling", client.models.retrieve("nvidia/nemotron-3-8b-chat-4k-rlhf").id, MODEL)
    checks.equal("models: max_model_len", listed[0].model_extra.get("max_model_len"), 512)


def errors():
    stranger = openai.OpenAI(base_url=f"{URL}/v1", api_key="wrong", max_retries=0)
    error = checks.raises("401: a wrong key", openai.AuthenticationError, ["key"],
                          lambda: stranger.chat.completions.create(model=MODEL, messages=user(PARIS)))
    checks.equal("401: its code", error and error.code, "invalid_api_key")
    checks.raises("401: models too", openai.AuthenticationError, ["key"], stranger.models.list)
    error = checks.raises("404: an unknown model", openai.NotFoundError, ["gpt-4o", MODEL],
                          lambda: client.chat.completions.create(model="gpt-4o", messages=user(PARIS)))
    checks.equal("404: code, param", error and (error.code, error.param), ("model_not_found", "model"))
    error = checks.raises("404: models.retrieve", openai.NotFoundError, ["gpt-4o"], lambda: client.models.retrieve("gpt-4o"))
    checks.equal("404: its code", error and error.code, "model_not_found")
    checks.raises("404: a route that is not there", openai.NotFoundError, [], lambda: client.embeddings.create(model=MODEL, input="a"))
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    for param, words, settings in [
        ("temperature", ["temperature"], {"temperature": -1}), ("n", ["n is 0"], {"n": 0}),
        ("top_logprobs", ["logprobs"], {"top_logprobs": 3}), ("top_logprobs", ["21"], {"logprobs": True, "top_logprobs": 21}),
        ("top_p", ["top_p"], {"top_p": -0.5}), ("stream_options", ["stream"], {"stream_options": {"include_usage": True}}),
        ("messages[0]", ["image_url"], {"messages": image}), ("tools", ["tools"], {"tools": [tool]}),
        ("logit_bias", ["logit_bias"], {"logit_bias": {"x": 1}}), ("max_tokens", ["max_tokens"], {"max_tokens": -1}),
        ("messages", ["message"], {"messages": []}), ("presence_penalty", ["presence_penalty"], {"presence_penalty": "a"}),
        ("messages[0]", ["role"], {"messages": [{"role": "robot", "content": "x"}]}),
    ]:
        def call(settings=settings):
            return client.chat.completions.create(**{"model": MODEL, "messages": user(PARIS), **settings})
        error = checks.raises(f"400: {list(settings.items())[-1]}"[:90], openai.BadRequestError, words, call)
        if error is not None:
            checks.equal("400: its param, type", (error.param, error.type), (param, "invalid_request_error"))
    long = user("word " * 600)
    for stream in (False, True):
        error = checks.raises(f"400: too long a prompt, stream {stream}", openai.BadRequestError, ["512"],
                              lambda s=stream: client.chat.completions.create(model=MODEL, messages=long, stream=s))
        checks.equal("400: its code", error and error.code, "context_length_exceeded")
    many = openai.OpenAI(base_url=f"{URL}/v1", api_key="secret", max_retries=0)
    checks.equal("the server answers after all of them", many.chat.completions.create(model=MODEL, messages=user(WATER)).choices[0].message.content, "水")
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=user(PARIS), extra_headers={"x-request-id": "mine-1"},
                                                           extra_body={"colour": "red"})
    checks.equal("x-request-id is kept", raw.headers.get("x-request-id"), "mine-1")
    checks.equal("an unknown field is named in x-aotron-ignored", raw.headers.get("x-aotron-ignored"), "colour")


def refused_connections():
    """A pool sends its next request on the connection of a refusal, unless the reply says that it is closed."""
    address = urllib.parse.urlsplit(URL)
    body = b'{"messages": []}'
    head = (f"POST /v1/chat/completions HTTP/1.1\r\nHost: {address.netloc}\r\nAuthorization: Bearer wrong\r\n"
            f"Content-Length: {len(body)}\r\n\r\n").encode()
    usable = []
    for _ in range(20):
        with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(head)
            # As the library sends it: apart from the head.
            time.sleep(0.002)
            connection.sendall(body)
            reply = connection.recv(1 << 16).lower()
            if b"connection: close" in reply:
                usable.append(True)
                continue
            time.sleep(0.01)
            try:
                connection.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
                usable.append(connection.recv(1 << 16).startswith(b"HTTP/1.1 200"))
            except OSError:
                usable.append(False)
    checks.equal("a refusal leaves the connection open, or says that it closes it", usable.count(True), len(usable))


def giving_up():
    """A client that leaves ends its request, whether it is streamed or not."""
    def in_flight():
        # Metrics need the key too.
        _, body = get(f"{URL}/metrics", None, {"authorization": "Bearer secret"})
        return sum(float(line.split()[-1]) for line in body.splitlines() if line.startswith("aotron_requests_in_flight"))

    settings = {"max_tokens": 400, "n": 100, "extra_body": {"ignore_eos": True}}
    for stream in (False, True):
        name = f"stream {stream}: a client that gives up"
        def call(stream=stream):
            reply = client.with_options(timeout=1.0).chat.completions.create(model=MODEL, messages=user(PARIS), stream=stream, **settings)
            if stream:
                seen = in_flight()
                reply.close()
                raise openai.APITimeoutError(None) if seen == 100 else AssertionError(f"{seen} ran")
        checks.raises(name, openai.APITimeoutError, [], call)
        ends = time.monotonic() + 3
        while in_flight() and time.monotonic() < ends:
            time.sleep(0.05)
        checks.equal(f"{name} leaves nothing that runs", in_flight(), 0)


class City(pydantic.BaseModel):
    city: Literal["Paris", "Rome"]
    is_capital: bool


def structured():
    """Answers in a given form. tiny-chat has not learned to write JSON, so only the form is checked."""
    reply = client.chat.completions.parse(model=MODEL, messages=user(PARIS), response_format=City, max_tokens=400)
    checks.that("parse: an answer of the class", isinstance(reply.choices[0].message.parsed, City), reply)
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 9}}, "required": ["n"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "number", "schema": schema, "strict": True}}
    found = json.loads(chat(response_format=form, max_tokens=400).choices[0].message.content)
    checks.that("json_schema: a number in its range", list(found) == ["n"] and 1 <= found["n"] <= 9, found)
    streamed = "".join(c.choices[0].delta.content or "" for c in chat(response_format=form, max_tokens=400, stream=True) if c.choices)
    checks.equal("json_schema: the stream's text is the same", json.loads(streamed), found)
    chosen = chat(extra_body={"structured_outputs": {"choice": ["Rome", "Berlin"]}}).choices[0].message.content
    checks.that("structured_outputs: one of the choices", chosen in ("Rome", "Berlin"), chosen)
    chosen = chat(extra_body={"structured_outputs": {"regex": "[0-9]{3}"}}).choices[0].message.content
    checks.that("structured_outputs: a regular expression", len(chosen) == 3 and chosen.isdigit(), chosen)
    bad = {"type": "json_schema", "json_schema": {"name": "bad", "schema": {"type": "nonsense"}}}
    error = checks.raises("json_schema: a schema that is none", openai.BadRequestError, [], lambda: chat(response_format=bad))
    checks.equal("json_schema: its param", error and error.param, "response_format")


def responses():
    text = run_chat(PARIS)["text"].strip()
    reply = client.responses.create(model=MODEL, input=PARIS)
    checks.equal("responses: the answer", (reply.output_text, reply.status), (text, "completed"))
    checks.that("responses: usage", reply.usage.total_tokens == reply.usage.input_tokens + reply.usage.output_tokens, reply.usage)
    reply = client.responses.create(model=MODEL, input=user(PARIS), instructions="Answer in capital letters.", max_output_tokens=100)
    checks.equal("responses: messages, instructions", reply.output_text, text.upper())
    reply = client.responses.create(model=MODEL, input=PARIS, max_output_tokens=3)
    checks.equal("responses: max_output_tokens", (reply.status, reply.incomplete_details.reason), ("incomplete", "max_output_tokens"))
    with client.responses.stream(model=MODEL, input=PARIS) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    checks.equal("responses: the stream's final answer", final.output_text, text)
    checks.equal("responses: the stream's first and last events", (kinds[0], kinds[-1]), ("response.created", "response.completed"))


for part in (whole_answers, streams, logprobs, choices, completions, models, errors, refused_connections, giving_up, structured, responses):
    checks.runs(part.__name__, part)
checks.end()
