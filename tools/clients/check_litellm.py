"""Checks litellm against a server of tiny-chat that wants the API key `secret`."""

import asyncio
import os
from importlib.metadata import version

# Without it, litellm looks for prices on the net first.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm  # noqa: E402

from checks import Checks, base_url, card_prompt, while_busy  # noqa: E402

litellm.suppress_debug_info = True
litellm.telemetry = False
URL = base_url()
NAME = "Nemotron-3-8B-Chat-4K-RLHF"
PARIS = "The capital of France is Paris."
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
checks = Checks(f"litellm {version('litellm')}")


def ask(provider, **settings):
    own = {"model": f"{provider}/{NAME}", "api_base": f"{URL}/v1", "api_key": "secret", "num_retries": 0, "max_retries": 0}
    return litellm.completion(**{**own, "messages": QUESTION, "temperature": 0, **settings})


def answers():
    for provider in ("openai", "hosted_vllm", "litellm_proxy"):
        def one(provider=provider):
            reply = ask(provider)
            checks.equal(f"{provider}: the answer", reply.choices[0].message.content, PARIS)
            checks.equal(f"{provider}: finish_reason, usage", (reply.choices[0].finish_reason, reply.usage.total_tokens > 0), ("stop", True))
            chunks = list(ask(provider, stream=True, stream_options={"include_usage": True}))
            checks.equal(f"{provider}: stream", "".join(c.choices[0].delta.content or "" for c in chunks if c.choices), PARIS)
            checks.that(f"{provider}: the stream's usage", any(getattr(c, "usage", None) for c in chunks), chunks)
            late, seconds = while_busy(URL, lambda: "".join(
                c.choices[0].delta.content or "" for c in ask(provider, stream=True) if c.choices), {"authorization": "Bearer secret"})
            checks.that(f"{provider}: comments while it waits are skipped", late == PARIS and seconds > 2, (late, seconds))
            checks.equal(f"{provider}: stop", ask(provider, stop=[" is"]).choices[0].message.content, "The capital of France")
            many = ask(provider, n=2, temperature=1.0, seed=1, max_tokens=10)
            checks.equal(f"{provider}: n", len(many.choices), 2)
            found = ask(provider, logprobs=True, top_logprobs=2)
            checks.equal(f"{provider}: logprobs", len(found.choices[0].logprobs.content[0].top_logprobs), 2)
        checks.runs(provider, one)
    text = litellm.text_completion(model=f"text-completion-openai/{NAME}", api_base=f"{URL}/v1", api_key="secret",
                                   prompt=card_prompt(QUESTION[0]["content"]), max_tokens=60, temperature=0)
    checks.equal("text_completion", text.choices[0].text.strip(), PARIS)

    async def several():
        own = {"model": f"openai/{NAME}", "api_base": f"{URL}/v1", "api_key": "secret", "messages": QUESTION}
        return [r.choices[0].message.content for r in await asyncio.gather(*(litellm.acompletion(**own) for _ in range(8)))]

    checks.equal("acompletion, 8 at once", asyncio.run(several()), [PARIS] * 8)


def errors():
    checks.raises("a wrong key", litellm.AuthenticationError, ["key"], lambda: ask("openai", api_key="wrong"))
    checks.raises("an unknown model", litellm.NotFoundError, ["gpt-4o"], lambda: ask("openai", model="openai/gpt-4o"))
    long = [{"role": "user", "content": "word " * 600}]
    checks.raises("a prompt that is too long: the class that fallbacks look for", litellm.ContextWindowExceededError, ["512"],
                  lambda: ask("openai", messages=long))
    checks.raises("the same of hosted_vllm", litellm.ContextWindowExceededError, ["512"], lambda: ask("hosted_vllm", messages=long))
    checks.raises("a wrong field", litellm.BadRequestError, ["n is 0"], lambda: ask("openai", n=0))


for part in (answers, errors):
    checks.runs(part.__name__, part)
checks.end()
