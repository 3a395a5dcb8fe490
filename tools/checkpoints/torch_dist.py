"""A distributed checkpoint in Megatron-core's `torch_dist` format, version 1, written by torch.distributed.checkpoint.

Each rank is a process of a gloo group and saves its own shards. As in Megatron-core a tensor is a torch ShardedTensor
of the stacked layers, an `_extra_state` is bytes that torch.save made, and each rank writes two files.
"""

import dataclasses
import io
import json
import os
import sys
import tempfile
import types
import warnings
from pathlib import Path

import torch
import torch.distributed
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardedTensorMetadata, TensorProperties
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan

from .megatron import Array, Megatron
from .source import Source
from .zarr_format import METADATA as ZARR_METADATA
from .zarr_format import chunk

METADATA = ZARR_METADATA | {"sharded_backend": "torch_dist"}


class Writer(dcp.FileSystemWriter):
    """Leaves out what differs from run to run."""

    def storage_meta(self):
        return dataclasses.replace(super().storage_meta(), save_id="00000000-0000-4000-8000-000000000000")


@dataclasses.dataclass(frozen=True)
class MCoreSavePlan(SavePlan):
    """Megatron-core's class of that name, as far as pickles tell."""

    mcore_data: dict | None = None


MCoreSavePlan.__module__ = "megatron.core.dist_checkpointing.strategies.torch"
for module in ("megatron", MCoreSavePlan.__module__):
    sys.modules.setdefault(module, types.ModuleType(module))
sys.modules[MCoreSavePlan.__module__].MCoreSavePlan = MCoreSavePlan


class SavePlanner(DefaultSavePlanner):
    """Saves bytes as they are, and with `keep_plans` all ranks' plans in the metadata, as Megatron-core 0.11 does."""

    def __init__(self, keep_plans: bool):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.keep_plans = keep_plans

    def create_global_plan(self, all_plans):
        plans, metadata = super().create_global_plan(all_plans)
        if self.keep_plans:
            data = [{item.index.fqn: {} for item in plan.items if item.tensor_data} for plan in all_plans]
            metadata.mcore_data = {name: value for part in data for name, value in part.items()}
            metadata.all_local_plans = [MCoreSavePlan(plan.items, None, plan.planner_data, mcore_data=part)
                                        for plan, part in zip(all_plans, data)]
        return plans, metadata

    def transform_object(self, write_item, object):
        return object


def sharded(array: Array, own: list[tuple[int, ...]], megatron: Megatron, rank: int) -> ShardedTensor:
    """This rank's chunks, and where all others are."""
    shards, metadata = [], []
    for index in array.indices():
        offsets = [at * size for at, size in zip(index, array.chunk_shape)]
        owner = global_rank(megatron, *array.owner(index))
        metadata.append(ShardMetadata(offsets, list(array.chunk_shape), f"rank:{owner}/cpu"))
        if index in own:
            shards.append(Shard(chunk(array, index), metadata[-1]))
    properties = TensorProperties(dtype=megatron.model.dtype)
    whole = ShardedTensorMetadata(metadata, torch.Size(array.shape), properties)
    return ShardedTensor._init_from_local_shards_and_global_metadata(shards, whole)


def global_rank(megatron: Megatron, tp_rank: int, stage: int) -> int:
    return stage * megatron.tp + tp_rank


def save_rank(rank: int, source: Source, layout: dict, keep_plans: bool, folder: Path, store: str) -> None:
    """What one process of the job does."""
    torch.set_num_threads(1)  # the threads of the process that this was forked from are not here
    warnings.simplefilter("ignore", FutureWarning)
    megatron = Megatron(source, **layout)
    world = megatron.tp * megatron.pp
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    state: dict[str, object] = {}
    for array in megatron.arrays():
        own = [index for index in array.indices() if global_rank(megatron, *array.owner(index)) == rank]
        if own:
            state[array.name] = sharded(array, own, megatron, rank)
    stage, tp_rank = divmod(rank, megatron.tp)
    layers = megatron.model.layers
    for name, layer, value in megatron.objects():
        if tp_rank == 0 and layer // (layers // megatron.pp) == stage:
            state[name] = content = io.BytesIO()
            torch.save([value], content)
    os.chdir(folder.parent)  # the metadata keep the path
    writer = Writer(folder.name, thread_count=2)
    dcp.save(state, storage_writer=writer, planner=SavePlanner(keep_plans))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def write(source: Source, layout: dict, keep_plans: bool, folder: Path) -> None:
    """Writes the checkpoint; `layout` is what Megatron takes besides the source."""
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        ranks = layout["tp"] * layout["pp"]
        arguments = (source, layout, keep_plans, folder, f"{scratch}/store")
        torch.multiprocessing.start_processes(save_rank, arguments, nprocs=ranks, start_method="fork")
    torch.save({}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(METADATA))
