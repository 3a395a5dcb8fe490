#!/usr/bin/env python3
"""Writes the folders of tests/data/torch_dist: small checkpoints of torch.distributed.checkpoint, saved as Megatron does.

    make_torch_dist_fixtures.py tests/data/torch_dist

Needs torch. expected.json says of each folder which tensors a reader must find: name, dtype, shape, and the elements,
row-major and little-endian, as hexadecimal digits. What is no tensor, and Transformer Engine's _extra_state, is left out.

| folder or file | what |
| --- | --- |
| one-rank | one process; layers stacked in a chunk each, tensors saved whole, objects |
| two-ranks | two processes, tensors split over them; as Megatron leaves its metadata: with the plans of the ranks |
| older.metadata | of one-rank, as torch before 2.3 wrote it |
| megatron-0.15.metadata | of one-rank, in the class that Megatron 0.15 had for it, and in protocol 5, Python 3.14's |
| hostile.metadata | of one-rank, but it would run code in a reader that believes it |
"""

import argparse
import dataclasses
import io
import itertools
import json
import os
import pickle
import shutil
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardedTensorMetadata, TensorProperties
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.planner_helpers import _create_write_items
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard as Split
from torch.distributed.tensor import distribute_tensor

FC1 = "model.decoder.layers.mlp.linear_fc1.weight"
FC2 = "model.decoder.layers.mlp.linear_fc2.weight"
EMBEDDING = "model.embedding.word_embeddings.weight"
NORM = "model.decoder.final_layernorm.weight"
EXTRA = "model.decoder.layers.mlp.linear_fc1._extra_state"


def sharded(whole, fragments, rank, world_size, mine):
    """`whole` cut into a grid of `fragments` along each axis, of which this rank holds those that `mine` says."""
    sizes = [size // count for size, count in zip(whole.shape, fragments)]
    shards, described = [], []
    for index in itertools.product(*map(range, fragments)):
        offsets = [at * size for at, size in zip(index, sizes)]
        holder = rank if mine(index) else (rank + 1) % world_size
        described.append(ShardMetadata(offsets, sizes, f"rank:{holder}/cpu"))
        if mine(index):
            part = whole[tuple(slice(at, at + size) for at, size in zip(offsets, sizes))].contiguous().clone()
            shards.append(Shard.from_tensor_and_offsets(part, offsets, rank))
    properties = TensorProperties(dtype=whole.dtype, layout=whole.layout, memory_format=torch.contiguous_format)
    metadata = ShardedTensorMetadata(described, whole.size(), properties)
    return ShardedTensor._init_from_local_shards_and_global_metadata(shards, metadata)


class Planner(dcp.DefaultSavePlanner):
    """Saves objects of all ranks as they are, and notes in the metadata what Megatron notes."""

    def __init__(self):
        super().__init__(flatten_state_dict=False)

    def create_local_plan(self):
        items = [item for name, value in self.state_dict.items() for item in _create_write_items(name, value)]
        self.plan = SavePlan(items=items)
        return self.plan

    def create_global_plan(self, all_plans):
        plans, metadata = super().create_global_plan(all_plans)
        metadata.mcore_data = {name: {"nd_reformulated_orig_global_shape": None} for name in metadata.state_dict_metadata}
        metadata.all_local_plans = all_plans
        return plans, metadata

    def transform_object(self, write_item, object):
        return object


def save(folder, state, planner=None):
    writer = dcp.FileSystemWriter(folder, sync_files=False)
    # Otherwise random.
    writer.save_id = "00000000-0000-0000-0000-000000000000"
    dcp.save(state, storage_writer=writer, planner=planner)


def weights():
    generator = torch.Generator().manual_seed(11)
    return {
        FC1: torch.randn(2, 4, 3, generator=generator).bfloat16(),
        FC2: torch.randn(2, 3, 4, generator=generator).bfloat16(),
        EMBEDDING: torch.randn(6, 3, generator=generator),
        NORM: torch.randn(3, generator=generator),
    }


def one_rank():
    tensors = {name: tensor for name, tensor in weights().items() if name != FC2} | {
        "transposed": weights()[EMBEDDING].t(),
        "rows": weights()[EMBEDDING][1:4],
        "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
        "empty": torch.empty(0, 3),
        "counts": torch.arange(4),
    }
    stacked = sharded(tensors[FC1], [2, 1, 1], 0, 1, lambda _: True)
    objects = {f"{EXTRA}/shard_0_2": io.BytesIO(b"state"), EXTRA: torch.zeros(3, dtype=torch.uint8), "step": 7}
    save("one-rank", tensors | {FC1: stacked} | objects)
    return tensors


def two_ranks(rank):
    tensors = weights()
    mesh = init_device_mesh("cpu", (2,))
    state = {
        # By rows and by columns, each layer for itself, as tensor parallelism splits them.
        FC1: sharded(tensors[FC1], [2, 2, 1], rank, 2, lambda index: index[1] == rank),
        FC2: sharded(tensors[FC2], [2, 1, 2], rank, 2, lambda index: index[2] == rank),
        EMBEDDING: distribute_tensor(tensors[EMBEDDING], mesh, [Split(0)]),
        f"{EXTRA}/shard_{rank}_2": io.BytesIO(b"state of %d" % rank),
    }
    if rank == 0:
        state[NORM] = tensors[NORM]
    save("two-ranks", state, Planner())
    return tensors


def run(rank, world_size, folder, store):
    os.chdir(folder)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    expected = one_rank() if world_size == 1 else two_ranks(rank)
    if rank == 0:
        write_expected(Path("expected.json"), "one-rank" if world_size == 1 else "two-ranks", expected)
    dist.destroy_process_group()


def raw(tensor):
    """The elements as bytes: row-major, little-endian."""
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist()) if tensor.numel() else b""


