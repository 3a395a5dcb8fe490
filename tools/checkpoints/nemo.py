"""`.nemo` files: a config, a tokenizer and weights in one of NeMo's layouts, in a folder or a tar archive."""

import contextlib
import gzip
import hashlib
import shutil
import tarfile
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from . import zarr_format
from .megatron import Megatron
from .nemo_config import model_config_yaml
from .source import LayoutError, Source

FORMATS = ("nemo-ckpt", "nemo-zarr", "nemo-torch-dist")
TIME = 1700092800.5  # as most files' times not whole seconds, which makes tarfile write a PAX record for each
WEIGHTS = "model_weights"
STREAMED = 1 << 30
"""Bytes of weights from which a zarr checkpoint is written chunk by chunk."""


@dataclass(frozen=True)
class Options:
    """How a `.nemo` is written."""

    format: str = "nemo-ckpt"
    names: str = "mcore"
    tp: int = 1
    pp: int = 1
    divisible: int = 128
    module_prefix: bool = False
    state_dict_key: bool = False
    views: bool = False
    keep_plans: bool = False
    stacked: bool = True
    zarr_writer: str = "auto"
    unpacked: bool = False
    gzip: bool = False
    gnu: bool = False

    def __post_init__(self) -> None:
        if self.format != "nemo-ckpt":
            if self.names == "legacy":
                raise LayoutError("only Megatron-core's models have distributed checkpoints")
            if self.module_prefix or self.state_dict_key or self.views:
                raise LayoutError("a module prefix, a `state_dict` key and views are for nemo-ckpt")


def write(source: Source, options: Options, path: Path) -> None:
    """Writes the `.nemo` file, or folder."""
    if source.tokenizer is None:
        raise LayoutError("a .nemo has a tokenizer: the folder has no tokenizer.model")
    layout = {"names": options.names, "tp": options.tp, "pp": options.pp, "divisible": options.divisible,
              "stacked": options.stacked}
    megatron = Megatron(source, **layout)
    # NeMo puts a random UUID here.
    artifact = f"{hashlib.md5(source.tokenizer).hexdigest()}_tokenizer.model"
    config = model_config_yaml(
        megatron, options.divisible, artifact, options.names != "legacy", options.module_prefix)
    texts = {"model_config.yaml": config, artifact: source.tokenizer}
    if options.zarr_writer == "stream" or (options.zarr_writer == "auto" and is_large(options, megatron)):
        write_streamed(megatron, texts, options, path)
        return
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        folder = path if options.unpacked else Path(scratch) / "nemo"
        folder.mkdir(parents=True)
        for name, content in texts.items():
            (folder / name).write_bytes(content)
        if options.format == "nemo-ckpt":
            write_ckpt(megatron, options, folder)
        elif options.format == "nemo-torch-dist":
            from . import torch_dist

            torch_dist.write(source, layout, options.keep_plans, folder / WEIGHTS)
        elif options.zarr_writer == "tensorstore":
            zarr_format.write_with_tensorstore(megatron, folder / WEIGHTS)
        else:
            zarr_format.write(megatron, folder / WEIGHTS)
        if not options.unpacked:
            with open_tar(path, options) as tar:
                tar.add(folder, arcname=".", filter=anonymous)


def is_large(options: Options, megatron: Megatron) -> bool:
    elements = sum(torch.Size(array.shape).numel() for array in megatron.arrays())
    return options.format == "nemo-zarr" and elements * megatron.model.dtype.itemsize >= STREAMED


