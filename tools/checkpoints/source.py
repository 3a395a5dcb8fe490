"""Where weights come from, by their Hugging Face names: random numbers, or the files of a Hugging Face folder.

Both give a tensor whole or in blocks of rows, so that one too large for memory can be written as it is made.
"""

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
BLOCK = 1 << 24
"""Elements of a block of rows, or a row more."""


class LayoutError(Exception):
    """A checkpoint that cannot be written as asked."""


@dataclass(frozen=True)
class Model:
    """The sizes of a NemotronForCausalLM."""

    vocab: int
    hidden: int
    ffn: int
    layers: int
    heads: int
    groups: int
    head_dim: int
    rotary: float
    theta: float
    positions: int
    epsilon: float
    tied: bool
    dtype: torch.dtype

    @classmethod
    def of_config(cls, config: dict) -> "Model":
        """From config.json, as transformers 4 or 5 writes it."""
        rope = config.get("rope_parameters") or {}
        heads = config["num_attention_heads"]
        return cls(
            vocab=config["vocab_size"],
            hidden=config["hidden_size"],
            ffn=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            groups=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            rotary=rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 0.5)),
            theta=rope.get("rope_theta", config.get("rope_theta", 10000.0)),
            positions=config["max_position_embeddings"],
            epsilon=config["norm_eps"],
            tied=config["tie_word_embeddings"],
            dtype=getattr(torch, str(config.get("dtype") or config["torch_dtype"]).removeprefix("torch.")),
        )

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor of that Hugging Face name."""
        part = name.removesuffix(".weight").rsplit(".", 1)[-1]
        attention, shared = self.heads * self.head_dim, self.groups * self.head_dim
        matrices = {
            "embed_tokens": (self.vocab, self.hidden),
            "lm_head": (self.vocab, self.hidden),
            "q_proj": (attention, self.hidden),
            "k_proj": (shared, self.hidden),
            "v_proj": (shared, self.hidden),
            "o_proj": (self.hidden, attention),
            "up_proj": (self.ffn, self.hidden),
            "down_proj": (self.hidden, self.ffn),
        }
        return matrices.get(part, (self.hidden,))


def generator(name: str, seed: int) -> torch.Generator:
    """Random numbers that depend on a tensor's name and the seed alone."""
    return torch.Generator().manual_seed(seed * 2**32 + zlib.crc32(name.encode()))


def scaled(name: str, values: torch.Tensor) -> torch.Tensor:
    """Normal random numbers, scaled in place as suits the tensor of that name."""
    if "norm" in name:
        values *= 0.15
        if name.endswith("weight"):
            values = (values.clamp(-0.5, 0.5) * 128).round() / 128
    elif "embed_tokens" in name:
        values *= 0.3
    else:
        gain = 1.5 if "q_proj" in name or "k_proj" in name else 2.0 if "lm_head" in name else 0.5
        values *= gain / values.shape[-1] ** 0.5
    return values


def row_blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Ranges of rows, each but the last a multiple of 16 and none small.

    torch.randn makes the same numbers in such blocks as at once: it works on 16 at a time.
    """
    rows, width = shape[0], max(1, torch.Size(shape[1:]).numel())
    step = max(16, BLOCK // width // 16 * 16)
    start = 0
    while start < rows:
        stop = start + step if rows - start >= 2 * step else rows
        yield start, stop
        start = stop


class RandomSource:
    """Weights that depend on the seed and the tensors' names and sizes alone."""

    def __init__(self, model: Model, seed: int, tokenizer: bytes | None = None):
        self.model, self.seed, self.tokenizer = model, seed, tokenizer

    def blocks(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[torch.Tensor]:
        """Rows start to stop of a tensor, in blocks."""
        shape, numbers = self.model.shape(name), generator(name, self.seed)
        stop = shape[0] if stop is None else stop
        for low, high in row_blocks(shape):
            if low >= stop:
                break
            values = torch.randn((high - low, *shape[1:]), generator=numbers)
            if high > start:
                values = scaled(name, values[max(start - low, 0):stop - low])
                yield values.to(self.model.dtype)

    def tensor(self, name: str) -> torch.Tensor:
        return torch.cat(list(self.blocks(name)))


class FolderSource:
    """The weights of a Hugging Face folder."""

    def __init__(self, folder: Path):
        self.folder, self.seed = folder, 0
        self.model = Model.of_config(json.loads((folder / "config.json").read_text()))
        tokenizer = folder / "tokenizer.model"
        self.tokenizer = tokenizer.read_bytes() if tokenizer.exists() else None
        index = folder / "model.safetensors.index.json"
        self.files = json.loads(index.read_text())["weight_map"] if index.exists() else {}

    def blocks(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[torch.Tensor]:
        """Rows start to stop of a tensor, in blocks."""
        from safetensors import safe_open

        shape = self.model.shape(name)
        stop = shape[0] if stop is None else stop
        with safe_open(self.folder / self.files.get(name, "model.safetensors"), "pt") as file:
            stored = file.get_slice(name)
            if tuple(stored.get_shape()) != shape:
                raise LayoutError(f"{name} is {stored.get_shape()}, by config.json {shape}")
            for low, high in row_blocks((stop - start, *shape[1:])):
                yield stored[start + low:start + high]

    def tensor(self, name: str) -> torch.Tensor:
        return torch.cat(list(self.blocks(name)))


Source = RandomSource | FolderSource
