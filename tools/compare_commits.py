#!/usr/bin/env python3
"""Logits of two commits, compared bit for bit: every CPU precision, every instruction set this machine has.

    python3 tools/compare_commits.py BASE             # BASE beside the files of this working tree
    python3 tools/compare_commits.py BASE --new HEAD
    python3 tools/compare_commits.py BASE --base-binary PATH --new-binary PATH    # builds nothing

Both programs build a package from tiny-chat and from each checkpoint in tests/data/shapes, then `aotron score --logits`
runs over the same ids: the 500 conversations of tiny-chat with transformers' answers, random ids for the shapes, and
short lists for the kernels that take one row or a few. The instruction set is named by AOTRON_CPU. A commit from before
that variable is built from a copy of its sources in which `Isa::detect` obeys it; a binary that does not obey it
is an error, since every set would silently be the same one.

One line for each model, precision and set. The exit status is 1 if anything differs or nothing was compared.
Needs Python alone; built programs are kept in --target (default: a temporary folder).
"""

import argparse
import hashlib
import json
import mmap
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PRECISIONS = ["f32", "bf16", "int8", "int4", "fp8", "w8a8"]

# The features that each set asks of a machine, as the kernel of Linux names them.
AVX2 = {"avx2", "fma"}
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
VNNI = AVX512 | {"avx512_vnni"}
SETS = {
    "portable": set(),
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512-vnni": VNNI,
    "avx512-bf16": VNNI | {"avx512_bf16"},
}
# The set that a commit which does not know a name is run on.
OLDER = {"avx512-vnni": "avx512"}

# How `Isa::detect` took its set before AOTRON_CPU, and how it takes it in the copy that is built here.
DETECT = "Isa::available().into_iter().max().unwrap_or(Isa(Level::Portable))"
DETECT_BY_NAME = """match std::env::var("AOTRON_CPU") {
            Ok(name) => Isa::by_name(&name).expect("AOTRON_CPU names a set this machine has"),
            Err(_) => Isa::available().into_iter().max().unwrap_or(Isa(Level::Portable)),
        }"""


def run(command: list, **options) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in command], check=True, **options)


def build_commit(commit: str | None, work: Path, target: Path, name: str) -> Path:
    """The release program of a commit, or of this working tree where there is none."""
    tree = REPOSITORY
    if commit is not None:
        tree = work / name
        run(["git", "-C", REPOSITORY, "worktree", "add", "--quiet", "--detach", "--force", tree, commit])
    try:
        if commit is not None:
            isa = tree / "src/backend/cpu/kernels/isa.rs"
            source = isa.read_text() if isa.exists() else ""
            if DETECT in source and "AOTRON_CPU" not in source:
                isa.write_text(source.replace(DETECT, DETECT_BY_NAME))
        print(f"building {commit or 'this working tree'} …", file=sys.stderr, flush=True)
        # Both trees are the same package to cargo, which would take one's program for the other's if its files are older.
        run(["cargo", "clean", "--quiet", "--release", "--package", "aotron", "--target-dir", target], cwd=tree)
        run(["cargo", "build", "--release", "--locked", "--bin", "aotron", "--target-dir", target], cwd=tree)
        program = work / f"aotron-{name}"
        shutil.copy2(target / "release" / "aotron", program)
        return program
    finally:
        if commit is not None:
            run(["git", "-C", REPOSITORY, "worktree", "remove", "--force", tree])


def sets_here() -> list[str]:
    flags: set[str] = set()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            flags = set(line.split(":", 1)[1].split())
            break
    return [name for name, needed in SETS.items() if needed <= flags]


def environment(cpu: str) -> dict[str, str]:
    return {**os.environ, "AOTRON_CPU": cpu}


