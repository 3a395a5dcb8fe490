"""Checks Anthropic's Python library against a server of tiny-chat that wants the API key `secret`."""

from importlib.metadata import version

import anthropic

from checks import Checks, base_url, while_busy

URL = base_url()
MODEL = "Nemotron-3-8B-Chat-4K-RLHF"
PARIS, CAPITALS = "The capital of France is Paris.", "THE CAPITAL OF FRANCE IS PARIS."
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
checks = Checks(f"anthropic {version('anthropic')}")
client = anthropic.Anthropic(base_url=URL, api_key="secret", max_retries=0)


def ask(**settings):
    return client.messages.create(**{"model": MODEL, "max_tokens": 100, "messages": QUESTION, **settings})


def answers():
    reply = ask()
    checks.equal("messages: the answer", [(block.type, block.text) for block in reply.content], [("text", PARIS)])
    checks.equal("messages: role, type, stop_reason", (reply.role, reply.type, reply.stop_reason), ("assistant", "message", "end_turn"))
    checks.that("messages: usage", reply.usage.input_tokens > 0 and reply.usage.output_tokens > 0, reply)
    checks.equal("messages: system", ask(system="Answer in capital letters.").content[0].text, CAPITALS)
    parts = [{"type": "text", "text": "Answer in capital letters."}]
    checks.equal("messages: system in parts", ask(system=parts).content[0].text, CAPITALS)
    turns = [{"role": "user", "content": "My name is Felix."}, {"role": "assistant", "content": [{"type": "text", "text": "Nice to meet you, Felix!"}]},
             {"role": "user", "content": [{"type": "text", "text": "What is my name?"}]}]
    checks.equal("messages: three turns, content in parts", ask(messages=turns).content[0].text, "Your name is Felix.")
    checks.equal("messages: max_tokens 3", ask(max_tokens=3).stop_reason, "max_tokens")
    stopped = ask(stop_sequences=[" is", "never"])
    checks.equal("messages: stop_sequences", (stopped.content[0].text, stopped.stop_reason, stopped.stop_sequence), ("The capital of France", "stop_sequence", " is"))
    checks.equal("messages: temperature 0, top_k 1, top_p 0.9", ask(extra_body={"temperature": 0.0, "top_k": 1, "top_p": 0.9}).content[0].text, PARIS)
    count = client.messages.count_tokens(model=MODEL, messages=QUESTION)
    usage = ask().usage
    read = (usage.input_tokens or 0) + (usage.cache_read_input_tokens or 0)
    checks.equal("count_tokens is usage's tokens, those that were in the cache among them", count.input_tokens, read)


def streams():
    with client.messages.stream(model=MODEL, max_tokens=100, messages=QUESTION) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    checks.equal("stream: the text", text, PARIS)
    checks.equal("stream: the final message", (final.content[0].text, final.stop_reason), (PARIS, "end_turn"))
    checks.equal("stream: its usage", final.usage.output_tokens, ask().usage.output_tokens)
    kinds = [event.type for event in ask(stream=True) if event.type != "ping"]
    checks.equal("stream: the order of events", [k for i, k in enumerate(kinds) if i == 0 or k != kinds[i - 1]],
                 ["message_start", "content_block_start", "content_block_delta", "content_block_stop", "message_delta", "message_stop"])

    def late():
        with client.messages.stream(model=MODEL, max_tokens=100, messages=QUESTION) as stream:
            return "".join(stream.text_stream)

    text, seconds = while_busy(URL, late, {"authorization": "Bearer secret"})
    checks.that("stream: what comes while it waits is skipped", text == PARIS and seconds > 2, (text, seconds))


def errors():
    stranger = anthropic.Anthropic(base_url=URL, api_key="wrong", max_retries=0)
    error = checks.raises("401: a wrong key", anthropic.AuthenticationError, ["key"],
                          lambda: stranger.messages.create(model=MODEL, max_tokens=10, messages=QUESTION))
    checks.equal("401: its body is of Anthropic's form", error and (error.body or {}).get("type"), "error")
    checks.raises("404: an unknown model", anthropic.NotFoundError, ["claude-x"], lambda: ask(model="claude-x"))
    checks.raises("400: max_tokens 0", anthropic.BadRequestError, ["max_tokens"], lambda: ask(max_tokens=0))
    error = checks.raises("400: too long a prompt", anthropic.BadRequestError, ["512"], lambda: ask(messages=[{"role": "user", "content": "word " * 600}]))
    kind = error and isinstance(error.body, dict) and (error.body.get("error") or {}).get("type")
    checks.equal("400: its type", kind, "invalid_request_error")


for part in (answers, streams, errors):
    checks.runs(part.__name__, part)
checks.end()
