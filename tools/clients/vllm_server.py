"""A pytest plugin that lets vLLM's tests ask another server, without vLLM and without torch.

    SERVER_URL=http://127.0.0.1:8000 TOKENIZER=tokenizer.json pytest -p vllm_server …

`RemoteOpenAIServer` starts no server but gives clients of the one at SERVER_URL, whose model has to answer to every name in
the tests. `get_tokenizer` loads the file TOKENIZER, with the model card's chat format. Everything else of vLLM and torch can be imported but does
nothing, so tests of vLLM's own code are not to be run.
"""

import importlib.abc
import importlib.machinery
import os
import sys
import types
from unittest.mock import MagicMock

import anthropic
import openai

API_KEY = "none"
CHAT_TEMPLATE = """
{%- set system = messages[0].content if messages[0].role == "system" else "" -%}
<extra_id_0>System
{{ system }}
{% for message in messages if message.role != "system" -%}
<extra_id_1>{{ message.role.capitalize() }}
{{ message.content }}
{% endfor %}
{%- if add_generation_prompt %}<extra_id_1>Assistant
{% endif %}"""


class RemoteOpenAIServer:
    DUMMY_API_KEY = API_KEY

    def __init__(self, model, vllm_serve_args, **options):
        self.url_root = os.environ["SERVER_URL"]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def url_for(self, *parts):
        return "/".join([self.url_root, *parts])

    def get_client(self, **options):
        return openai.OpenAI(base_url=self.url_for("v1"), api_key=API_KEY, max_retries=0, **options)

    def get_async_client(self, **options):
        return openai.AsyncOpenAI(base_url=self.url_for("v1"), api_key=API_KEY, max_retries=0, **options)

    def get_async_client_anthropic(self, **options):
        return anthropic.AsyncAnthropic(base_url=self.url_root, api_key=API_KEY, max_retries=0, **options)


def get_tokenizer(tokenizer_name):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_file=os.environ["TOKENIZER"], chat_template=CHAT_TEMPLATE)


class ModelConfig:
    def __init__(self, **options):
        pass

    def get_vocab_size(self):
        return len(get_tokenizer(None))


class Inert(types.ModuleType):
    """A module of which any name can be imported."""

    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        value = MagicMock(name=f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value


class InertFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    ROOTS = ("vllm", "torch", "pybase64", "fastapi")

    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in self.ROOTS:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return Inert(spec.name)

    def exec_module(self, module):
        if module.__name__ == "vllm.tokenizers":
            module.get_tokenizer = get_tokenizer
        elif module.__name__ == "vllm.config":
            module.ModelConfig = ModelConfig
        elif module.__name__ == "vllm.model_executor.model_loader.weight_utils":
            module.download_weights_from_hf = lambda name, **options: name
        elif module.__name__ == "torch":
            module.long = "int64"
            module.iinfo = lambda kind: types.SimpleNamespace(min=-(2**63), max=2**63 - 1)


sys.meta_path.insert(0, InertFinder())
sys.modules["tests.utils"] = types.ModuleType("tests.utils")
sys.modules["tests.utils"].RemoteOpenAIServer = RemoteOpenAIServer
