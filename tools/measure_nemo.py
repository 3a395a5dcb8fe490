#!/usr/bin/env python3
"""Builds packages from a `.nemo` of billions of parameters and writes time and memory as a Markdown table.

    make tensorrt && cargo build --release
    python tools/make_checkpoint.py build/8b.nemo --shape 8b --format nemo-zarr
    python tools/measure_nemo.py build/8b.nemo > nemo-section.md

Beside the build, in the same run and on the same disk, stands what moving the bytes takes by itself: a flushed copy of
the `.nemo` and of the package's weights, and `sha256sum` of each. A copy is made and deleted in pieces where the disk
has no room for it whole, so room for the `.nemo`, the package and one piece is enough.

With --answer it builds a package for the CPU alone, for two sequences of 4,096 tokens, and has it answer a prompt.
"""

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import measure_builds
from measure_builds import folder_bytes, timed
from peak_memory import Sampler

PIECE = 4 << 30
MARGIN = 1 << 30


def forget(path: Path) -> None:
    """Asks the kernel to drop the file from the page cache; it keeps what others have mapped or is not written yet."""
    file = os.open(path, os.O_RDONLY)
    os.fdatasync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


def cached_bytes(path: Path) -> int:
    """Bytes of the file in the page cache."""
    command = ["fincore", "--bytes", "--noheadings", "--output", "RES", str(path)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def copy_seconds(path: Path) -> float:
    """Seconds that a copy of the file to its own folder takes, flushed; the copy is deleted."""
    copy = path.with_name(path.name + ".measured-copy")
    size, seconds = path.stat().st_size, 0.0
    try:
        if shutil.disk_usage(path.parent).free > size + MARGIN:
            return timed(["cp", str(path), str(copy)]) + timed(["sync", "-f", str(copy)])
        for start in range(0, size, PIECE):
            flags = [f"skip={start}", f"count={PIECE}", "iflag=skip_bytes,count_bytes", "bs=4M", "status=none"]
            seconds += timed(["dd", f"if={path}", f"of={copy}", *flags]) + timed(["sync", "-f", str(copy)])
            copy.unlink()
        return seconds
    finally:
        copy.unlink(missing_ok=True)


class Table:
    """Rows of the table, printed as they come."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        print("| step | bytes | cached before | time | private memory, at most |\n| --- | --- | --- | --- | --- |")

    def add(self, step: str, seconds: float, size: int, cached: int, peak: int | None = None) -> None:
        self.seconds[step] = seconds
        memory = "" if peak is None else f"{peak / 1e9:.2f} GB"
        print(f"| {step} | {size / 1e9:.2f} GB | {cached / 1e9:.2f} GB | {seconds:.1f} s | {memory} |", flush=True)

    def cold(self, step: str, path: Path, measure) -> None:
        """Adds a step that reads the file, from as little page cache as may be."""
        forget(path)
        cached = cached_bytes(path)
        print(f"{step} …", file=sys.stderr, flush=True)
        self.add(step, measure(), path.stat().st_size, cached)


def head(nemo: Path, recipe: str) -> str:
    memory = int(re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
    return f"""## A `.nemo` of {nemo.stat().st_size / 1e9:.1f} GB

Made by `tools/measure_nemo.py`, {datetime.date.today()}: `aotron build {nemo.name} --recipe {recipe}` on
{os.cpu_count()} cores of a shared machine ({memory / 1e9:.0f} GB of memory, load {os.getloadavg()[0]:.1f} at the start). Private memory
leaves out mapped files. Before each step the kernel is asked to drop the file that it reads from the page cache;
*cached before* is what stayed. Copies go to the same disk and are flushed, and so is the package.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nemo", type=Path, help="a .nemo archive")
    parser.add_argument("--aotron", type=Path, default=measure_builds.AOTRON)
    parser.add_argument("--recipe", default="cpu,a100", help="what to build for (cpu,a100)")
    parser.add_argument("--output", type=Path, help="the package, deleted at the end (beside the .nemo)")
    parser.add_argument("--answer", metavar="PRECISION", help="build for the CPU in this precision, and answer")
    options = parser.parse_args()
    nemo, output = options.nemo, options.output or options.nemo.with_name("measured-engine")
    measure_builds.AOTRON = options.aotron
    free, needed = shutil.disk_usage(nemo.parent).free, nemo.stat().st_size * len(options.recipe.split(",")) + PIECE
    if free < needed:
        parser.error(f"{nemo.parent} has {free / 1e9:.0f} GB free, {needed / 1e9:.0f} GB are needed")
    try:
        if options.answer:
            answer(nemo, options.answer, output)
        else:
            measure(nemo, options.recipe, output)
    finally:
        shutil.rmtree(output, ignore_errors=True)


def measure(nemo: Path, recipe: str, output: Path) -> None:
    print(head(nemo, recipe))
    table = Table()
    aotron = str(measure_builds.AOTRON)
    table.cold("`aotron inspect`", nemo, lambda: timed([aotron, "inspect", str(nemo)]))
    table.cold("copy of the `.nemo`", nemo, lambda: copy_seconds(nemo))
    table.cold("`sha256sum` of the `.nemo`", nemo, lambda: timed(["sha256sum", str(nemo)]))

    forget(nemo)
    cached = cached_bytes(nemo)
    found = measure_builds.build(nemo, recipe, output)
    table.add("`aotron build`", found["total"], nemo.stat().st_size, cached, found["peak"])
    table.add("flushing the package", timed(["sync", "-f", str(output)]), folder_bytes(output), 0)
    weights = sorted(file for file in (output / "weights").iterdir() if file.is_file())
    for file in weights:
        table.cold(f"copy of `{file.name}`", file, lambda: copy_seconds(file))
        table.cold(f"`sha256sum` of `{file.name}`", file, lambda: timed(["sha256sum", str(file)]))

    stages = "; ".join(f"{name} {' + '.join(f'{seconds:.0f}' for seconds in times)} s"
                       for name, times in found["stages"].items())
    took = table.seconds
    total = took["`aotron build`"] + took["flushing the package"]
    source = took["copy of the `.nemo`"] + took["`sha256sum` of the `.nemo`"]
    target = sum(took[f"copy of `{file.name}`"] + took[f"`sha256sum` of `{file.name}`"] for file in weights)
    print(f"\nThe build's stages: {stages or 'not told'}.\n")
    print("| building and flushing, against | times as long |\n| --- | --- |")
    for what, seconds in [
        ("copying and hashing the `.nemo`", source),
        ("copying and hashing the package's weights", target),
        ("hashing the `.nemo`, copying and hashing the package's weights",
         took["`sha256sum` of the `.nemo`"] + target),
    ]:
        print(f"| {what} ({seconds:.0f} s) | {total / seconds:.2f} |")


PROMPT = "Write a poem on NVIDIA in the style of Shakespeare"
TOKENS = 48


def answer(nemo: Path, precision: str, output: Path) -> None:
    """Builds for the CPU, has the package answer twice (the second time its weights are in the page cache), and counts."""
    aotron = str(measure_builds.AOTRON)
    build = [aotron, "build", str(nemo), "--recipe", f"cpu:{precision}", "--slots", "2", "-o", str(output), "--force"]
    print(f"building for cpu:{precision} …", file=sys.stderr, flush=True)
    build_seconds = timed(build)
    size = folder_bytes(output)
    memory = int(re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
    print(f"""## An answer on the CPU, in {precision}

Made by `tools/measure_nemo.py --answer {precision}`, {datetime.date.today()}, on {os.cpu_count()} cores ({memory / 1e9:.0f} GB of memory): a package
of {size / 1e9:.1f} GB for two sequences of 4,096 tokens, built in {build_seconds:.0f} s, answers the card's example with {TOKENS} tokens (of
random weights, so of no meaning). Private memory holds the KV cache, of which pages count once they are used; the weights
are mapped.

| | load | first token after | prompt | answer | whole | private memory | with mapped weights |
| --- | --- | --- | --- | --- | --- | --- | --- |""")
    for name in ["weights on disk", "weights in memory"]:
        if name == "weights on disk":
            for file in (output / "weights").iterdir():
                forget(file)
        run = [aotron, "run", str(output), "--prompt", PROMPT, "--max-tokens", str(TOKENS), "--min-tokens", str(TOKENS),
               "--format", "json"]
        start = time.perf_counter()
        process = subprocess.Popen(run, stdout=subprocess.PIPE, text=True)
        with Sampler(process) as peak:
            told = json.loads(process.communicate()[0])
        seconds = time.perf_counter() - start
        if process.returncode != 0:
            sys.exit(f"aotron run failed with exit code {process.returncode}")
        timing = told["timings"]
        print(
            f"| {name} | {timing['load_seconds']:.2f} s | {timing['load_seconds'] + timing['prefill_seconds']:.1f} s "
            f"| {told['prompt_tokens']} tokens, {timing['prefill_tokens_per_second']:.1f} a second "
            f"| {told['completion_tokens']} tokens, {timing['decode_tokens_per_second']:.2f} a second | {seconds:.1f} s "
            f"| {peak.private / 1e9:.2f} GB | {peak.resident / 1e9:.1f} GB |",
            flush=True,
        )


if __name__ == "__main__":
    main()
