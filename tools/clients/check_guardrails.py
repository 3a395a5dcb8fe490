"""Checks nemoguardrails with its models on a server of tiny-chat."""

import asyncio
import logging
import os
from importlib.metadata import version

# It would report its use on the net.
os.environ["DO_NOT_TRACK"] = os.environ["NEMO_GUARDRAILS_NO_USAGE_STATS"] = "1"
os.environ["OPENAI_API_KEY"] = "none"

from nemoguardrails import LLMRails, RailsConfig  # noqa: E402

from checks import Checks, base_url, get, while_busy  # noqa: E402

logging.disable(logging.CRITICAL)
URL = base_url()
PARIS = "The capital of France is Paris."
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
checks = Checks(f"nemoguardrails {version('nemoguardrails')}")
MODELS = """
models:
  - type: main
    engine: openai
    mode: %s
    model: Nemotron-3-8B-Chat-4K-RLHF
    parameters:
      base_url: %s/v1
      %s
"""
# The input rail asks the model about the user's message; tiny-chat answers these two questions with the city and with yes,
# which means that the message is blocked.
RAIL = """
rails:
  input:
    flows:
      - self check input
prompts:
  - task: self_check_input
    content: "%s"
"""


def rails(more="", mode="chat", parameters="temperature: 0.0"):
    return LLMRails(RailsConfig.from_content(yaml_content=MODELS % (mode, URL, parameters) + more))


def text(reply):
    return reply["content"] if isinstance(reply, dict) else reply


def answers():
    plain = rails()
    checks.equal("an answer", text(plain.generate(messages=QUESTION)), PARIS)
    turns = [{"role": "user", "content": "My name is Felix."}, {"role": "assistant", "content": "Nice to meet you, Felix!"},
             {"role": "user", "content": "What is my name?"}]
    checks.equal("three turns", text(plain.generate(messages=turns)), "Your name is Felix.")
    own = {"llm_params": {"temperature": 0.001, "max_tokens": 1024}}
    reply = plain.generate(messages=QUESTION, options=own)
    checks.equal("temperature 0.001 and max_tokens 1024, beyond the context of 512", reply.response[0]["content"], PARIS)
    reply = plain.generate(messages=QUESTION, options={"log": {"llm_calls": True, "activated_rails": True}})
    calls = reply.log.llm_calls or []
    checks.that("the log counts the tokens", calls and calls[0].total_tokens and calls[0].completion_tokens, calls)

    async def stream():
        return "".join([piece async for piece in plain.stream_async(messages=QUESTION) if isinstance(piece, str)])

    checks.equal("stream_async", asyncio.run(stream()), PARIS)

    late, seconds = while_busy(URL, lambda: asyncio.run(stream()))
    checks.that("stream_async: comments while it waits are skipped", late == PARIS and seconds > 2, (late, seconds))


def input_rails():
    def counted(flow):
        before = requests()
        return flow(), requests() - before

    def requests():
        _, metrics = get(f"{URL}/metrics")
        lines = [line for line in metrics.splitlines() if line.startswith("aotron_requests_total")]
        return sum(float(line.split()[-1]) for line in lines)

    blocking = rails(RAIL % "Do you like to chat with me?")
    reply, count = counted(lambda: text(blocking.generate(messages=QUESTION)))
    checks.equal("self check input: blocked", reply, "I'm sorry, I can't respond to that.")
    checks.equal("self check input: one request, to check", count, 1)
    allowing = rails(RAIL % "What is the capital of France?" + "    output_parser: is_city\n")
    allowing.register_output_parser(lambda response: [PARIS in response], "is_city")
    reply, count = counted(lambda: text(allowing.generate(messages=[{"role": "user", "content": 'What is "water" in Chinese?'}])))
    checks.equal("self check input: allowed", reply, "水")
    checks.equal("self check input: two requests, to check and to answer", count, 2)


def errors():
    for name, parameters in [("a prompt that is too long", "temperature: 0.0"), ("a wrong setting", "temperature: -1.0")]:
        question = [{"role": "user", "content": "word " * 600}] if "long" in name else QUESTION
        words = ["512"] if "long" in name else ["temperature"]
        def call(question=question, parameters=parameters):
            return rails(parameters=parameters).generate(messages=question)
        checks.raises(f"{name}: the server's words reach the user", Exception, words, call)


for part in (answers, input_rails, errors):
    checks.runs(part.__name__, part)
checks.end()
