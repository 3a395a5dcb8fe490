"""A model's weights as Megatron holds them: fused, renamed, and cut for tensor- and pipeline-parallel ranks."""

import io
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from .source import LayoutError, Source, generator

# Of each tensor of a layer: its Hugging Face names and the axis that tensor parallelism cuts.
LAYER = {
    "norm1.weight": (("input_layernorm.weight",), None),
    "norm1.bias": (("input_layernorm.bias",), None),
    "qkv": (("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"), 0),
    "o": (("self_attn.o_proj.weight",), 1),
    "norm2.weight": (("post_attention_layernorm.weight",), None),
    "norm2.bias": (("post_attention_layernorm.bias",), None),
    "up": (("mlp.up_proj.weight",), 0),
    "down": (("mlp.down_proj.weight",), 1),
}
OUTER = {
    "embedding": ("model.embed_tokens.weight", 0),
    "norm.weight": ("model.norm.weight", None),
    "norm.bias": ("model.norm.bias", None),
    "head": ("lm_head.weight", 0),
}

MCORE_LAYER = {
    "norm1.weight": "self_attention.linear_qkv.layer_norm_weight",
    "norm1.bias": "self_attention.linear_qkv.layer_norm_bias",
    "qkv": "self_attention.linear_qkv.weight",
    "o": "self_attention.linear_proj.weight",
    "norm2.weight": "mlp.linear_fc1.layer_norm_weight",
    "norm2.bias": "mlp.linear_fc1.layer_norm_bias",
    "up": "mlp.linear_fc1.weight",
    "down": "mlp.linear_fc2.weight",
}
MCORE = {
    "layers": "decoder.layers.",
    "rotary": "rotary_pos_emb.inv_freq",
    "extra": ("self_attention.linear_qkv", "mlp.linear_fc1"),
    "layer": MCORE_LAYER,
    "outer": {
        "embedding": "embedding.word_embeddings.weight",
        "norm.weight": "decoder.final_layernorm.weight",
        "norm.bias": "decoder.final_layernorm.bias",
        "head": "output_layer.weight",
    },
}
NAMES = {
    # NeMo's own GPT model.
    "legacy": {
        "layers": "language_model.encoder.layers.",
        "rotary": "language_model.rotary_pos_emb.inv_freq",
        "extra": (),
        "layer": {
            "norm1.weight": "input_layernorm.weight",
            "norm1.bias": "input_layernorm.bias",
            "qkv": "self_attention.query_key_value.weight",
            "o": "self_attention.dense.weight",
            "norm2.weight": "post_attention_layernorm.weight",
            "norm2.bias": "post_attention_layernorm.bias",
            "up": "mlp.dense_h_to_4h.weight",
            "down": "mlp.dense_4h_to_h.weight",
        },
        "outer": {
            "embedding": "language_model.embedding.word_embeddings.weight",
            "norm.weight": "language_model.encoder.final_layernorm.weight",
            "norm.bias": "language_model.encoder.final_layernorm.bias",
            "head": "language_model.output_layer.weight",
        },
    },
    # Megatron-core over Transformer Engine, whose linear layers hold the norm before them.
    "mcore": MCORE,
    # Megatron-core's own layers.
    "mcore-local": MCORE | {
        "extra": (),
        "layer": MCORE_LAYER | {
            "norm1.weight": "input_layernorm.weight",
            "norm1.bias": "input_layernorm.bias",
            "norm2.weight": "pre_mlp_layernorm.weight",
            "norm2.bias": "pre_mlp_layernorm.bias",
        },
    },
}