def known_sets(program: Path, name: str, sets: list[str], ids: Path, work: Path) -> dict[str, str]:
    """The set that the program is run on for each of `sets`: an older one where it does not know the name."""
    package = work / "package"
    build = [program, "build", REPOSITORY / "tests/data/shapes/odd", "--recipe", "cpu", "-o", package, "--force"]
    run(build, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def takes(cpu: str) -> bool:
        command = [str(program), "score", str(package), "--ids", str(ids)]
        return subprocess.run(command, env=environment(cpu), capture_output=True).returncode == 0

    if takes("no-such-set"):
        sys.exit(f"the {name} program {program} does not obey AOTRON_CPU")
    chosen = {cpu: cpu if takes(cpu) else OLDER.get(cpu, cpu) for cpu in sets}
    for cpu, older in chosen.items():
        if cpu != older:
            print(f"{name} does not know {cpu}: it runs on {older}", flush=True)
    return chosen


def conversations(limit: int | None) -> list[list[int]]:
    """The ids of every conversation of tiny-chat: the last turn's prompt holds all turns before it."""
    lines = (REPOSITORY / "tests/data/tiny-chat/answers.jsonl").read_text().splitlines()
    turns = [json.loads(line)["turns"][-1] for line in lines]
    lists = [turn["prompt_ids"] + turn["token_ids"] for turn in turns]
    return lists[:limit] + [lists[0][:length] for length in range(1, 9)]


def random_lists(config: Path, seed: int) -> list[list[int]]:
    """Lists of many lengths, the longest as long as the model was trained for."""
    model = json.loads(config.read_text())
    longest, vocabulary = model["max_position_embeddings"], model["vocab_size"]
    draw = random.Random(seed)
    lengths = list(range(1, 18)) + [31, 32, 33, longest - 1, longest] + [draw.randint(1, longest) for _ in range(40)]
    return [[draw.randrange(vocabulary) for _ in range(length)] for length in lengths]


class Logits:
    """A file that `aotron score --logits` wrote: rows of F32 for each list of ids."""

    def __init__(self, path: Path):
        with path.open("rb") as file:
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        length = struct.unpack("<Q", self.bytes[:8])[0]
        self.start = 8 + length
        self.tensors = json.loads(self.bytes[8 : self.start])

    def tensor(self, index: int) -> tuple[list[int], memoryview]:
        info = self.tensors[f"logits.{index}"]
        first, end = info["data_offsets"]
        return info["shape"], memoryview(self.bytes)[self.start + first : self.start + end]


def first_difference(base: Logits, new: Logits, lists: list[list[int]]) -> tuple[int, str | None]:
    """The rows that were compared, and where they first differ."""
    rows = 0
    for index, ids in enumerate(lists):
        (shape, left), (other_shape, right) = base.tensor(index), new.tensor(index)
        if shape != other_shape or shape[0] != len(ids):
            return rows, f"list {index}: shapes {shape} and {other_shape} for {len(ids)} ids"
        if left != right:
            width = shape[1]
            at = next(i for i in range(0, len(left), 4) if left[i : i + 4] != right[i : i + 4])
            row, column = divmod(at // 4, width)
            (a,), (b,) = struct.unpack_from("<f", left, at), struct.unpack_from("<f", right, at)
            return rows + row, f"list {index}, token {row}, logit {column}: {a!r} was, {b!r} is"
        rows += shape[0]
    return rows, None


def score(program: Path, checkpoint: Path, precision: str, cpu: str, ids: Path, work: Path) -> Logits:
    """Builds a package and scores `ids` with it, both on the instruction set `cpu`."""
    package, logits = work / "package", work / "logits.safetensors"
    command = [program, "build", checkpoint, "--recipe", "cpu", "--precision", precision, "-o", package, "--force"]
    quiet = {"env": environment(cpu), "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    try:
        run(command, **quiet)
        run([program, "score", package, "--ids", ids, "--logits", logits], **quiet)
    except subprocess.CalledProcessError as error:
        sys.exit(f"{' '.join(error.cmd)} failed with AOTRON_CPU={cpu}:\n{error.stderr.decode(errors='replace')}")
    return Logits(logits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", help="the commit to compare with")
    parser.add_argument("--new", metavar="COMMIT", help="the commit compared (default: this working tree)")
    parser.add_argument("--base-binary", type=Path, help="the program of BASE, already built")
    parser.add_argument("--new-binary", type=Path, help="the program compared, already built")
    parser.add_argument("--target", type=Path, help="cargo's target folder for both builds")
    parser.add_argument("--sets", help="instruction sets, comma-separated (default: all this machine has)")
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    parser.add_argument("--conversations", type=int, help="only the first so many of tiny-chat")
    parser.add_argument("--list-sets", action="store_true", help="print the sets this machine has, and end")
    arguments = parser.parse_args()
    if arguments.list_sets:
        print(*sets_here())
        return
    if arguments.base is None and arguments.base_binary is None:
        parser.error("name the commit to compare with, or its --base-binary")

    data = REPOSITORY / "tests/data"
    sets = arguments.sets.split(",") if arguments.sets else sets_here()
    precisions = arguments.precisions.split(",")
    with tempfile.TemporaryDirectory(prefix="aotron-compare-") as folder:
        work = Path(folder)
        target = (arguments.target or work / "target").resolve()
        base = arguments.base_binary or build_commit(arguments.base, work, target, "base")
        new = arguments.new_binary or build_commit(arguments.new, work, target, "new")

        programs = {"base": base, "new": new}
        for name, program in programs.items():
            print(f"{name}: {program}, sha256 {hashlib.sha256(program.read_bytes()).hexdigest()[:16]}", flush=True)

        models = [(data / "tiny-chat", conversations(arguments.conversations))]
        for seed, config in enumerate(sorted(data.glob("shapes/*/config.json"))):
            models.append((config.parent, random_lists(config, seed)))
        folders = {name: work / f"run-{name}" for name in ("base", "new")}
        for path in folders.values():
            path.mkdir()

        short = work / "short.json"
        short.write_text("[[1, 2, 3]]")
        takes = {name: known_sets(program, name, sets, short, folders[name]) for name, program in programs.items()}

        compared, differing = 0, 0
        for checkpoint, lists in models:
            ids = work / f"{checkpoint.name}.json"
            ids.write_text(json.dumps(lists))
            for precision in precisions:
                for cpu in sets:
                    before, after = (
                        score(program, checkpoint, precision, takes[name][cpu], ids, folders[name])
                        for name, program in programs.items()
                    )
                    rows, difference = first_difference(before, after, lists)
                    compared += rows
                    differing += difference is not None
                    verdict = f"DIFFERS at {difference}" if difference else "identical"
                    print(f"{checkpoint.name:<10} {precision:<5} {cpu:<12} {rows:>6} rows {verdict}", flush=True)
        print(f"{compared} rows on {', '.join(sets)}: " + (f"{differing} runs differ" if differing else "all identical"))
        sys.exit(1 if differing or compared == 0 else 0)


if __name__ == "__main__":
    main()
