#!/usr/bin/env python3
"""Builds tiny-chat from a `.nemo` of every layout and compares with the build of its Hugging Face folder.

    cargo build --release
    python tools/check_nemo.py target/release/aotron tests/data/tiny-chat > nemo-section.md

Needs what requirements.txt names. Of each package it compares the weights, the plans and the tokenizer by SHA-256, and
the answers to the 500 held-out conversations with those of the Hugging Face package. A package equal to one that has
answered, file for file, answers every twentieth conversation. Writes a Markdown section to standard output, progress to
standard error, and exits with 1 if anything differs that should not.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoints import nemo
from checkpoints.source import FolderSource

# tiny-chat has 5 layers and 6 heads, so that 2, 3 and 6 ranks can share a layer and 5 stages the model; its vocabulary
# of 2816 is a multiple of 64 times 1 or 2 ranks, and is padded for 3 or 6.
LAYOUTS = {
    "`torch.save`, NeMo's names": {"names": "legacy"},
    "`torch.save`, Megatron-core's names": {},
    "the same without Transformer Engine, `model.module.`": {"names": "mcore-local", "module_prefix": True},
    "under the key `state_dict`": {"names": "legacy", "module_prefix": True, "state_dict_key": True},
    "strided views": {"views": True},
    "gzip": {"names": "legacy", "gzip": True},
    "GNU tar": {"gnu": True},
    "unpacked": {"names": "legacy", "unpacked": True},
    "TP 2, NeMo's names": {"names": "legacy", "tp": 2},
    "TP 2, Megatron-core's names": {"tp": 2, "module_prefix": True},
    "TP 2, unpacked": {"tp": 2, "unpacked": True},
    "TP 3, padded": {"tp": 3},
    "TP 6, padded, NeMo's names": {"names": "legacy", "tp": 6},
    "PP 5, NeMo's names": {"names": "legacy", "pp": 5},
    "PP 5, Megatron-core's names": {"pp": 5},
    "TP 2, PP 5": {"tp": 2, "pp": 5, "module_prefix": True},
    "zarr": {"format": "nemo-zarr"},
    "zarr, GNU tar, gzip": {"format": "nemo-zarr", "gnu": True, "gzip": True},
    "zarr, unpacked, without Transformer Engine": {"format": "nemo-zarr", "names": "mcore-local", "unpacked": True},
    "zarr, TP 2": {"format": "nemo-zarr", "tp": 2},
    "zarr, TP 2, by tensorstore": {"format": "nemo-zarr", "tp": 2, "zarr_writer": "tensorstore"},
    "zarr, TP 2, PP 5, streamed": {"format": "nemo-zarr", "tp": 2, "pp": 5, "zarr_writer": "stream"},
    "zarr, TP 3, padded": {"format": "nemo-zarr", "tp": 3},
    "torch_dist": {"format": "nemo-torch-dist"},
    "torch_dist, gzip": {"format": "nemo-torch-dist", "gzip": True},
    "torch_dist, unpacked": {"format": "nemo-torch-dist", "names": "mcore-local", "unpacked": True},
    "torch_dist, TP 2, ranks' plans kept": {"format": "nemo-torch-dist", "tp": 2, "keep_plans": True},
    "torch_dist, TP 2, a tensor for each layer": {"format": "nemo-torch-dist", "tp": 2, "stacked": False},
    "torch_dist, PP 5": {"format": "nemo-torch-dist", "pp": 5},
    "torch_dist, TP 3, padded": {"format": "nemo-torch-dist", "tp": 3},
}
DIVISIBLE = 64
SAMPLE = 20


@dataclass(frozen=True)
class Package:
    """A built package: the SHA-256 of its files but for engine.json, which names the checkpoint."""

    folder: Path
    seconds: float
    weights: dict[str, str]
    plans: dict[str, str]
    tokenizer: dict[str, str]

    def files(self) -> tuple:
        return tuple(sorted({**self.weights, **self.plans, **self.tokenizer}.items()))


def digests(folder: Path, pattern: str) -> dict[str, str]:
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(folder.glob(pattern)) if file.is_file()}


def build(aotron: Path, checkpoint: Path, recipe: str, folder: Path) -> Package:
    command = [aotron, "build", checkpoint, "--recipe", recipe, "-o", folder, "--force"]
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    weights, plans, tokenizer = (digests(folder, pattern) for pattern in ("weights/*", "plans/*", "tokenizer*"))
    if not weights or not plans or not tokenizer:
        raise ValueError(f"{folder} lacks weights, plans or a tokenizer")
    return Package(folder, seconds, weights, plans, tokenizer)


def answers(aotron: Path, package: Path, conversations: list[dict], scratch: Path) -> list[list[str]]:
    """What the package says in each conversation, all held in one process of `aotron chat`."""
    lines = []
    for number, conversation in enumerate(conversations):
        texts = [turn["user"] for turn in conversation["turns"]]
        if any("\n" in text or text.startswith("/") for text in [conversation["system"], *texts]):
            raise ValueError(f"conversation {conversation['id']} is not lines that can be piped")
        lines += ["/reset", f"/system {conversation['system']}", *texts, f"/save {scratch / str(number)}.json"]
    subprocess.run(
        [aotron, "chat", package], input="\n".join(lines) + "\n", check=True, capture_output=True, text=True)
    said = []
    for number, conversation in enumerate(conversations):
        file = scratch / f"{number}.json"
        messages = json.loads(file.read_text())
        file.unlink()
        said.append([message["content"] for message in messages if message["role"] == "assistant"])
        if len(said[-1]) != len(conversation["turns"]):
            raise ValueError(f"conversation {conversation['id']} has {len(said[-1])} answers")
    return said


def json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def report(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("aotron", type=Path)
    parser.add_argument("checkpoint", type=Path, help="tests/data/tiny-chat")
    parser.add_argument("--recipe", default="cpu", help="recipe to build for (cpu)")
    parser.add_argument("--only", metavar="TEXT", help="only layouts whose description has this text")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        failures = check(options, Path(scratch))
    if failures:
        sys.exit("these differ: " + "; ".join(failures))


def check(options: argparse.Namespace, scratch: Path) -> list[str]:
    conversations = json_lines(options.checkpoint / "conversations.jsonl")
    reference_texts = [[turn["text"] for turn in answer["turns"]]
                       for answer in json_lines(options.checkpoint / "answers.jsonl")]
    reference = build(options.aotron, options.checkpoint, options.recipe, scratch / "engine")
    expected = answers(options.aotron, reference.folder, conversations, scratch)
    as_transformers = sum(one == other for one, other in zip(expected, reference_texts))
    report(f"Hugging Face: {as_transformers} of {len(expected)} conversations as transformers in FP32 has them")
    print(f"""## Every layout, built and answered

