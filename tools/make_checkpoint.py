#!/usr/bin/env python3
"""Writes a randomly initialised NemotronForCausalLM as a Hugging Face folder with its golden logits, or as a `.nemo`.

    make_checkpoint.py tests/data/shapes/odd --shape odd      # how each shipped folder was made
    make_checkpoint.py /somewhere/mid --shape mid --shards 4  # a model worth timing, 1.9 GB
    make_checkpoint.py /somewhere/chat.nemo --from tests/data/tiny-chat --format nemo-zarr --tp 2
    make_checkpoint.py /somewhere/8b.nemo --shape 8b --format nemo-zarr --tokenizer some.model  # 17 GB, streamed

Needs torch, transformers 5 and safetensors, for a `.nemo` also PyYAML, and for nemo-zarr zarr 2 and ml_dtypes. A named
shape fixes every option below; options given override it. tools/checkpoints/ holds the `.nemo` writers.
The weights depend on --seed and the tensors' names and sizes alone. They are scaled so that attention is uneven and
logits spread over several units, and norm weights w are multiples of 1/128 between -1/2 and 1/2, so that 1 + w is
exact in F32, F16 and BF16 alike.

Golden logits are transformers' own, eager attention in FP32 over the stored weights: golden.safetensors holds
`ids.K` (I64, [tokens]) and `logits.K` (F32, [tokens, vocab]) for K = 0, 1, …; ids.json repeats the ids as lists.
"""

import argparse
import json
from pathlib import Path

import torch

from checkpoints import nemo
from checkpoints.megatron import NAMES
from checkpoints.source import DTYPES, FolderSource, LayoutError, Model, RandomSource
from checkpoints.tokenizer import made_tokenizer

# What every shape starts from. `config` 4 writes config.json as transformers 4 did, 5 as it does now.
BASE = {
    "kv_heads": None, "head_dim": None, "rotary": 0.5, "theta": 10000.0, "positions": 64, "tied": False,
    "dtype": "f32", "shards": 1, "seed": 0, "config": 5, "golden": True,
}
SHAPES = {
    # No size is a multiple of 8; head_dim 13 rotates int(6.5) = 6 dimensions.
    "odd": {"vocab": 131, "hidden": 52, "ffn": 101, "layers": 3, "heads": 4, "head_dim": 13, "dtype": "f32", "seed": 1},
    # Grouped heads whose width is not hidden / heads (6 * 12 = 72), in two shards.
    "gqa": {"vocab": 97, "hidden": 48, "ffn": 80, "layers": 2, "heads": 6, "kv_heads": 2, "head_dim": 12,
            "dtype": "bf16", "seed": 2, "shards": 2},
    # Another base and share of the rotary embedding, said in transformers 4's keys.
    "theta": {"vocab": 150, "hidden": 64, "ffn": 96, "layers": 2, "heads": 4, "theta": 500000.0, "rotary": 0.75,
              "dtype": "f16", "seed": 3, "config": 4},
    # A wide MLP, one key/value head for all, and the head tied to the embedding.
    "wide": {"vocab": 300, "hidden": 80, "ffn": 320, "layers": 2, "heads": 5, "kv_heads": 1, "tied": True,
             "dtype": "bf16", "seed": 4},
    # Large enough to time, small enough to make in a minute.
    "mid": {"vocab": 32000, "hidden": 2048, "ffn": 8192, "layers": 16, "heads": 16, "positions": 4096,
            "dtype": "bf16", "seed": 0, "golden": False},
    # Nemotron-3-8B's sizes, 17 GB.
    "8b": {"vocab": 256000, "hidden": 4096, "ffn": 16384, "layers": 32, "heads": 32, "positions": 4096,
           "dtype": "bf16", "seed": 0, "golden": False, "shards": 36},
}
GOLDEN_TOKENS = (5, 17, 40)


