"""What each NeMo query class sends and reads, through pytriton's own client.

Inputs are arrays of shape [prompts, 1] unless a class sends another one. The classes differ in names, in what they always
send, and in the output that they read; `docs/clients.md` has the table.
"""

import json

import numpy as np
from pytriton.client import ModelClient

INTEGER, FLOAT, FLAG = np.int_, np.single, np.bool_


def strings(texts):
    """[n, 1] of UTF-8 bytes."""
    return np.char.encode(np.array(texts, dtype=str)[..., np.newaxis], "utf-8")


def texts(array):
    return np.char.decode(array.astype("bytes"), "utf-8")


class Query:
    """Sends prompts and settings to one model."""

    types, always, reads = {}, {}, ("outputs",)
    word_lists = ("stop_words_list", "bad_words_list", "end_strings")
    inference_timeout_s = None

    def __init__(self, url, model):
        self.url, self.model = url, model

    def send(self, prompts, **settings):
        """The reply's arrays, by name."""
        prompts = strings(prompts)
        inputs = {"prompts": prompts}
        for name, value in {**self.always, **settings}.items():
            if value is None:
                continue
            inputs[name] = self.input(name, value, prompts.shape)
        limits = {} if self.inference_timeout_s is None else {"inference_timeout_s": self.inference_timeout_s}
        with ModelClient(self.url, self.model, init_timeout_s=20, **limits) as client:
            reply = client.infer_batch(**inputs)
            if client.model_config.outputs[0].dtype not in (bytes, np.bytes_):
                raise AssertionError(f"the first output is {client.model_config.outputs[0]}, not of strings")
            return reply

    def input(self, name, value, shape):
        if name in self.word_lists:
            return strings(value)
        if name == "task_id":
            return np.full((shape[0], 1), np.char.encode(value, "utf-8"))
        if name == "lora_uids":
            return np.full((shape[0], len(value)), np.char.encode(value, "utf-8"))
        return np.full(shape, value, dtype=self.types[name])

    def query_llm(self, prompts, **settings):
        """The texts, [prompts, 1]."""
        reply = self.send(prompts, **settings)
        name = next((name for name in self.reads if name in reply), None)
        return "Unknown output keyword." if name is None else texts(reply[name])


class NemoQueryCard(Query):
    """NemoQuery of 2023-09, which the model card calls."""

    types = {"max_output_token": INTEGER, "top_k": INTEGER, "top_p": FLOAT, "temperature": FLOAT}
    always = {"max_output_token": 512, "top_k": 1, "top_p": 0.0, "temperature": 1.0}


class NemoQuery2024(NemoQueryCard):
    """NemoQuery of 2024-03, and NemoQueryLLM until v2.0.0rc0."""

    types = {**NemoQueryCard.types, "random_seed": INTEGER, "no_repeat_ngram_size": FLOAT}


class NemoQueryLLM20(Query):
    """NemoQueryLLM of v2.0.0."""

    types = {
        "min_output_len": INTEGER, "max_output_len": INTEGER, "top_k": INTEGER, "top_p": FLOAT, "temperature": FLOAT,
        "random_seed": INTEGER, "no_repeat_ngram_size": FLOAT, "use_greedy": FLAG, "add_BOS": FLAG, "all_probs": FLAG,
        "compute_logprob": FLAG, "repetition_penalty": FLOAT, "output_generation_logits": FLAG,
        "output_context_logits": FLAG,
    }
    reads = ("outputs", "sentences")

    def send(self, prompts, **settings):
        if settings.get("min_output_len") is not None:
            # As that class does it.
            settings["min_output_len"] = settings["max_output_len"]
        return super().send(prompts, **settings)


class NemoQueryLLM21(NemoQueryLLM20):
    """NemoQueryLLM of v2.1.0."""

    always = {"output_generation_logits": False}


class NemoQueryLLM22(NemoQueryLLM20):
    """NemoQueryLLM of v2.2.0 and later."""

    always = {"output_generation_logits": False, "output_context_logits": False}


class NemoQueryLLMHF(Query):
    """NemoQueryLLMHF of v2.3.0 and later."""

    types = {
        "use_greedy": FLAG, "temperature": FLOAT, "top_k": INTEGER, "top_p": FLOAT, "repetition_penalty": FLOAT,
        "add_BOS": FLAG, "all_probs": FLAG, "min_length": INTEGER, "max_length": INTEGER, "output_logits": FLAG,
        "output_scores": FLAG,
    }
    reads = ("sentences",)


class NemoQueryLLMPyTorch(NemoQueryLLMHF):
    """NemoQueryLLMPyTorch of v2.0.0."""

    types = {**NemoQueryLLMHF.types, "compute_logprob": FLAG}


class NemoQueryLLMPyTorch24(NemoQueryLLMPyTorch):
    """NemoQueryLLMPyTorch of v2.4.0 and later: with a chat template, a prompt is a list of messages in JSON."""

    types = {
        **NemoQueryLLMPyTorch.types, "apply_chat_template": FLAG, "n_top_logprobs": INTEGER, "echo": FLAG,
    }
    always = {"apply_chat_template": False}
    inference_timeout_s = 600

    def chat(self, conversations, **settings):
        return self.query_llm([json.dumps(messages) for messages in conversations], apply_chat_template=True, **settings)


class NemoQueryvLLM(Query):
    """NemoQueryvLLM of Export-Deploy."""

    types = {
        "max_tokens": INTEGER, "min_tokens": INTEGER, "n_log_probs": INTEGER, "n_prompt_log_probs": INTEGER,
        "seed": INTEGER, "top_k": INTEGER, "top_p": FLOAT, "temperature": FLOAT,
    }
    reads = ("sentences",)


CLASSES = [
    (NemoQueryCard, "max_output_token"), (NemoQuery2024, "max_output_token"), (NemoQueryLLM20, "max_output_len"),
    (NemoQueryLLM21, "max_output_len"), (NemoQueryLLM22, "max_output_len"), (NemoQueryLLMHF, "max_length"),
    (NemoQueryLLMPyTorch, "max_length"), (NemoQueryLLMPyTorch24, "max_length"), (NemoQueryvLLM, "max_tokens"),
]
