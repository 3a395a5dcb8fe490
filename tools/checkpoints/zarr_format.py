"""A distributed checkpoint in Megatron-core's `zarr` format, version 1.

`write` uses the zarr package, 2.x, the way Megatron-core does, and `write_with_tensorstore` the library that
Megatron-core reads with. `members` makes the same files as `write` without either, one chunk after the other, for models
larger than memory.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from .megatron import Array, Megatron

METADATA = {
    "sharded_backend": "zarr", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1,
}
ZARR_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "<f2", torch.float32: "<f4"}


def numpy_of(tensor: torch.Tensor):
    """The tensor in numpy, BF16 too."""
    import ml_dtypes

    return tensor.float().numpy().astype(ml_dtypes.bfloat16) if tensor.dtype == torch.bfloat16 else tensor.numpy()


def raw(tensor: torch.Tensor) -> bytes:
    """The elements, row-major and little-endian."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def saved(value: object, name: str) -> bytes:
    """The file of that name that torch.save writes; the name without its ending is that of a folder in it."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / name
        torch.save(value, path)
        return path.read_bytes()


def chunk(array: Array, index: tuple[int, ...]) -> torch.Tensor:
    return torch.cat(list(array.blocks(index))).view(array.chunk_shape)


def region(array: Array, index: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(at * size, (at + 1) * size) for at, size in zip(index, array.chunk_shape))


def write(megatron: Megatron, folder: Path) -> None:
    """Writes with the zarr package, which does not know bfloat16: it stores raw pairs of bytes, renamed afterwards."""
    import ml_dtypes
    import numpy
    import zarr

    folder.mkdir(parents=True)
    for array in megatron.arrays():
        is_bf16 = megatron.model.dtype == torch.bfloat16
        dtype = ml_dtypes.bfloat16 if is_bf16 else ZARR_DTYPES[megatron.model.dtype]
        stored = zarr.create(
            array.shape, dtype=dtype, store=folder / array.name, chunks=array.chunk_shape, compressor=None,
            fill_value=None, write_empty_chunks=True)
        if is_bf16:
            stored._dtype = numpy.dtype(dtype)
            stored.store[".zarray"] = stored.store[".zarray"].replace(b"<V2", b"bfloat16")
        for index in array.indices():
            stored[region(array, index)] = numpy_of(chunk(array, index))
    write_rest(megatron, folder)


def write_with_tensorstore(megatron: Megatron, folder: Path) -> None:
    import tensorstore

    folder.mkdir(parents=True)
    for array in megatron.arrays():
        stored = tensorstore.open(
            {
                "driver": "zarr",
                "kvstore": {"driver": "file", "path": str(folder / array.name)},
                "metadata": {
                    "shape": array.shape, "chunks": array.chunk_shape, "dtype": ZARR_DTYPES[megatron.model.dtype],
                    "compressor": None, "fill_value": None, "filters": None, "order": "C", "zarr_format": 2,
                },
            },
            create=True,
        ).result()
        for index in array.indices():
            stored[region(array, index)].write(numpy_of(chunk(array, index))).result()
    write_rest(megatron, folder)


def write_rest(megatron: Megatron, folder: Path) -> None:
    for name, content in rest(megatron).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def rest(megatron: Megatron) -> dict[str, bytes]:
    """What is not a tensor."""
    files = {"common.pt": saved({}, "common.pt"), "metadata.json": json.dumps(METADATA).encode()}
    for name, _, value in megatron.objects():
        files[f"{name}.pt"] = saved(value, f"{name.split('/')[1]}.pt")
    return files


def zarray(array: Array, dtype: torch.dtype) -> bytes:
    """`.zarray` as the zarr package writes it."""
    fields = {
        "chunks": array.chunk_shape, "compressor": None, "dtype": ZARR_DTYPES[dtype], "fill_value": None,
        "filters": None, "order": "C", "shape": array.shape, "zarr_format": 2,
    }
    return json.dumps(fields, indent=4, sort_keys=True).encode()


Member = tuple[str, int, Iterator[bytes]]
"""A file: its name, its size, and its bytes in blocks, made as they are asked for."""


def members(megatron: Megatron) -> Iterator[Member]:
    """Every file of the checkpoint, in the order of a folder listed by name."""
    files: list[tuple[tuple[str, ...], int, object]] = []
    for name, content in rest(megatron).items():
        files.append((tuple(name.split("/")), len(content), content))
    for array in megatron.arrays():
        zarr_json = zarray(array, megatron.model.dtype)
        files.append(((array.name, ".zarray"), len(zarr_json), zarr_json))
        size = torch.Size(array.chunk_shape).numel() * megatron.model.dtype.itemsize
        files += [((array.name, ".".join(map(str, index))), size, (array, index)) for index in array.indices()]
    for path, size, content in sorted(files, key=lambda file: file[0]):
        if isinstance(content, bytes):
            yield "/".join(path), size, iter([content])
        else:
            array, index = content
            yield "/".join(path), size, (raw(block) for block in array.blocks(index))