@contextlib.contextmanager
def open_tar(path: Path, options: Options) -> Iterator[tarfile.TarFile]:
    """As NeMo opens it: uncompressed since 2023, gzip before. Python's format is PAX since 3.8, GNU before."""
    format = tarfile.GNU_FORMAT if options.gnu else tarfile.PAX_FORMAT
    if options.gzip:
        with open(path, "wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=int(TIME)) as packed:
            with tarfile.open(fileobj=packed, mode="w:", format=format) as tar:
                yield tar
    else:
        with tarfile.open(path, "w:", format=format, copybufsize=1 << 22) as tar:
            yield tar


def anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without what differs from machine to machine."""
    info.uid = info.gid = 0
    info.uname = info.gname = "root"
    info.mode = 0o755 if info.isdir() else 0o644
    info.mtime = TIME
    return info


def write_ckpt(megatron: Megatron, options: Options, folder: Path) -> None:
    prefix = "model.module." if options.module_prefix else "model."
    for stage in range(megatron.pp):
        for rank in range(megatron.tp):
            state = megatron.state_dict(rank, stage, prefix)
            if options.views:
                state = with_views(state)
            if options.state_dict_key:
                state = {"epoch": 0, "global_step": 1200, "pytorch-lightning_version": "2.0.7", "state_dict": state}
            place = folder / rank_folder(megatron, rank, stage)
            place.mkdir(exist_ok=True)
            torch.save(state, place / f"{WEIGHTS}.ckpt")


def rank_folder(megatron: Megatron, rank: int, stage: int) -> str:
    if megatron.pp > 1:
        return f"tp_rank_{rank:02d}_pp_rank_{stage:03d}"
    return f"mp_rank_{rank:02d}" if megatron.tp > 1 else "."


def with_views(state: OrderedDict) -> OrderedDict:
    """The same values, stored otherwise: matrices column by column, a norm's weight and bias in one storage."""
    viewed = OrderedDict()
    for name, value in state.items():
        if isinstance(value, torch.Tensor) and value.dim() == 2:
            value = value.t().contiguous().t()
        viewed[name] = value
    for name, weight in state.items():
        bias = name.removesuffix("weight") + "bias"
        if name.endswith("weight") and bias in state:
            pair = torch.stack([state[bias], weight])
            viewed[name], viewed[bias] = pair[1], pair[0]
    viewed._metadata = state._metadata
    return viewed


class Blocks:
    """Bytes that come in blocks, read like a file."""

    def __init__(self, blocks: Iterator[bytes]):
        self.blocks, self.rest = blocks, memoryview(b"")

    def read(self, size: int) -> bytes | memoryview:
        if not self.rest:
            self.rest = memoryview(next(self.blocks, b""))
        taken, self.rest = self.rest[:size], self.rest[size:]
        if len(taken) == size:
            return taken
        parts = [bytes(taken)]
        size -= len(taken)
        while size and (block := next(self.blocks, b"")):
            view = memoryview(block)
            parts.append(bytes(view[:size]))
            self.rest = view[size:]
            size -= len(parts[-1])
        return b"".join(parts)


def write_streamed(megatron: Megatron, texts: dict[str, bytes], options: Options, path: Path) -> None:
    """Writes a zarr checkpoint with no more than a few tensors in memory, and no second copy on disk."""
    def files() -> Iterator[zarr_format.Member]:
        for name in sorted([*texts, WEIGHTS]):
            if name in texts:
                yield name, len(texts[name]), iter([texts[name]])
            else:
                yield from ((f"{name}/{inner}", size, blocks) for inner, size, blocks in zarr_format.members(megatron))

    if options.unpacked:
        for name, _, blocks in files():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            with open(path / name, "wb") as file:
                file.writelines(blocks)
        return
    folders: set[str] = set()
    with open_tar(path, options) as tar:
        def add_folder(name: str) -> None:
            if name not in folders:
                folders.add(name)
                info = tarfile.TarInfo(name)
                info.type = tarfile.DIRTYPE
                tar.addfile(anonymous(info))

        add_folder(".")
        for name, size, blocks in files():
            parts = name.split("/")
            for depth in range(1, len(parts)):
                add_folder("./" + "/".join(parts[:depth]))
            info = tarfile.TarInfo(f"./{name}")
            info.size = size
            tar.addfile(anonymous(info), Blocks(blocks))


def remove(path: Path) -> None:
    """Removes an earlier `.nemo` of that name, and no other folder."""
    if path.is_dir():
        if any(path.iterdir()) and not (path / "model_config.yaml").exists():
            raise LayoutError(f"{path} is a folder, and no .nemo")
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
