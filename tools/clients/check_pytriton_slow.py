"""Checks that an answer which takes longer than a minute reaches pytriton's client, which gives up after 60 seconds without
a byte; and with LATE=1, on a server with `--request-timeout 15`, what the client then reads.

The server has one slot (`--slots 1`). Requests of OpenAI's API with a lower `priority` number get it first; as long as some
of them wait, NeMo's requests do.
"""

import logging
import os
import threading
import time
import warnings
from importlib.metadata import version

from checks import Checks, base_url, card_prompt, get, run_raw
from nemo_queries import NemoQueryCard, NemoQueryLLM22, NemoQueryLLMPyTorch

logging.disable(logging.CRITICAL)
warnings.simplefilter("ignore")
IS_LATE = os.environ.get("LATE") == "1"
SECONDS = 20 if IS_LATE else 77
LEAST = 14 if IS_LATE else 70
URL = base_url()
MODEL = "Nemotron-3-8B-Chat-4K-RLHF"
PROMPT = card_prompt('What is "water" in Chinese?')
checks = Checks(f"pytriton {version('nvidia-pytriton')}, {'late' if IS_LATE else 'slow'}")
answer = run_raw(PROMPT)["text"].strip()
ends = time.monotonic() + SECONDS


def keep_busy():
    body = {"prompt": "a", "max_tokens": 400, "ignore_eos": True, "priority": -1}
    while time.monotonic() < ends:
        get(f"{URL}/v1/completions", body)


def ask(kind):
    started = time.monotonic()

    def call():
        found = kind(URL, MODEL).query_llm([PROMPT, PROMPT]).tolist()
        seconds = time.monotonic() - started
        texts = [text.strip() for row in found for text in row]
        if IS_LATE:
            is_expected = [text.startswith("An error occurred: ") for text in texts] == [True, True]
            checks.that(f"{kind.__name__}: after {seconds:.0f} s the error is the text, as with NeMo", is_expected, found)
        else:
            checks.equal(f"{kind.__name__}: an answer after {seconds:.0f} s", texts, [answer] * 2)
        checks.that(f"{kind.__name__}: it took at least {LEAST} s", seconds > LEAST, f"{seconds:.1f} s")
    checks.runs(kind.__name__, call)


busy = [threading.Thread(target=keep_busy, daemon=True) for _ in range(3)]
for thread in busy:
    thread.start()
time.sleep(2)
asking = [threading.Thread(target=ask, args=(kind,)) for kind in (NemoQueryCard, NemoQueryLLM22, NemoQueryLLMPyTorch)]
for thread in asking:
    thread.start()
for thread in asking:
    thread.join()
checks.end()