def make_config(options):
    from transformers import NemotronConfig

    return NemotronConfig(
        architectures=["NemotronForCausalLM"],
        vocab_size=options["vocab"],
        hidden_size=options["hidden"],
        intermediate_size=options["ffn"],
        num_hidden_layers=options["layers"],
        num_attention_heads=options["heads"],
        num_key_value_heads=options["kv_heads"] or options["heads"],
        head_dim=options["head_dim"] or options["hidden"] // options["heads"],
        max_position_embeddings=options["positions"],
        rope_parameters={"rope_type": "default", "rope_theta": options["theta"],
                         "partial_rotary_factor": options["rotary"]},
        tie_word_embeddings=options["tied"],
        bos_token_id=2,
        eos_token_id=3,
        dtype=DTYPES[options["dtype"]],
    )


def write_config(config, options, folder):
    from transformers import GenerationConfig

    config.save_pretrained(folder)
    GenerationConfig(bos_token_id=2, eos_token_id=3).save_pretrained(folder)
    if options["config"] == 4:
        path = folder / "config.json"
        keys = json.loads(path.read_text())
        rope = keys.pop("rope_parameters")
        keys |= {"torch_dtype": keys.pop("dtype"), "rope_theta": rope["rope_theta"], "rope_scaling": None,
                 "partial_rotary_factor": rope["partial_rotary_factor"], "transformers_version": "4.44.0"}
        path.write_text(json.dumps(dict(sorted(keys.items())), indent=2) + "\n")


