#!/usr/bin/env python3
"""Writes the files of tests/data/torch: small checkpoints as torch.save writes them, and what is in them.

    make_torch_fixtures.py tests/data/torch

Needs torch. expected.json says of each file which tensors a reader must find, in order: name, dtype, shape, stride and
offset in elements, and the elements, row-major and little-endian, as hexadecimal digits. The files named hostile-* hold
pickles that would run code in a reader that believes them.
"""

import argparse
import collections
import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import torch


def raw(tensor):
    """The elements as bytes: row-major, little-endian."""
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist()) if tensor.numel() else b""


def described(name, tensor):
    return {
        "name": name,
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "stride": list(tensor.stride()),
        "offset": tensor.storage_offset(),
        "hex": raw(tensor).hex(),
    }


def weights():
    generator = torch.Generator().manual_seed(7)
    return {
        "embedding.weight": torch.randn(6, 4, generator=generator),
        "norm.weight": torch.randn(4, generator=generator),
        "norm.bias": torch.randn(4, generator=generator),
    }


def module_state():
    """What Module.state_dict() makes: an OrderedDict that carries `_metadata`."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    for index, parameter in enumerate(module.parameters()):
        torch.nn.init.constant_(parameter, index + 0.5)
    return module.state_dict()


def views():
    """Tensors that share a storage and do not lie row-major in it."""
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    return {
        "base": base,
        "row": base[2],
        "rows": base[1:3],
        "transposed": base.t(),
        "columns": base[:, 1:5:2],
        "permuted": base.reshape(2, 2, 6).permute(2, 0, 1),
        "expanded": base[0].expand(2, 6),
        "one-row": base[:1].t().t(),
    }


def dtypes():
    values = torch.tensor([[1.5, -2.25, 0.0], [3.0, 65504.0, -0.5]])
    names = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64"]
    return {name: values.clamp(0, 100).to(getattr(torch, name)) if "int" in name else values.to(getattr(torch, name))
            for name in names}


def sizes():
    return {
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0),
        "no-rows": torch.empty(0, 3, dtype=torch.bfloat16),
        "no-columns": torch.empty(3, 0),
        "one": torch.tensor([[[7.0]]]),
    }


def save(path, value, tensors, **options):
    torch.save(value, path, **options)
    return [described(name, tensor) for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)]


def with_zip64_fields(source, target):
    """The same members, every size and offset in ZIP64 extra fields, as in a file over 4 GB."""
    largest = 0xFFFFFFFF
    out, central = io.BytesIO(), b""
    with zipfile.ZipFile(source) as archive:
        for info in archive.infolist():
            data, name = archive.read(info), info.filename.encode()
            offset = out.tell()
            extra = struct.pack("<HHQQ", 1, 16, len(data), len(data))
            fixed = (45, 0x800, 0, 0, 0x21, info.CRC, largest, largest, len(name))
            out.write(struct.pack("<4sHHHHHIIIHH", b"PK\3\4", *fixed, len(extra)) + name + extra + data)
            extra = struct.pack("<HHQQQ", 1, 24, len(data), len(data), offset)
            fields = (*fixed, len(extra), 0, 0, 0, 0, largest)
            central += struct.pack("<4sHHHHHHIIIHHHHHII", b"PK\1\2", 45, *fields) + name + extra
        members, start = len(archive.infolist()), out.tell()
    out.write(central)
    end = out.tell()
    out.write(struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, members, members, len(central), start))
    out.write(struct.pack("<4sIQI", b"PK\6\7", 0, end, 1))
    out.write(struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, largest, largest, 0))
    target.write_bytes(out.getvalue())


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


def hostile(path, function, *arguments, protocol=2):
    """A checkpoint whose pickle calls `function`."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"weight": Calls(function, *arguments)}, protocol))
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)

    plain = weights()
    nested = {"epoch": 3, "loss": 0.25, "state_dict": module_state(), "history": [1, (2, None, True)], "big": 1 << 80}
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in weights().items()}
    extra = collections.OrderedDict(plain)
    extra["norm._extra_state"] = io.BytesIO(b"\x00\xffstate")
    extra["other._extra_state"] = None
    extra["shape"] = plain["embedding.weight"].shape
    extra["dtype"] = torch.bfloat16
    expected = {
        "plain.pt": save(folder / "plain.pt", plain, plain),
        "protocol4.pt": save(folder / "protocol4.pt", extra, extra, pickle_protocol=4),
        "extra.pt": save(folder / "extra.pt", extra, extra),
        "nested.pt": save(folder / "nested.pt", nested, nested["state_dict"]),
        "module.pt": save(folder / "module.pt", module_state(), module_state()),
        "parameters.pt": save(folder / "parameters.pt", parameters, parameters),
        "views.pt": save(folder / "views.pt", views(), views()),
        "dtypes.pt": save(folder / "dtypes.pt", dtypes(), dtypes()),
        "sizes.pt": save(folder / "sizes.pt", sizes(), sizes()),
    }
    with_zip64_fields(folder / "plain.pt", folder / "zip64.pt")
    expected["zip64.pt"] = expected["plain.pt"]
    lines = ",\n".join(
        f' "{name}": [\n' + ",\n".join(f"  {json.dumps(tensor)}" for tensor in tensors) + "\n ]"
        for name, tensors in expected.items()
    )
    (folder / "expected.json").write_text(f"{{\n{lines}\n}}\n")

    torch.save(plain, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save(torch.nn.Linear(2, 2), folder / "hostile-module.pt")
    hostile(folder / "hostile-system.pt", os.system, "echo executed")
    hostile(folder / "hostile-eval.pt", eval, "print('executed')", protocol=4)


if __name__ == "__main__":
    main()