Made by `tools/check_nemo.py`: tiny-chat written as a `.nemo` in each layout, built with `--recipe {options.recipe}`,
and compared with the build of its Hugging Face folder, whose answers equal those of transformers in FP32 in
{as_transformers} of {len(expected)} held-out conversations. Weights and plans are compared by SHA-256. A package whose
weights, plan and tokenizer equal those of an earlier row answers only every twentieth conversation.

| row | layout | size | build | weights | plan | conversations answered alike |
| --- | --- | --- | --- | --- | --- | --- |""")
    source = FolderSource(options.checkpoint)
    failures: list[str] = []
    answered: dict[tuple, int] = {}
    for number, (name, changes) in enumerate(LAYOUTS.items(), 1):
        if options.only and options.only not in name:
            continue
        path = scratch / "tiny-chat.nemo"
        nemo.write(source, nemo.Options(**({"divisible": DIVISIBLE} | changes)), path)
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) or path.stat().st_size
        try:
            package = build(options.aotron, path, options.recipe, scratch / "engine")
            known = answered.get(package.files())
            asked = range(0, len(conversations), SAMPLE) if known else range(len(conversations))
            said = answers(options.aotron, package.folder, [conversations[at] for at in asked], scratch)
        except subprocess.CalledProcessError as error:
            failures.append(name)
            reason = (error.stderr.strip().splitlines() or [str(error)])[-1].replace(str(scratch), "…")
            print(f"| {number} | {name} | {size / 1e6:.1f} MB | {reason} | | | |", flush=True)
            report(f"{name}: {reason}")
            continue
        finally:
            nemo.remove(path)
        answered.setdefault(package.files(), number)
        alike = sum(expected[at] == one for at, one in zip(asked, said))
        is_padded = source.model.vocab % (DIVISIBLE * changes.get("tp", 1)) != 0
        same_weights, same_plans = package.weights == reference.weights, package.plans == reference.plans
        if alike < len(said) or not (is_padded or (same_weights and same_plans)):
            failures.append(name)
        row = [
            str(number), name, f"{size / 1e6:.1f} MB", f"{package.seconds:.2f} s",
            "equal" if same_weights else "padded" if is_padded else "**differ**",
            "equal" if same_plans else "padded" if is_padded else "**differs**",
            f"{alike} of {len(said)}" + (f", files as in row {known}" if known else ""),
        ]
        print(f"| {' | '.join(row)} |", flush=True)
        report(f"{name}: weights {row[4]}, plan {row[5]}, {row[6]}")
    return failures


if __name__ == "__main__":
    main()
