"""Checks NeMo's query classes, as pytriton's client sends them, against a server of tiny-chat."""

import logging
import warnings
from importlib.metadata import version

import numpy as np
from pytriton.client import ModelClient
from pytriton.client.exceptions import PyTritonClientInferenceServerError, PyTritonClientTimeoutError

from checks import Checks, base_url, card_prompt, get, run_raw
from nemo_queries import (
    CLASSES, NemoQuery2024, NemoQueryCard, NemoQueryLLM20, NemoQueryLLM22, NemoQueryLLMHF, NemoQueryLLMPyTorch,
    NemoQueryLLMPyTorch24, NemoQueryvLLM, strings, texts,
)

# The client logs what it raises, and warns of its own time limits.
logging.disable(logging.CRITICAL)
warnings.simplefilter("ignore")
URL = base_url()
MODEL = "Nemotron-3-8B-Chat-4K-RLHF"
# The model card's, Hugging Face's two, a file's, and one of NeMo's examples.
SPELLINGS = [
    "Nemotron-3-8B-Chat-4K-RLHF", "Nemotron-3-8B-Chat-4k-RLHF", "nemotron-3-8b-chat-4k-rlhf",
    "Nemotron-3-8B-Chat-4K-RLHF.nemo", "GPT-2B",
]
# Clients before 0.4 look a name up in the index first, so it has to be listed as they spell it.
if tuple(map(int, version("nvidia-pytriton").split(".")[:2])) < (0, 4):
    SPELLINGS = SPELLINGS[:3]
QUESTIONS = ["What is the capital of France?", 'What is "water" in Chinese?', "What is 17 + 25?", 'What is "water" in Russian?']
PROMPTS = [card_prompt(question) for question in QUESTIONS]
GREEDY = {"top_k": 1, "top_p": 0.0, "temperature": 0.1}
checks = Checks(f"pytriton {version('nvidia-pytriton')}")
ANSWERS = [run_raw(prompt)["text"].strip() for prompt in PROMPTS]


def by_row(output):
    """What the model card makes of an output."""
    return [[text.split("<extra_id_1>", 1)[0].strip() for text in row] for row in output]


def the_card():
    """The model card's call, word for word."""
    query = NemoQueryCard("localhost:" + URL.rsplit(":", 1)[1], MODEL)
    output = query.query_llm([PROMPTS[0]], max_output_token=200, top_k=1, top_p=0.0, temperature=0.1)
    checks.equal("the model card's call", by_row(output), [[ANSWERS[0]]])
    checks.equal("its output has shape [1, 1]", output.shape, (1, 1))


def names():
    for name in SPELLINGS:
        output = NemoQueryCard(URL, name).query_llm([PROMPTS[0]], **GREEDY)
        checks.equal(f"the model as {name}", by_row(output), [[ANSWERS[0]]])


def every_class():
    expected = [[answer] for answer in ANSWERS]
    for kind, length in CLASSES:
        def one(kind=kind, length=length):
            found = kind(URL, MODEL).query_llm(PROMPTS, **{length: 200}, **GREEDY)
            checks.equal(f"{kind.__name__}: a batch of {len(PROMPTS)}, two answers not ASCII", by_row(found), expected)
            found = kind(URL, MODEL).query_llm(PROMPTS[:1])
            checks.equal(f"{kind.__name__}: no settings", by_row(found), expected[:1])
            found = kind(URL, MODEL).query_llm(PROMPTS[:1], **{length: 3}, **GREEDY)
            short = run_raw(PROMPTS[0], "--max-tokens", "3")
            checks.equal(f"{kind.__name__}: {length} 3", by_row(found), [[short["text"].strip()]])
        checks.runs(kind.__name__, one)


def stop_words():
    for name, query, length in [
        ("stop_words_list", NemoQuery2024(URL, MODEL), "max_output_token"),
        ("stop_words_list", NemoQueryLLM22(URL, MODEL), "max_output_len"),
        ("end_strings", NemoQueryLLM20(URL, MODEL), "max_output_len"),
        ("end_strings", NemoQueryLLMPyTorch(URL, MODEL), "max_length"),
    ]:
        found = query.query_llm(PROMPTS, **{name: [" is", "= 4", "no such text"], length: 200}, **GREEDY)
        cut = [[answer.split(" is")[0].split("= 4")[0].strip()] for answer in ANSWERS]
        checks.equal(f"{type(query).__name__}: {name} of 3 strings for {len(PROMPTS)} prompts", by_row(found), cut)
        found = query.query_llm(PROMPTS[:1], **{name: ["<extra_id_1>"], length: 200}, **GREEDY)
        checks.equal(f"{type(query).__name__}: {name} with the end of a turn", by_row(found), [[ANSWERS[0]]])


