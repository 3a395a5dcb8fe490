"""checkpoint.py FOLDER SHAPE: a Hugging Face folder of random BF16 weights, for timing. Needs Python and numpy alone.

The values are those of one block of normal numbers, over and over: fine to time, of no use to judge answers by. Streamed, so
that the 17 GB of `8b` need no memory."""

import json
import sys
from pathlib import Path

import numpy

# vocabulary, hidden size, MLP size, layers, heads, positions
SHAPES = {
    "tiny": (512, 128, 256, 2, 4, 512),
    "small": (32000, 1024, 4096, 8, 8, 4096),
    "mid": (32000, 2048, 8192, 16, 16, 4096),
    "8b": (256000, 4096, 16384, 32, 32, 4096),
}
SHARD_BYTES = 4 << 30


def config_of(shape):
    vocabulary, hidden, inner, layers, heads, positions = SHAPES[shape]
    return {
        "architectures": ["NemotronForCausalLM"], "model_type": "nemotron", "hidden_act": "relu2", "dtype": "bfloat16",
        "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": hidden // heads, "norm_eps": 1e-05,
        "max_position_embeddings": positions, "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
        "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": None, "use_cache": True, "initializer_range": 0.02,
        "attention_dropout": 0.0,
        "rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 10000.0, "rope_type": "default"},
    }  # fmt: skip


def tensors_of(shape):
    """Name, shape and scale of every weight; a scale of 0 is a norm's weight."""
    vocabulary, hidden, inner, layers, _, _ = SHAPES[shape]
    yield "model.embed_tokens.weight", (vocabulary, hidden), 1.0
    for layer in range(layers):
        at = f"model.layers.{layer}."
        for name in "qkvo":
            yield f"{at}self_attn.{name}_proj.weight", (hidden, hidden), hidden**-0.5
        yield f"{at}mlp.up_proj.weight", (inner, hidden), hidden**-0.5
        yield f"{at}mlp.down_proj.weight", (hidden, inner), inner**-0.5
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{at}{norm}.weight", (hidden,), 0.0
            yield f"{at}{norm}.bias", (hidden,), 0.0
    yield "model.norm.weight", (hidden,), 0.0
    yield "model.norm.bias", (hidden,), 0.0
    yield "lm_head.weight", (vocabulary, hidden), 3 * hidden**-0.5


def bf16(values):
    bits = values.astype(numpy.float32).view(numpy.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(numpy.uint16)


def write_shard(path, tensors, normal):
    header, offset = {}, 0
    for name, shape, _ in tensors:
        size = 2 * int(numpy.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, shape, scale in tensors:
            block = bf16(normal * scale)
            left = int(numpy.prod(shape))
            while left > 0:
                part = block[:left]
                file.write(part.tobytes())
                left -= len(part)


def main():
    folder, shape = Path(sys.argv[1]), sys.argv[2]
    folder.mkdir(parents=True, exist_ok=True)
    normal = numpy.random.default_rng(0).standard_normal(1 << 22).astype(numpy.float32)
    shards, size = [[]], 0
    for tensor in tensors_of(shape):
        bytes_of = 2 * int(numpy.prod(tensor[1]))
        if size + bytes_of > SHARD_BYTES and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += bytes_of
    names = [f"model-{k + 1:05}-of-{len(shards):05}.safetensors" for k in range(len(shards))]
    for name, tensors in zip(names, shards):
        write_shard(folder / name, tensors, normal)
    where = {tensor[0]: name for name, tensors in zip(names, shards) for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    # Last: a folder with a config is whole.
    (folder / "config.json").write_text(json.dumps(config_of(shape), indent=1))
    print(json.dumps({"shape": shape, "bytes": sum((folder / name).stat().st_size for name in names)}))


if __name__ == "__main__":
    main()
