#!/usr/bin/env python3
"""Builds a checkpoint for a GPU in each precision and writes time and memory of each stage as a table.

    make tensorrt && cargo build --release
    python tools/make_checkpoint.py build/8b --shape 8b
    python tools/measure_builds.py build/8b a100:bf16 a100:int8 a100:int4 > docs/gpu-builds.md

Beside each build, in the same minutes, stands what reading the checkpoint and writing the package's bytes take by
themselves: `sha256sum` of the one, and a copy of the other to the same disk, flushed.
"""

import datetime
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from peak_memory import Sampler

AOTRON = Path("target/release/aotron")
HEAD = """# Building for a GPU, on a machine without one

Made by `tools/measure_builds.py`, {date}, with `{checkpoint}` ({gigabytes:.1f} GB of weights, {parameters}), on {cores} cores
of a shared machine ({memory:.0f} GB, no GPU). Private memory leaves out mapped files: the checkpoint and the package's own
weights. *compiling* is TensorRT's part: the main plan, and the context plan if it is
built; *packing* reads, hashes, converts, quantizes and writes the weights. *disk alone* is
`sha256sum` of the checkpoint and a flushed copy of the package, one after the other.

| build | total | compiling | packing | disk alone | private memory, at most | package | plans |
| --- | --- | --- | --- | --- | --- | --- | --- |"""


def timed(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def folder_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def build(checkpoint: Path, recipe: str, output: Path) -> dict:
    command = [AOTRON, "build", checkpoint, "--recipe", recipe, "-o", output, "--force"]
    start = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    begun: list[tuple[float, str]] = []
    with Sampler(process) as peak:
        for line in process.stderr:
            # A stage says its name once, then how far it is.
            if found := re.match(r"(compiling|checking|packing|calibrating)\b(?!.*( of |step))", line):
                begun.append((time.perf_counter(), found[1]))
            elif line.startswith("error"):
                sys.exit(line)
        code = process.wait()
    end = time.perf_counter()
    if code != 0:
        sys.exit(f"the build of {recipe} failed with exit code {code}")
    stages: dict[str, list[float]] = {}
    for (at, name), (following, _) in zip(begun, [*begun[1:], (end, "")]):
        stages.setdefault(name, []).append(following - at)
    return {"total": end - start, "stages": stages, "peak": peak.private}


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    checkpoint, recipes = Path(sys.argv[1]), sys.argv[2:]
    weights = sorted(checkpoint.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in weights)
    about = subprocess.run([AOTRON, "inspect", checkpoint], check=True, capture_output=True, text=True).stdout
    parameters = re.search(r"([\d.]+ [MBT]?\w* ?parameters|[\d.,]+ \w* ?parameters)", about)
    memory = int(re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
    print(
        HEAD.format(
            date=datetime.date.today(),
            checkpoint=checkpoint.name,
            gigabytes=size / 1e9,
            parameters=parameters[1] if parameters else "parameters unknown",
            cores=os.cpu_count(),
            memory=memory / 1e9,
        )
    )
    output = checkpoint.parent / "measured-engine"
    copy = checkpoint.parent / "measured-copy"
    for recipe in recipes:
        found = build(checkpoint, recipe, output)
        alone = timed(["sha256sum", *map(str, weights)])
        alone += timed(["cp", "-r", str(output), str(copy)]) + timed(["sync", "-f", str(copy)])
        plans = sum(file.stat().st_size for file in (output / "plans").iterdir())
        stage = lambda name: " + ".join(f"{seconds:.0f}" for seconds in found["stages"].get(name, [0.0])) + " s"
        print(
            f"| `{recipe}` | {found['total']:.0f} s | {stage('compiling')} | {stage('packing')} "
            f"| {alone:.0f} s | {found['peak'] / 1e9:.2f} GB | {folder_bytes(output) / 1e9:.1f} GB | {plans / 1e6:.0f} MB |",
            flush=True,
        )
        shutil.rmtree(copy)
        shutil.rmtree(output)


if __name__ == "__main__":
    main()