def write_expected(path, folder, tensors):
    entries = json.loads(path.read_text()) if path.exists() else {}
    entries[folder] = {
        name: {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape), "hex": raw(tensor).hex()}
        for name, tensor in tensors.items()
    }
    folders = (
        f' "{folder}": {{\n' + ",\n".join(f'  "{name}": {json.dumps(tensor)}' for name, tensor in tensors.items()) + "\n }"
        for folder, tensors in entries.items()
    )
    path.write_text("{\n" + ",\n".join(folders) + "\n}\n")


def megatron_module():
    """Classes with the names of Megatron's, which is not installed."""
    name = "megatron.core.dist_checkpointing.strategies.torch"
    module = sys.modules[name] = types.ModuleType(name)
    for base in (Metadata, SavePlan):
        fields = [("mcore_data", Any, dataclasses.field(default=None))]
        frozen = base.__dataclass_params__.frozen
        made = dataclasses.make_dataclass(f"MCore{base.__name__}", fields, bases=(base,), frozen=frozen)
        made.__module__ = name
        setattr(module, made.__name__, made)
    # Pickling looks a class up by importing its module, and that the packages it is in.
    for package in itertools.accumulate(name.split(".")[:-1], "{}.{}".format):
        sys.modules[package] = types.ModuleType(package)
    return module


def write_variants(folder):
    def metadata():
        return pickle.loads((folder / "one-rank" / ".metadata").read_bytes())

    older = metadata()
    for tensor in older.state_dict_metadata.values():
        if properties := getattr(tensor, "properties", None):
            tensor.properties = TensorProperties(properties.dtype)
    for attribute in ("storage_meta", "version"):
        delattr(older, attribute)
    (folder / "older.metadata").write_bytes(pickle.dumps(older))

    megatron = megatron_module()
    newer = megatron.MCoreMetadata(**vars(metadata()), mcore_data={NORM: {}})
    newer.all_local_plans = [megatron.MCoreSavePlan([], mcore_data={NORM: {}})]
    (folder / "megatron-0.15.metadata").write_bytes(pickle.dumps(newer, 5))

    class Hostile:
        def __reduce__(self):
            return os.system, ("echo executed",)

    hostile = metadata()
    hostile.planner_data = Hostile()
    (folder / "hostile.metadata").write_bytes(pickle.dumps(hostile))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "expected.json").unlink(missing_ok=True)
    for name, world_size in [("one-rank", 1), ("two-ranks", 2)]:
        shutil.rmtree(folder / name, ignore_errors=True)
        with tempfile.TemporaryDirectory() as store:
            torch.multiprocessing.spawn(run, (world_size, folder, f"{store}/store"), world_size)
    write_variants(folder)


if __name__ == "__main__":
    main()