def sampling():
    query = NemoQueryLLM22(URL, MODEL)
    hot = {"max_output_len": 40, "top_k": 50, "top_p": 1.0, "temperature": 3.0}
    first, again, other = (query.query_llm(PROMPTS[:1], random_seed=seed, **hot).tolist() for seed in (7, 7, 8))
    checks.equal("the same random_seed, the same text", first, again)
    checks.that("another random_seed, another text", first != other, first)
    for name, settings in [
        ("top_p 0.0 alone", {"top_p": 0.0}), ("temperature 0.0", {"temperature": 0.0, "top_k": 0, "top_p": 0.0}),
        ("top_k 0", {"top_k": 0, "top_p": 0.0, "temperature": 1.0}), ("top_k 1, temperature 1.0", {"top_k": 1, "temperature": 1.0}),
        ("use_greedy", {"use_greedy": True, "temperature": 2.0}), ("repetition_penalty 1.0", {"repetition_penalty": 1.0}),
    ]:
        found = query.query_llm(PROMPTS[:1], max_output_len=200, **settings)
        checks.equal(f"{name} is greedy", by_row(found), [[ANSWERS[0]]])
    penalty = run_raw(PROMPTS[0], "--repetition-penalty", "1.5")["text"].strip()
    found = query.query_llm(PROMPTS[:1], max_output_len=200, repetition_penalty=1.5)
    checks.equal("repetition_penalty 1.5 is that of aotron run", by_row(found), [[penalty]])
    found = query.query_llm(PROMPTS[:1], max_output_len=200, min_output_len=1, **GREEDY)
    checks.equal("min_output_len, which the class sends as max_output_len", by_row(found), [[ANSWERS[0]]])
    least = run_raw(PROMPTS[1], "--min-tokens", "9", "--max-tokens", "30")["text"].strip()
    found = NemoQueryLLMHF(URL, MODEL).query_llm(PROMPTS[1:2], min_length=9, max_length=30)
    checks.equal("min_length is --min-tokens of aotron run", by_row(found), [[least]])
    exact = run_raw(PROMPTS[1], "--min-tokens", "9", "--max-tokens", "9")["text"].strip()
    found = NemoQueryLLMHF(URL, MODEL).query_llm(PROMPTS[1:2], min_length=9, max_length=9)
    checks.equal("min_length equal to max_length", by_row(found), [[exact]])
    with_bos = run_raw(PROMPTS[0], "--bos")["text"].strip()
    found = NemoQueryLLMHF(URL, MODEL).query_llm(PROMPTS[:1], add_BOS=True, use_greedy=True)
    checks.equal("add_BOS is --bos of aotron run", by_row(found), [[with_bos]])
    found = NemoQueryvLLM(URL, MODEL).query_llm(PROMPTS, max_tokens=200, seed=1, min_tokens=0, temperature=0.0)
    checks.equal("NemoQueryvLLM: temperature 0.0, a seed, min_tokens 0", by_row(found), [[a] for a in ANSWERS])


def chat():
    query = NemoQueryLLMPyTorch24(URL, MODEL)
    conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
    found = query.chat(conversations, max_length=200, top_k=1)
    checks.equal("apply_chat_template: prompts are messages in JSON", by_row(found), [[a] for a in ANSWERS])
    turns = [
        {"role": "user", "content": "My name is Felix."}, {"role": "assistant", "content": "Nice to meet you, Felix!"},
        {"role": "user", "content": "What is my name?"},
    ]
    found = query.chat([turns], max_length=200, top_k=1)
    checks.equal("apply_chat_template: three turns", by_row(found), [["Your name is Felix."]])


