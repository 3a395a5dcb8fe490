"""Checks langchain-openai against a server of tiny-chat that wants the API key `secret`."""

import asyncio
from importlib.metadata import version
from typing import Literal

import openai
import pydantic
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI, OpenAI

from checks import Checks, base_url, card_prompt, while_busy

URL = base_url()
MODEL = "Nemotron-3-8B-Chat-4K-RLHF"
SETTINGS = {"base_url": f"{URL}/v1", "api_key": "secret", "model": MODEL, "max_retries": 0}
PARIS, CAPITALS = "The capital of France is Paris.", "THE CAPITAL OF FRANCE IS PARIS."
checks = Checks(f"langchain-openai {version('langchain-openai')}")
chat = ChatOpenAI(temperature=0, **SETTINGS)


def answers():
    reply = chat.invoke("What is the capital of France?")
    checks.equal("invoke", reply.content, PARIS)
    usage = reply.usage_metadata
    checks.equal("invoke: usage", usage["total_tokens"], usage["input_tokens"] + usage["output_tokens"])
    checks.equal("invoke: finish_reason", reply.response_metadata["finish_reason"], "stop")
    messages = [SystemMessage("Answer in capital letters."), HumanMessage("What is the capital of France?")]
    checks.equal("a system message", chat.invoke(messages).content, CAPITALS)
    turns = [HumanMessage("My name is Felix."), AIMessage("Nice to meet you, Felix!"), HumanMessage("What is my name?")]
    checks.equal("three turns", chat.invoke(turns).content, "Your name is Felix.")
    short = ChatOpenAI(max_tokens=3, **SETTINGS).invoke("What is the capital of France?")
    checks.equal("max_tokens 3", short.response_metadata["finish_reason"], "length")
    checks.equal("stop", chat.invoke("What is the capital of France?", stop=[" is"]).content, "The capital of France")
    found = ChatOpenAI(logprobs=True, top_logprobs=2, **SETTINGS).invoke("What is the capital of France?")
    checks.equal("logprobs", len(found.response_metadata["logprobs"]["content"][0]["top_logprobs"]), 2)
    question = ChatPromptTemplate.from_messages([("user", 'What is "{word}" in Chinese?')])
    chain = question | chat | StrOutputParser()
    checks.equal("a chain", chain.invoke({"word": "water"}), "水")
    checks.equal("batch", chain.batch([{"word": "water"}] * 4), ["水"] * 4)
    checks.equal("OpenAI, for completions", OpenAI(temperature=0, max_tokens=60, **SETTINGS).invoke(card_prompt("What is the capital of France?")).strip(), PARIS)


def streams():
    chunks = list(chat.stream("What is the capital of France?", stream_usage=True))
    checks.equal("stream", "".join(chunk.content for chunk in chunks), PARIS)
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    checks.that("stream: usage", whole.usage_metadata and whole.usage_metadata["output_tokens"] > 0, whole)

    late, seconds = while_busy(URL, lambda: "".join(c.content for c in chat.stream("What is the capital of France?")), {"authorization": "Bearer secret"})
    checks.that("stream: comments while it waits are skipped", late == PARIS and seconds > 2, (late, seconds))

    async def several():
        return [reply.content for reply in await asyncio.gather(*(chat.ainvoke("What is the capital of France?") for _ in range(8)))]

    checks.equal("ainvoke, 8 at once", asyncio.run(several()), [PARIS] * 8)


class City(pydantic.BaseModel):
    """The city of an answer."""

    city: Literal["Paris", "Rome"]


def structured():
    found = ChatOpenAI(max_tokens=400, **SETTINGS).with_structured_output(City, method="json_schema").invoke("What is the capital of France?")
    checks.that("with_structured_output: json_schema", isinstance(found, City), found)
    error = checks.raises("bind_tools: refused by name", openai.BadRequestError, ["tools"], lambda: chat.bind_tools([City]).invoke("a"))
    checks.equal("bind_tools: the param", error and error.param, "tools")


def errors():
    wrong = {**SETTINGS, "api_key": "wrong"}
    checks.raises("a wrong key", openai.AuthenticationError, ["key"], lambda: ChatOpenAI(**wrong).invoke("a"))
    checks.raises("an unknown model", openai.NotFoundError, ["gpt-4o"], lambda: ChatOpenAI(**{**SETTINGS, "model": "gpt-4o"}).invoke("a"))
    checks.raises("a prompt that is too long", openai.BadRequestError, ["512"], lambda: chat.invoke("word " * 600))


for part in (answers, streams, structured, errors):
    checks.runs(part.__name__, part)
checks.end()
