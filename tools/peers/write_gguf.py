#!/usr/bin/env python3
"""Writes a GGUF, which llama.cpp runs, from a Hugging Face folder with a NemotronForCausalLM and a tokenizer.model.

    write_gguf.py tests/data/tiny-chat tiny.gguf
    write_gguf.py MID mid-q4_0.gguf --type q4_0 --quantizer BUILD/bin/llama-quantize

Needs what requirements.txt beside it lists, not torch. Matrices are stored as BF16, rounded to nearest if the checkpoint
has another type; norms as FP32 with weight + 1, since llama.cpp's LayerNorm multiplies by the weight as it is. The rows
of the query and key projections stay in their order: for this architecture llama.cpp rotates halves of a head, as
transformers does.

Q8_0 and Q4_0 are made by llama-quantize, which build_llama.sh builds: Q4_0 has the head in Q6_K (in Q8_0 where the
hidden size is no multiple of 256), all other matrices and the embedding in Q4_0; Q8_0 has all of them in Q8_0.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
from safetensors import safe_open
from sentencepiece import sentencepiece_model_pb2

LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OTHER_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


class UnsupportedError(Exception):
    """A checkpoint of which no GGUF is written."""


def gguf_name(name):
    """llama.cpp's name of a tensor, such as blk.3.attn_q.weight."""
    stem, _, kind = name.rpartition(".")
    if stem in OTHER_NAMES:
        return f"{OTHER_NAMES[stem]}.{kind}"
    parts = stem.split(".", 3)
    if parts[:2] == ["model", "layers"] and len(parts) == 4 and parts[3] in LAYER_NAMES:
        return f"blk.{int(parts[2])}.{LAYER_NAMES[parts[3]]}.{kind}"
    raise UnsupportedError(f"llama.cpp's nemotron has no tensor for {name}")


def tensors(folder):
    """Names and values of all tensors, one after the other."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise UnsupportedError(f"{folder} has no model*.safetensors")
    for file in files:
        with safe_open(file, "np") as opened:
            for name in opened.keys():
                yield name, opened.get_tensor(name)


def add_tensors(writer, folder, tied):
    """Adds all tensors; with tied embeddings the head is a copy of the embedding, which llama.cpp asks for."""
    for name, values in tensors(folder):
        target = gguf_name(name)
        if values.ndim == 1:
            values = values.astype(np.float32)
            writer.add_tensor(target, values + 1 if name.endswith("norm.weight") else values)
            continue
        stored = values.astype(ml_dtypes.bfloat16, copy=False).view(np.uint16)
        writer.add_tensor(target, stored, raw_dtype=gguf.GGMLQuantizationType.BF16)
        if tied and target == "token_embd.weight":
            writer.add_tensor("output.weight", stored, raw_dtype=gguf.GGMLQuantizationType.BF16)


def add_sizes(writer, config):
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or hidden // heads
    if heads * head_dim != hidden:
        raise UnsupportedError(f"llama.cpp's nemotron needs heads * head_dim = hidden, not {heads} * {head_dim} = {hidden}")
    rope = config.get("rope_parameters") or config
    if rope.get("rope_type", "default") != "default" or config.get("rope_scaling"):
        raise UnsupportedError("only a rotary embedding without scaling is written")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_layer_norm_eps(config["norm_eps"])
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    writer.add_rope_dimension_count(int(rope.get("partial_rotary_factor", 0.5) * head_dim))
    writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)


def add_tokenizer(writer, folder, config):
    """The pieces of tokenizer.model, and unused ones up to the vocabulary's size."""
    path = folder / "tokenizer.model"
    if not path.exists():
        raise UnsupportedError(f"{folder} has no tokenizer.model")
    model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    size = config["vocab_size"]
    if len(model.pieces) > size:
        raise UnsupportedError(f"{path} has {len(model.pieces)} pieces for a vocabulary of {size}")
    if model.trainer_spec.model_type != sentencepiece_model_pb2.TrainerSpec.BPE:
        raise UnsupportedError(f"{path} is not of the BPE type, which is the one that llama.cpp's `llama` tokenizer encodes")
    padding = range(len(model.pieces), size)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([piece.piece.encode() for piece in model.pieces] + [f"[PAD{k}]".encode() for k in padding])
    writer.add_token_scores([piece.score for piece in model.pieces] + [-10000.0] * len(padding))
    # Both formats number the types of pieces alike.
    writer.add_token_types([piece.type for piece in model.pieces] + [gguf.TokenType.UNUSED] * len(padding))
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_unk_token_id(model.trainer_spec.unk_id)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(model.normalizer_spec.add_dummy_prefix)
    settings = folder / "tokenizer_config.json"
    template = json.loads(settings.read_text()).get("chat_template") if settings.exists() else None
    if isinstance(template, str):
        writer.add_chat_template(template)


def write_bf16(folder, out):
    config = json.loads((folder / "config.json").read_text())
    if config.get("architectures") != ["NemotronForCausalLM"]:
        raise UnsupportedError(f"{folder} is of {config.get('architectures')}, not of NemotronForCausalLM")
    writer = gguf.GGUFWriter(out, "nemotron")
    writer.add_name(folder.name)
    add_sizes(writer, config)
    add_tokenizer(writer, folder, config)
    add_tensors(writer, folder, config.get("tie_word_embeddings", False))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="the Hugging Face folder")
    parser.add_argument("out", type=Path, help="the file to write")
    parser.add_argument("--type", choices=("bf16", "q8_0", "q4_0"), default="bf16", help="type of the matrices (bf16)")
    parser.add_argument("--quantizer", type=Path, help="llama-quantize, for the types other than bf16")
    arguments = parser.parse_args()
    if arguments.type != "bf16" and not arguments.quantizer:
        parser.error(f"--type {arguments.type} needs --quantizer, the path of llama-quantize")
    try:
        if arguments.type == "bf16":
            write_bf16(arguments.checkpoint, arguments.out)
            return
        with tempfile.TemporaryDirectory(dir=arguments.out.parent) as scratch:
            whole = Path(scratch) / "bf16.gguf"
            write_bf16(arguments.checkpoint, whole)
            subprocess.run([arguments.quantizer, whole, arguments.out, arguments.type], check=True)
    except (UnsupportedError, OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"{arguments.out} is not written: {error}")


if __name__ == "__main__":
    main()