def write_weights(config, options, folder):
    """Makes and writes one shard after the other, so that one shard is the most that is in memory. Gives the names."""
    from transformers import NemotronForCausalLM

    with torch.device("meta"):
        model = NemotronForCausalLM(config)
    names = [name for name in model.state_dict() if not (options["tied"] and name == "lm_head.weight")]
    count = options["shards"]
    weight_map, total = {}, 0
    source = RandomSource(Model.of_config(config.to_dict()), options["seed"])
    for shard in range(count):
        part = names[shard * len(names) // count:(shard + 1) * len(names) // count]
        tensors = {name: source.tensor(name) for name in part}
        single = "model.safetensors"
        file = single if count == 1 else f"model-{shard + 1:05}-of-{count:05}.safetensors"
        save(tensors, folder / file)
        weight_map |= dict.fromkeys(part, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return names


def save(tensors, path):
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)


def write_golden(options, folder):
    from transformers import NemotronForCausalLM

    model, report = NemotronForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    model.eval()
    generator = torch.Generator().manual_seed(options["seed"])
    tensors, lists = {}, []
    for k, tokens in enumerate(GOLDEN_TOKENS):
        ids = torch.randint(0, options["vocab"], (tokens,), generator=generator)
        with torch.inference_mode():
            logits = model(ids[None]).logits[0].float()
        assert logits.isfinite().all()
        print(f"  ids.{k}: {tokens} tokens, logits from {logits.min():.2f} to {logits.max():.2f}, std {logits.std():.2f}")
        tensors |= {f"ids.{k}": ids, f"logits.{k}": logits.contiguous()}
        lists.append(ids.tolist())
    save(tensors, folder / "golden.safetensors")
    (folder / "ids.json").write_text(json.dumps(lists) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder or .nemo to write")
    parser.add_argument("--shape", choices=SHAPES, help="start from a named shape; without one, give all five sizes")
    for size in ("vocab", "hidden", "ffn", "layers", "heads"):
        parser.add_argument(f"--{size}", type=int)
    parser.add_argument("--kv-heads", type=int, help="key and value heads; as many as heads by default")
    parser.add_argument("--head-dim", type=int, help="hidden / heads by default")
    parser.add_argument("--rotary", type=float, help="share of each head that rotates (0.5)")
    parser.add_argument("--theta", type=float, help="base of the rotary frequencies (10000)")
    parser.add_argument("--positions", type=int, help="longest sequence in tokens (64)")
    parser.add_argument("--tied", action=argparse.BooleanOptionalAction, help="share embedding and head")
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--shards", type=int, help="weight files (1)")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--config", type=int, choices=(4, 5), help="transformers version config.json is written as (5)")
    parser.add_argument("--golden", action=argparse.BooleanOptionalAction, help="write golden logits")
    parser.add_argument("--format", choices=("hf", *nemo.FORMATS), default="hf", help="what to write (hf)")
    group = parser.add_argument_group("a .nemo")
    group.add_argument("--from", type=Path, dest="source", metavar="HF_FOLDER",
                       help="a Hugging Face folder's weights and tokenizer.model in place of random ones")
    group.add_argument("--tokenizer", type=Path, help="a SentencePiece model; by default one is made up")
    group.add_argument("--names", choices=NAMES, default="mcore",
                       help="tensor names: NeMo's own, or Megatron-core's with (mcore) or without Transformer Engine")
    group.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks (1)")
    group.add_argument("--pp", type=int, default=1, help="pipeline stages (1)")
    group.add_argument("--make-vocab-divisible", type=int, default=128, dest="divisible", metavar="N",
                       help="pad the vocabulary to a multiple of N times the tensor-parallel ranks (128)")
    group.add_argument("--module-prefix", action="store_true", help="names start with `model.module.`")
    group.add_argument("--state-dict-key", action="store_true", help="the weights lie under the key `state_dict`")
    group.add_argument("--views", action="store_true", help="save weights as strided views and some in one storage")
    group.add_argument("--unstacked", action="store_false", dest="stacked",
                       help="a distributed checkpoint has a tensor for each layer, as with Megatron-core from 0.14")
    group.add_argument("--keep-plans", action="store_true",
                       help="nemo-torch-dist's metadata hold all ranks' plans, as with Megatron-core from 0.11")
    group.add_argument("--zarr-writer", choices=("auto", "zarr", "tensorstore", "stream"), default="auto",
                       help="what writes nemo-zarr; by default the zarr package, from 1 GiB on this script (stream)")
    group.add_argument("--unpacked", action="store_true", help="a folder instead of an archive")
    group.add_argument("--gzip", action="store_true", help="compress the archive")
    group.add_argument("--gnu", action="store_true", help="GNU's tar format instead of PAX")
    arguments = vars(parser.parse_args())
    nemo_options = {field: arguments.pop(field) for field in nemo.Options.__dataclass_fields__}
    folder, shape = arguments.pop("folder"), arguments.pop("shape")
    source, tokenizer = arguments.pop("source"), arguments.pop("tokenizer")
    given = {key: value for key, value in arguments.items() if value is not None}
    options = BASE | SHAPES.get(shape, {}) | given
    absent = [size for size in ("vocab", "hidden", "ffn", "layers", "heads") if size not in options]
    if absent and not source:
        parser.error(f"without --shape, give --{', --'.join(absent)}")
    if nemo_options["format"] == "hf":
        if source:
            parser.error("--from is for a .nemo")
        write_hugging_face(options, folder)
        return
    if source:
        if shape or given:
            parser.error("--from takes every size from its folder")
        weights = FolderSource(source)
        if tokenizer:
            weights.tokenizer = tokenizer.read_bytes()
    else:
        content = tokenizer.read_bytes() if tokenizer else made_tokenizer(options["vocab"])
        weights = RandomSource(Model.of_config(make_config(options).to_dict()), options["seed"], content)
    try:
        nemo.remove(folder)
        nemo.write(weights, nemo.Options(**nemo_options), folder)
    except LayoutError as error:
        parser.error(str(error))


def write_hugging_face(options, folder):
    folder.mkdir(parents=True, exist_ok=True)
    config = make_config(options)
    write_config(config, options, folder)
    write_weights(config, options, folder)
    print(f"{folder}: {sum(file.stat().st_size for file in folder.glob('model*.safetensors'))} bytes of weights")
    if options["golden"]:
        write_golden(options, folder)


if __name__ == "__main__":
    main()
