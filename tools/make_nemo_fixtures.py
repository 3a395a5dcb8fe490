#!/usr/bin/env python3
"""Writes the files of tests/data/nemo: one small random model as a Hugging Face folder and as `.nemo` in every layout.

    make_nemo_fixtures.py tests/data/nemo

Needs what requirements.txt names. Each `.nemo` is read back with the libraries that NeMo reads with and compared with
the folder, and nemo-zarr's streamed writer with the zarr package, byte for byte.
"""

import argparse
import io
import tempfile
import warnings
from pathlib import Path

import sentencepiece
import torch

from checkpoints import nemo, reader
from checkpoints.source import FolderSource
from make_checkpoint import BASE, make_config, write_config, write_weights

# Grouped heads whose width is not hidden / heads; everything that ranks share out divides by 4.
MODEL = BASE | {"vocab": 112, "hidden": 16, "ffn": 24, "layers": 4, "heads": 8, "kv_heads": 4, "head_dim": 4,
                "dtype": "bf16", "seed": 6}
FIXTURES = {
    "ckpt-legacy": {"names": "legacy"},
    "ckpt-mcore": {},
    "ckpt-mcore-local": {"names": "mcore-local", "module_prefix": True},
    "ckpt-state-dict": {"names": "legacy", "module_prefix": True, "state_dict_key": True},
    "ckpt-tp2": {"names": "legacy", "tp": 2},
    "ckpt-tp4": {"tp": 4},
    "ckpt-tp4-padded": {"tp": 4, "divisible": 16, "gzip": True},
    "ckpt-pp2": {"names": "legacy", "pp": 2},
    "ckpt-tp2-pp2": {"tp": 2, "pp": 2, "module_prefix": True},
    "ckpt-gzip": {"names": "legacy", "gzip": True},
    "ckpt-gnu": {"gnu": True},
    "ckpt-views": {"views": True},
    "zarr": {"format": "nemo-zarr", "zarr_writer": "zarr"},
    "zarr-tp2": {"format": "nemo-zarr", "zarr_writer": "tensorstore", "tp": 2, "gnu": True},
    "zarr-tp4-padded": {"format": "nemo-zarr", "zarr_writer": "zarr", "names": "mcore-local", "tp": 4, "divisible": 16,
                        "gnu": True, "gzip": True},
    "torch-dist": {"format": "nemo-torch-dist"},
    "torch-dist-tp2": {"format": "nemo-torch-dist", "keep_plans": True, "tp": 2, "gnu": True},
    "torch-dist-pp2": {"format": "nemo-torch-dist", "names": "mcore-local", "pp": 2},
    "torch-dist-unstacked": {"format": "nemo-torch-dist", "keep_plans": True, "stacked": False, "tp": 2,
                             "gnu": True, "gzip": True},
}
TEXT = """The quick brown fox jumps over the lazy dog. What is the capital of France? Paris is.
System and User ask, the Assistant answers: yes, no, or 0 1 2 3 4 5 6 7 8 9! How do you do? Very well, thank you."""


def tokenizer(vocab: int) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()), model_writer=model, model_type="bpe", vocab_size=vocab,
        character_coverage=1.0, user_defined_symbols=["<extra_id_0>", "<extra_id_1>", "\n"],
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
        pad_id=0, unk_id=1, bos_id=2, eos_id=3, num_threads=1, minloglevel=2)
    return model.getvalue()


def check(path: Path, source: FolderSource, names: list[str]) -> None:
    weights = reader.read(path, source.model.vocab)
    if weights.keys() != set(names):
        raise ValueError(f"{path} and the folder differ in {weights.keys() ^ set(names)}")
    for name in names:
        if weights[name].dtype != source.model.dtype or not torch.equal(weights[name], source.tensor(name)):
            raise ValueError(f"{path} and the folder differ in {name}")


def check_streamed(source: FolderSource) -> None:
    """The streamed writer makes the archive that the zarr package and tarfile make."""
    with tempfile.TemporaryDirectory() as scratch:
        for layout in ({}, {"tp": 4, "divisible": 16}, {"tp": 2, "names": "mcore-local"}):
            made = []
            for writer in ("zarr", "stream"):
                path = Path(scratch) / f"{writer}.nemo"
                options = {"format": "nemo-zarr", "zarr_writer": writer, "divisible": 4} | layout
                nemo.write(source, nemo.Options(**options), path)
                made.append(path.read_bytes())
            if made[0] != made[1]:
                raise ValueError(f"the streamed zarr archive differs: {layout}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)

    reference = folder / "hf"
    reference.mkdir(parents=True, exist_ok=True)
    config = make_config(MODEL)
    write_config(config, MODEL, reference)
    names = write_weights(config, MODEL, reference)
    (reference / "tokenizer.model").write_bytes(tokenizer(MODEL["vocab"]))
    source = FolderSource(reference)
    for name, options in FIXTURES.items():
        path = folder / f"{name}.nemo"
        nemo.remove(path)
        nemo.write(source, nemo.Options(**({"divisible": 4} | options)), path)
        check(path, source, names)
        print(f"{path}: {path.stat().st_size} bytes, read back")
    check_streamed(source)


if __name__ == "__main__":
    main()