def refusals():
    server_error = PyTritonClientInferenceServerError
    newest, torch, hf = NemoQueryLLM22(URL, MODEL), NemoQueryLLMPyTorch24(URL, MODEL), NemoQueryLLMHF(URL, MODEL)
    unsupported = [
        (newest, {"output_generation_logits": True}, "output_generation_logits"),
        (newest, {"output_context_logits": True}, "output_context_logits"),
        (newest, {"task_id": "a"}, "task_id"), (newest, {"lora_uids": ["1"]}, "lora_uids"),
        (newest, {"bad_words_list": ["France"]}, "bad_words_list"),
        (newest, {"no_repeat_ngram_size": 3}, "no_repeat_ngram_size"),
        (hf, {"output_logits": True}, "output_logits"), (hf, {"output_scores": True}, "output_scores"),
    ]
    for query, settings, name in unsupported:
        say = f"{type(query).__name__}: {name} that asks for something is refused by name"
        checks.raises(say, server_error, ["Message:", name], lambda q=query, s=settings: q.query_llm(PROMPTS[:1], **s))
    quiet = {"compute_logprob": False, "all_probs": False, "n_top_logprobs": 0, "echo": False}
    found = torch.query_llm(PROMPTS[:1], max_length=200, **quiet)
    checks.equal("false and zero settings ask for nothing", by_row(found), [[ANSWERS[0]]])
    long = card_prompt("word " * 2000)
    for query, length in [(NemoQueryCard(URL, MODEL), "max_output_token"), (newest, "max_output_len")]:
        say = f"{type(query).__name__}: a prompt that is too long"
        checks.raises(say, server_error, ["Message:", "512"], lambda q=query, n=length: q.query_llm([long], **{n: 10}))
    checks.raises("a batch with one prompt that is too long", server_error, ["512"], lambda: newest.query_llm([PROMPTS[0], long]))
    checks.raises("temperature -1", server_error, ["temperature"], lambda: newest.query_llm(PROMPTS[:1], temperature=-1.0))
    checks.raises("temperature NaN", server_error, ["temperature"], lambda: newest.query_llm(PROMPTS[:1], temperature=np.nan))
    checks.raises("a prompt that is no list of messages", server_error, ["messages"],
                  lambda: torch.query_llm(["hello"], apply_chat_template=True))
    checks.raises("max_output_len -1", server_error, ["Message:"], lambda: newest.query_llm(PROMPTS[:1], max_output_len=-1))
    checks.equal("max_output_len 0: an empty answer", newest.query_llm(PROMPTS[:1], max_output_len=0).tolist(), [[""]])
    found = newest.query_llm(PROMPTS[:1], max_output_len=200, **GREEDY)
    checks.equal("the server answers after all of them", by_row(found), [[ANSWERS[0]]])


def odd_inputs():
    with ModelClient(URL, MODEL, init_timeout_s=20) as client:
        found = client.infer_batch(prompts=np.array([PROMPTS[0].encode()]), max_output_len=np.array([[200]]))
        checks.equal("prompts of shape [1]", by_row(texts(found["outputs"])), [[ANSWERS[0]]])
        found = client.infer_batch(prompts=np.array([[p.encode()] for p in PROMPTS], dtype=object), max_length=np.array([[200]]))
        checks.equal("prompts as objects, one length for all", by_row(texts(found["sentences"])), [[a] for a in ANSWERS])
        found = client.infer_batch(prompts=strings(PROMPTS[:2]), max_tokens=np.array([[200], [2]]))
        short = run_raw(PROMPTS[1], "--max-tokens", "2")["text"].strip()
        checks.equal("a length for each row", by_row(texts(found["outputs"])), [[ANSWERS[0]], [short]])
        found = client.infer_batch(prompts=strings(PROMPTS[:1]), top_k=np.array([[1]], dtype=np.int32),
                                   temperature=np.array([[1.0]], dtype=np.float64))
        checks.equal("integers and floats of other widths", by_row(texts(found["outputs"])), [[ANSWERS[0]]])
        found = client.infer_sample(prompts=np.array([PROMPTS[0].encode()]), max_output_len=np.array([200]))
        checks.equal("infer_sample", texts(found["outputs"]).tolist()[0].strip(), ANSWERS[0])
        accents = card_prompt("Grüße, 水 und вода 🦀 sind Wörter.")
        found = client.infer_batch(prompts=strings([accents]), max_output_len=np.array([[20]]))
        checks.equal("a prompt that is not ASCII", texts(found["outputs"])[0][0].strip(),
                     run_raw(accents, "--max-tokens", "20")["text"].strip())
        checks.equal("outputs and sentences are the same", found["outputs"].tolist(), found["sentences"].tolist())
        checks.equal("the most prompts of a request", client.model_config.max_batch_size >= 64, True)
        many = client.infer_batch(prompts=strings(PROMPTS * 16), max_output_len=np.array([[200]]))
        checks.equal("64 prompts", by_row(texts(many["outputs"])), [[a] for a in ANSWERS] * 16)
    empty = NemoQueryCard(URL, MODEL)
    checks.raises("an empty prompt", PyTritonClientInferenceServerError, ["Message:"], lambda: empty.query_llm([""]))


def other_models():
    """Readiness as this client's version asks for it."""
    status, body = get(f"{URL}/v2/repository/index", {})
    checks.that("the index names the model", status == 200 and '"READY"' in body, (status, body))
    with ModelClient(URL, MODEL, init_timeout_s=20) as client:
        config = client.model_config
        checks.equal("the configuration's name", config.model_name, MODEL)
        # Versions before 0.3 do not know of it.
        checks.that("it is not decoupled", not getattr(config, "decoupled", False), config)
        outputs = [output.name for output in config.outputs]
        checks.equal("its outputs", outputs[:2], ["outputs", "sentences"])
    closed = "http://127.0.0.1:9"
    checks.raises("no server: a time-out, as with Triton", PyTritonClientTimeoutError, [],
                  lambda: ModelClient(closed, MODEL, init_timeout_s=2, lazy_init=False))


for part in (the_card, names, every_class, stop_words, sampling, chat, refusals, odd_inputs, other_models):
    checks.runs(part.__name__, part)
checks.end()
