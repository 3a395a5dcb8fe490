"""Checks NeMo's own query classes, from a file of theirs that is not part of this repository:

    python check_nemo_query.py BASE_URL FILE…    # each a version of nemo/deploy/nlp/query_llm.py, or of nemo/deploy/query.py

Of the packages around it, the file needs one function, which is made here.
"""

import ast
import importlib.util
import inspect
import json
import logging
import os
import sys
import types
import warnings
from importlib.metadata import version

import nemo_queries
from checks import Checks, card_prompt, run_raw

logging.disable(logging.CRITICAL)
warnings.simplefilter("ignore")
URL, FILES = sys.argv[1], sys.argv[2:]
MODEL = "Nemotron-3-8B-Chat-4K-RLHF"
PROMPTS = [card_prompt("What is the capital of France?"), card_prompt('What is "water" in Chinese?')]
ANSWERS = [[run_raw(prompt)["text"].strip()] for prompt in PROMPTS]


def stand_in(name, **members):
    module = types.ModuleType(name)
    module.__path__ = []
    vars(module).update(members)
    sys.modules[name] = module


for package in ("nemo", "nemo.deploy", "nemo.deploy.nlp", "nemo_deploy", "nemo_deploy.llm", "nemo_export_deploy_common"):
    stand_in(package)
for package in ("nemo.deploy", "nemo_deploy"):
    stand_in(f"{package}.utils", str_list2numpy=nemo_queries.strings)
stand_in("nemo_export_deploy_common.import_utils", MISSING_TRITON_MSG="pytriton is missing", UnavailableError=ImportError)


def texts(reply):
    """The texts of a reply, which some versions leave as bytes, and some have in OpenAI's form, as an array or printed."""
    if isinstance(reply, dict):
        reply = reply["choices"][0]["text"] if "choices" in reply else nemo_queries.texts(reply["sentences"])
    rows = ast.literal_eval(reply.replace("]\n [", "], [")) if isinstance(reply, str) else reply.tolist()
    rows = [row if isinstance(row, list) else [row] for row in rows]
    return [[text.strip() for text in row] for row in rows]


def check(file):
    checks = Checks(f"{os.path.basename(file)}, pytriton {version('nvidia-pytriton')}")
    spec = importlib.util.spec_from_file_location("nemo.deploy.query_file", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kinds = [kind for name, kind in vars(module).items() if name.startswith("NemoQuery") and not name.endswith("Base")]
    checks.that("it has classes", kinds)
    for kind in kinds:
        def one(kind=kind):
            known = inspect.signature(kind.query_llm).parameters
            length = next(name for name in ("max_output_token", "max_output_len", "max_length", "max_tokens") if name in known)
            card = {"top_k": 1, "top_p": 0.0, "temperature": 0.1}
            query = kind(url=URL, model_name=MODEL)
            checks.equal(f"{kind.__name__}: the model card's settings", texts(query.query_llm(PROMPTS, **{length: 200}, **card)), ANSWERS)
            checks.equal(f"{kind.__name__}: no settings", texts(query.query_llm(PROMPTS)), ANSWERS)
            cut = [[answer.split(" is")[0]] for answer, in ANSWERS]
            for stops in ("stop_words_list", "end_strings"):
                if stops in known:
                    found = texts(query.query_llm(PROMPTS, **{length: 200, stops: [" is", "one", "two"]}, **card))
                    checks.equal(f"{kind.__name__}: {stops}", found, cut)
            if "openai_format_response" in known:
                found = texts(query.query_llm(PROMPTS, **{length: 200}, openai_format_response=True, **card))
                checks.equal(f"{kind.__name__}: openai_format_response", found, ANSWERS)
            if "apply_chat_template" in known:
                messages = json.dumps([{"role": "user", "content": "What is the capital of France?"}])
                found = texts(query.query_llm([messages], **{length: 200}, apply_chat_template=True, **card))
                checks.equal(f"{kind.__name__}: apply_chat_template", found, ANSWERS[:1])
        checks.runs(kind.__name__, one)
    print(f"{checks.client}: {checks.passed} passed, {checks.failed} failed", flush=True)
    return checks


done = [check(file) for file in FILES]
sys.exit(1 if not done or any(checks.failed for checks in done) else 0)
