"""Checks Triton's own client over HTTP, and pytriton's asynchronous ones, against a server of tiny-chat."""

import asyncio
import json
import logging
import warnings
from importlib.metadata import version

import numpy as np
import tritonclient.http as http
from pytriton.client import AsyncioModelClient, FuturesModelClient
from tritonclient.utils import InferenceServerException

from checks import Checks, base_url, card_prompt, get, run_raw
from nemo_queries import strings, texts


logging.disable(logging.CRITICAL)
warnings.simplefilter("ignore")
URL = base_url()
MODEL = "Nemotron-3-8B-Chat-4K-RLHF"
PROMPTS = [card_prompt("What is the capital of France?"), card_prompt('What is "water" in Chinese?')]
ANSWERS = [run_raw(prompt)["text"].strip() for prompt in PROMPTS]
checks = Checks(f"tritonclient {version('tritonclient')}")
client = http.InferenceServerClient(URL.removeprefix("http://"))


def infer(is_binary, **settings):
    prompts = http.InferInput("prompts", [2, 1], "BYTES")
    prompts.set_data_from_numpy(np.array([[p] for p in PROMPTS], dtype=object), binary_data=is_binary)
    length = http.InferInput("max_output_len", [2, 1], "INT64")
    length.set_data_from_numpy(np.full((2, 1), 200, dtype=np.int64), binary_data=is_binary)
    outputs = [http.InferRequestedOutput("outputs", binary_data=is_binary)]
    reply = client.infer(MODEL, [prompts, length], outputs=outputs, **settings)
    found = reply.as_numpy("outputs").reshape(-1).tolist()
    return [(text.decode() if isinstance(text, bytes) else text).strip() for text in found], reply


def server():
    checks.that("live, ready, model ready", client.is_server_live() and client.is_server_ready() and client.is_model_ready(MODEL))
    checks.equal("version 1 of the model is ready", client.is_model_ready(MODEL, "1"), True)
    found = client.get_server_metadata()
    checks.that("server metadata", found["name"] and found["version"] and "binary_tensor_data" in found["extensions"], found)
    found = client.get_model_metadata(MODEL)
    checks.equal("model metadata: name", found["name"], MODEL)
    checks.equal("model metadata: outputs", [o["datatype"] for o in found["outputs"]][:2], ["BYTES", "BYTES"])
    checks.that("model metadata: inputs", {"prompts", "max_output_len", "top_k"} <= {i["name"] for i in found["inputs"]}, found)
    checks.equal("model configuration", client.get_model_config(MODEL)["name"], MODEL)


def tensors():
    checks.equal("tensors as bytes", infer(True)[0], ANSWERS)
    checks.equal("tensors as JSON", infer_json(), ANSWERS)
    found, reply = infer(True, request_id="mine", model_version="1")
    checks.equal("a request id, a version", (found, reply.get_response()["id"]), (ANSWERS, "mine"))
    for algorithm in ("gzip", "deflate"):
        def packed(algorithm=algorithm):
            found = infer(True, response_compression_algorithm=algorithm)[0]
            checks.equal(f"a reply that may be compressed with {algorithm}", found, ANSWERS)
            try:
                found = infer(True, request_compression_algorithm=algorithm)[0]
                checks.equal(f"a body compressed with {algorithm}", found, ANSWERS)
            except InferenceServerException as error:
                # Only that it says so, where the server does not unpack it.
                checks.that(f"a body compressed with {algorithm} is refused by name", "compressed" in str(error), error)
        checks.runs(f"compression with {algorithm}", packed)


def infer_json():
    """A request of JSON alone, as curl sends it: the client cannot read text in JSON that is not ASCII."""
    inputs = [
        {"name": "prompts", "shape": [2, 1], "datatype": "BYTES", "data": PROMPTS},
        {"name": "max_output_len", "shape": [2, 1], "datatype": "INT64", "data": [[200], [200]]},
    ]
    _, body = get(f"{URL}/v2/models/{MODEL}/infer", {"inputs": inputs, "outputs": [{"name": "outputs"}]})
    return [text.strip() for text in json.loads(body)["outputs"][0]["data"]]


def asynchronous():
    async def ask():
        async with AsyncioModelClient(URL, MODEL, init_timeout_s=20) as client:
            replies = await asyncio.gather(*(client.infer_batch(prompts=strings(PROMPTS)) for _ in range(4)))
            return [[text.strip() for text in texts(reply["outputs"]).reshape(-1)] for reply in replies]

    checks.equal("AsyncioModelClient, 4 at once", asyncio.run(ask()), [ANSWERS] * 4)
    with FuturesModelClient(URL, MODEL, init_timeout_s=20) as client:
        futures = [client.infer_batch(prompts=strings(PROMPTS)) for _ in range(4)]
        found = [[text.strip() for text in texts(f.result()["outputs"]).reshape(-1)] for f in futures]
    checks.equal("FuturesModelClient, 4 at once", found, [ANSWERS] * 4)


def generate():
    _, body = get(f"{URL}/v2/models/{MODEL}/generate", {"text_input": PROMPTS[0], "max_tokens": 100})
    checks.equal("generate", json.loads(body)["text_output"].strip(), ANSWERS[0])
    _, body = get(f"{URL}/v2/models/{MODEL}/generate_stream", {"text_input": PROMPTS[1], "parameters": {"max_tokens": 100}})
    pieces = [json.loads(line[6:])["text_output"] for line in body.splitlines() if line.startswith("data: {")]
    checks.equal("generate_stream", "".join(pieces).strip(), ANSWERS[1])


def errors():
    prompts = http.InferInput("prompts", [1, 1], "BYTES")
    prompts.set_data_from_numpy(np.array([["a"]], dtype=object))
    unknown = http.InferInput("colour", [1, 1], "BYTES")
    unknown.set_data_from_numpy(np.array([["red"]], dtype=object))
    error = checks.raises("an unknown input", InferenceServerException, ["colour"], lambda: client.infer(MODEL, [prompts, unknown]))
    checks.equal("its status", error and error.status(), "400")
    wanted = [http.InferRequestedOutput("logits")]
    checks.raises("an unknown output", InferenceServerException, ["logits"], lambda: client.infer(MODEL, [prompts], outputs=wanted))
    checks.raises("no prompts", InferenceServerException, ["prompts"], lambda: client.infer(MODEL, [unknown]))
    checks.raises("version 7 of the model", InferenceServerException, ["7"], lambda: client.infer(MODEL, [prompts], model_version="7"))


for part in (server, tensors, asynchronous, generate, errors):
    checks.runs(part.__name__, part)
checks.end()