@dataclass(frozen=True)
class Array:
    """A tensor of a distributed checkpoint: a grid of equal chunks, each saved by one rank."""

    name: str
    shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]
    owner: Callable[[tuple[int, ...]], tuple[int, int]]
    """The tensor- and pipeline-parallel rank that saves the chunk at these indices of the grid."""
    blocks: Callable[[tuple[int, ...]], Iterator[torch.Tensor]]
    """The chunk's elements in row-major order, in blocks of rows."""

    @property
    def grid(self) -> tuple[int, ...]:
        return tuple(size // chunk for size, chunk in zip(self.shape, self.chunk_shape))

    def indices(self) -> list[tuple[int, ...]]:
        return list(itertools.product(*map(range, self.grid)))


def extra_state(layer: int) -> object:
    """What Transformer Engine's get_extra_state gave over the years when there is no FP8 state."""
    if layer % 3 == 0:
        return io.BytesIO(b"\x80\x02}q\x00.")
    return None if layer % 3 == 1 else torch.empty(0, dtype=torch.uint8)


def fused_qkv(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, groups: int, head_dim: int) -> torch.Tensor:
    """Of each query group all query heads, then the key head, then the value head."""
    parts = [part.view(groups, -1, head_dim, part.shape[-1]) for part in (query, key, value)]
    return torch.cat(parts, 1).view(-1, query.shape[-1])


class Megatron:
    """A source's weights under one parallel layout."""

    def __init__(
        self, source: Source, names: str, tp: int = 1, pp: int = 1, divisible: int = 128, stacked: bool = True
    ):
        self.source, self.model, self.names, self.tp, self.pp = source, source.model, NAMES[names], tp, pp
        self.stacked = stacked
        multiple = divisible * tp
        self.vocab = -(-self.model.vocab // multiple) * multiple
        for size, parts in (("layers", pp), ("groups", tp), ("ffn", tp)):
            if getattr(self.model, size) % parts:
                raise LayoutError(f"{getattr(self.model, size)} {size} cannot be cut in {parts}")
        if self.model.tied and pp > 1:
            raise LayoutError("a tied head with several pipeline stages is not supported")

    def outer_keys(self) -> list[str]:
        return [key for key in OUTER if not (key == "head" and self.model.tied)]

    def layer_tensor(self, key: str, layer: int, rank: int) -> torch.Tensor:
        """A tensor of a layer, as a tensor-parallel rank holds it."""
        names, axis = LAYER[key]
        parts = [self.source.tensor(f"model.layers.{layer}.{name}") for name in names]
        whole = fused_qkv(*parts, self.model.groups, self.model.head_dim) if key == "qkv" else parts[0]
        return whole if axis is None else whole.chunk(self.tp, axis)[rank].clone()

    def outer_blocks(self, key: str, rank: int) -> Iterator[torch.Tensor]:
        """Embedding, head or final norm, as a tensor-parallel rank holds it, in blocks of rows.

        Rows past the vocabulary hold random numbers, as training leaves them.
        """
        name, axis = OUTER[key]
        if axis is None:
            yield self.source.tensor(name)
            return
        rows, vocab = self.vocab // self.tp, self.model.vocab
        start, stop = rank * rows, (rank + 1) * rows
        if start < vocab:
            yield from self.source.blocks(name, start, min(stop, vocab))
        if stop > vocab:
            numbers = generator(f"padding of {name}", self.source.seed)
            padding = torch.randn((self.vocab - vocab, self.model.hidden), generator=numbers).to(self.model.dtype)
            yield padding[max(start - vocab, 0):stop - vocab]

    def state_dict(self, rank: int, stage: int, prefix: str = "model.") -> OrderedDict:
        """What the model on one rank gives as its state: layers numbered from its stage's first."""
        state, layers = OrderedDict(), self.model.layers // self.pp
        first, last = stage == 0, stage == self.pp - 1

        def add_outer(key: str) -> None:
            if key in self.outer_keys():
                state[prefix + self.names["outer"][key]] = torch.cat(list(self.outer_blocks(key, rank)))

        if first:
            add_outer("embedding")
        exponents = torch.arange(0, int(self.model.head_dim * self.model.rotary), 2, dtype=torch.float32)
        frequencies = 1.0 / self.model.theta ** (exponents / int(self.model.head_dim * self.model.rotary))
        state[prefix + self.names["rotary"]] = frequencies
        for layer in range(layers):
            at = f"{prefix}{self.names['layers']}{layer}."
            for key, name in self.names["layer"].items():
                state[at + name] = self.layer_tensor(key, stage * layers + layer, rank)
            for module in self.names["extra"]:
                state[f"{at}{module}._extra_state"] = extra_state(layer)
        if last:
            for key in ("norm.weight", "norm.bias", "head"):
                add_outer(key)
        state._metadata = OrderedDict({"": {"version": 1}, prefix.removesuffix("."): {"version": 1}})
        return state

    def arrays(self, prefix: str = "model.") -> list[Array]:
        """The tensors of a distributed checkpoint, whose layers are stacked on a new first axis if `stacked`."""
        arrays = [self._outer_array(key, prefix) for key in self.outer_keys()]
        if self.stacked:
            return arrays + [self._stacked_array(key, prefix) for key in LAYER]
        return arrays + [
            self._layer_array(key, layer, prefix) for layer in range(self.model.layers) for key in LAYER]

    def _outer_array(self, key: str, prefix: str) -> Array:
        name, axis = OUTER[key]
        tail = self.model.shape(name)[1:]
        rows = self.model.hidden if axis is None else self.vocab
        chunk = rows if axis is None else rows // self.tp
        stage = 0 if key == "embedding" else self.pp - 1
        return Array(
            prefix + self.names["outer"][key], (rows, *tail), (chunk, *tail),
            owner=lambda index: (index[0], stage),
            blocks=lambda index: self.outer_blocks(key, index[0]))

    def _layer_array(self, key: str, layer: int, prefix: str) -> Array:
        """As the stacked one, of one layer."""
        stacked = self._stacked_array(key, prefix)
        return Array(
            f"{prefix}{self.names['layers']}{layer}.{self.names['layer'][key]}",
            stacked.shape[1:], stacked.chunk_shape[1:],
            owner=lambda index: stacked.owner((layer, *index)),
            blocks=lambda index: stacked.blocks((layer, *index)))

    def _stacked_array(self, key: str, prefix: str) -> Array:
        names, axis = LAYER[key]
        shapes = [self.model.shape(name) for name in names]
        shape = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        chunk = tuple(size // self.tp if at == axis else size for at, size in enumerate(shape))
        per_stage = self.model.layers // self.pp

        def rank(index: tuple[int, ...]) -> int:
            return 0 if axis is None else index[1 + axis]

        return Array(
            prefix + self.names["layers"] + self.names["layer"][key], (self.model.layers, *shape), (1, *chunk),
            owner=lambda index: (rank(index), index[0] // per_stage),
            blocks=lambda index: iter([self.layer_tensor(key, index[0], rank(index))]))

    def objects(self, prefix: str = "model.") -> list[tuple[str, int, object]]:
        """The `_extra_state` objects of a distributed checkpoint: name with shard, layer and value."""
        layers, at = self.model.layers, prefix + self.names["layers"]
        return [(f"{at}{module}._extra_state/shard_{layer}_{layers}" if self.stacked else
                 f"{at}{layer}.{module}._extra_state/shard_0_1", layer, extra_state(layer))
                for module in self.names["extra"] for layer in range(layers)]
