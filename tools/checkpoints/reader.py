"""Reads a `.nemo` back to Hugging Face's names with the libraries that NeMo reads with, to check what was written.

It shares nothing with the writers: axes and the order of the fused rows are written down again, as NeMo's own converter
of Nemotron to Hugging Face has them.
"""

import json
import re
import tarfile
import tempfile
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
import yaml

RANK = re.compile(r"(?:mp_rank_(\d+)|tp_rank_(\d+)_pp_rank_(\d+))/model_weights\.ckpt")
LAYER = re.compile(r"model\.(?:language_model\.encoder|decoder)\.layers\.(\d+)\.(.+)")
ENDS = [
    # What a layer's tensor may end with, its Hugging Face name and the axis along which ranks are joined.
    (("query_key_value.weight", "linear_qkv.weight"), "qkv", 0),
    (("dense.weight", "linear_proj.weight"), "self_attn.o_proj.weight", 1),
    (("dense_h_to_4h.weight", "linear_fc1.weight"), "mlp.up_proj.weight", 0),
    (("dense_4h_to_h.weight", "linear_fc2.weight"), "mlp.down_proj.weight", 1),
    (("input_layernorm.weight", "linear_qkv.layer_norm_weight"), "input_layernorm.weight", None),
    (("input_layernorm.bias", "linear_qkv.layer_norm_bias"), "input_layernorm.bias", None),
    (("post_attention_layernorm.weight", "linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
     "post_attention_layernorm.weight", None),
    (("post_attention_layernorm.bias", "linear_fc1.layer_norm_bias", "pre_mlp_layernorm.bias"),
     "post_attention_layernorm.bias", None),
]
OUTER = {
    "word_embeddings.weight": ("model.embed_tokens.weight", 0),
    "final_layernorm.weight": ("model.norm.weight", None),
    "final_layernorm.bias": ("model.norm.bias", None),
    "output_layer.weight": ("lm_head.weight", 0),
}


def read(path: Path, vocab: int) -> dict[str, torch.Tensor]:
    """The weights by Hugging Face names, padding of the vocabulary left out."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = path
        if path.is_file():
            folder = Path(scratch)
            with tarfile.open(path) as tar:
                tar.extractall(folder, filter="data")
        config = yaml.safe_load((folder / "model_config.yaml").read_text())
        artifact = config["tokenizer"]["model"].removeprefix("nemo:")
        if not re.fullmatch(r"[0-9a-f]{32}_tokenizer\.model", artifact) or not (folder / artifact).exists():
            raise ValueError(f"no tokenizer {artifact}")
        if (folder / "model_weights").exists():
            found = unstacked(distributed(folder / "model_weights"), config["num_layers"])
        else:
            found = merged(folder, config)
    return hugging_face(found, config, vocab)


def distributed(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a distributed checkpoint, by the library that Megatron-core reads it with."""
    backend = json.loads((folder / "metadata.json").read_text())["sharded_backend"]
    if backend == "torch_dist":
        from . import torch_dist  # noqa: F401, defines a class that the metadata name

        kinds = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
        state = {name: torch.empty(kind.size, dtype=kind.properties.dtype) for name, kind in kinds.items()
                 if hasattr(kind, "size")}
        dcp.load(state, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
        for name in kinds.keys() - state.keys():
            if not name.split("/")[0].endswith("._extra_state"):
                raise ValueError(f"{name} is no tensor")
        return state
    import tensorstore

    state = {}
    for place in folder.iterdir():
        if (place / ".zarray").exists():
            store = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(place)}}
            values = tensorstore.open(store, open=True).result().read().result()
            if values.dtype.name == "bfloat16":
                state[place.name] = torch.from_numpy(values.astype("float32")).bfloat16()
            else:
                state[place.name] = torch.from_numpy(values)
    return state


def unstacked(state: dict[str, torch.Tensor], layers: int) -> dict[str, tuple[torch.Tensor, ...]]:
    found = {}
    for name, value in state.items():
        if ".layers." in name and not LAYER.fullmatch(name):
            if len(value) != layers:
                raise ValueError(f"{name} has {len(value)} layers")
            for layer, part in enumerate(value):
                found[name.replace(".layers.", f".layers.{layer}.")] = (part,)
        else:
            found[name] = (value,)
    return found


def merged(folder: Path, config: dict) -> dict[str, tuple[torch.Tensor, ...]]:
    """Of each tensor the parts that the tensor-parallel ranks hold, layers numbered through."""
    per_stage = config["num_layers"] // config["pipeline_model_parallel_size"]
    found: dict[str, list[torch.Tensor]] = {}
    for file in sorted(folder.rglob("model_weights.ckpt")):
        match = RANK.fullmatch(str(file.relative_to(folder)))
        stage = int(match[3] or 0) if match else 0
        state = torch.load(file, weights_only=False)
        for name, value in state.get("state_dict", state).items():
            name = name.replace("model.module.", "model.")
            if layer := LAYER.fullmatch(name):
                name = name.replace(f"layers.{layer[1]}.", f"layers.{int(layer[1]) + stage * per_stage}.")
            if not name.endswith(("_extra_state", "inv_freq")):
                found.setdefault(name, []).append(value)
    if wrong := [name for name, parts in found.items() if len(parts) != config["tensor_model_parallel_size"]]:
        raise ValueError(f"not on every rank: {wrong}")
    return {name: tuple(parts) for name, parts in found.items()}


def hugging_face(found: dict[str, tuple[torch.Tensor, ...]], config: dict, vocab: int) -> dict[str, torch.Tensor]:
    weights = {}
    for name, parts in found.items():
        layer = LAYER.fullmatch(name)
        if layer:
            [(target, axis)] = [(target, axis) for ends, target, axis in ENDS
                                if any(layer[2] == end or layer[2].endswith(f".{end}") for end in ends)]
            target = f"model.layers.{layer[1]}.{target}"
        else:
            [(target, axis)] = [value for end, value in OUTER.items() if name.endswith(end)]
        if axis is None:
            if not all(torch.equal(parts[0], part) for part in parts):
                raise ValueError(f"ranks differ on {name}")
            whole = parts[0]
        else:
            whole = torch.cat(parts, axis)
        if target.endswith("qkv"):
            weights |= split_qkv(whole, config, target.removesuffix("qkv"))
        else:
            weights[target] = whole[:vocab] if not layer and axis == 0 else whole
    return weights


def split_qkv(whole: torch.Tensor, config: dict, prefix: str) -> dict[str, torch.Tensor]:
    heads = config["num_attention_heads"]
    groups = config["num_query_groups"] or heads
    per_group = heads // groups
    rows = whole.reshape(heads + 2 * groups, -1, config["hidden_size"])
    query = [at for at in range(len(rows)) if at % (per_group + 2) < per_group]
    picked = {"q": query, "k": range(per_group, len(rows), per_group + 2),
              "v": range(per_group + 1, len(rows), per_group + 2)}
    return {f"{prefix}self_attn.{part}_proj.weight": rows[list(at)].reshape(-1, config["hidden_size"])
            for part, at in picked.items()}
