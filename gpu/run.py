"""run.py RESULTS [--quick | --shape small|mid|8b] [--only PREFIX] [--again]: asks every question that needs a GPU.

A question is a command in a process of its own, with a time limit. Its answer is RESULTS/NAME.json, written as soon as it is
known, so a crash or a lost connection loses nothing: run it again and it goes on where it stopped. --again asks anew what
failed. RESULTS/summary.md is rewritten after every answer. --quick stops asking after seven minutes."""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import summary

HERE = Path(__file__).resolve().parent
QUICK_SECONDS = 420
BATCHES = (1, 8, 32)
# Bytes of disk that a shape's checkpoint and its largest package take, together.
DISK = {"tiny": 50e6, "small": 2e9, "mid": 6e9, "8b": 38e9}


class Asker:
    def __init__(self, results, flags):
        self.results, self.flags = results, flags
        self.started = time.monotonic()
        # Packages that are made or finished here, in place of the packed ones, which stay as they are.
        self.work = results / "work"
        self.work.mkdir(exist_ok=True)
        self.environment = environment_of(results)

    def left(self):
        return QUICK_SECONDS - (time.monotonic() - self.started) if self.flags.quick else float("inf")

    def known(self, name):
        try:
            return json.loads((self.results / f"{name}.json").read_text())
        except (OSError, ValueError):
            return None

    def ask(self, name, command, limit=1800, environment=None):
        """The answer, an object with `status`: ok, failed, crashed, timeout or skipped. The command prints JSON, of which the
        last line or the whole is the `answer`, or any text."""
        if self.flags.only and not name.startswith(self.flags.only):
            return self.known(name) or {"status": "skipped"}
        known = self.known(name)
        if known and known["status"] != "skipped" and not (self.flags.again and known["status"] != "ok"):
            return known
        if self.left() < 5:
            return self.keep(name, {"status": "skipped", "why": "--quick has no time left"})
        is_short, limit = self.left() < limit, min(limit, self.left())
        print(f"== {name}: {' '.join(map(str, command))}", flush=True)
        start = time.perf_counter()
        with open(self.results / f"{name}.log", "wb") as log:
            process = subprocess.Popen(
                [str(part) for part in command],
                cwd=HERE, env={**self.environment, **(environment or {})}, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=log, start_new_session=True,
            )  # fmt: skip
            try:
                out, _ = process.communicate(timeout=limit)
                status = "ok" if process.returncode == 0 else "failed" if process.returncode > 0 else "crashed"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                out, _ = process.communicate()
                status = "timeout"
        if status == "timeout" and is_short:
            return self.keep(name, {"status": "skipped", "why": "--quick had too little time left to finish it"})
        answer = {"status": status, "seconds": round(time.perf_counter() - start, 3), "exit_code": process.returncode}
        answer["command"] = [str(part) for part in command]
        answer["answer"] = answer_in(out.decode(errors="replace"))
        answer["said"] = last_lines(self.results / f"{name}.log")
        return self.keep(name, answer)

    def keep(self, name, answer):
        path = self.results / f"{name}.json"
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(answer, indent=1))
        unfinished.replace(path)
        (self.results / "summary.md").write_text(summary.of(self.results))
        if answer["status"] != "ok":
            print(f"   {answer['status']}: {(answer.get('said') or [answer.get('why', '')])[-1]}", flush=True)
        return answer


def environment_of(results):
    environment = dict(os.environ)
    folders = [HERE / "site", HERE]
    environment["PYTHONPATH"] = ":".join(str(folder) for folder in folders if folder.is_dir())
    # No empty element, which would be the current folder.
    libraries = [str(HERE / name) for name in library_folders() if (HERE / name).is_dir()]
    libraries += [path for path in environment.get("LD_LIBRARY_PATH", "").split(":") if path]
    if libraries:
        environment["LD_LIBRARY_PATH"] = ":".join(libraries)
    if (HERE / library_folders()[0]).is_dir():
        environment.setdefault("AOTRON_TENSORRT_DIR", str(HERE / library_folders()[0]))
    # Kernels of this run alone, so that the first start is a first start.
    environment["XDG_CACHE_HOME"] = str(results / "cache")
    return environment


def library_folders():
    """The folders of libraries that this machine's driver can use, the best first."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        text = ""
    found = re.search(r"Kernel Module.*?\s(\d+)\.\d+", text)
    return ["tensorrt-cu12", "tensorrt"] if found and int(found[1]) < 580 else ["tensorrt"]


def answer_in(text):
    for part in (text, (text.strip().splitlines() or [""])[-1]):
        try:
            return json.loads(part)
        except ValueError:
            pass
    return text.strip()[-4000:]


def last_lines(log):
    text = log.read_text(errors="replace").strip()
    if not text:
        log.unlink()
    return [line[:600] for line in text.splitlines()[-6:]]


def help_of(command):
    """The help of a command of the program, empty if it has no such command."""
    done = subprocess.run(["./aotron", command, "--help"], cwd=HERE, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else ""


def remove(folder):
    shutil.rmtree(folder, ignore_errors=True)


class Experiment:
    def __init__(self, asker, target, quick):
        self.asker, self.target, self.quick = asker, target, quick
        self.python = sys.executable
        self.can_verify = "Usage:" in help_of("verify")
        # The fakes of a rehearsal answer nonsense, which the program refuses to run otherwise.
        flag = "--accept-unverified"
        self.accept = [flag] if os.environ.get("AOTRON_REHEARSAL") and flag in help_of("bench") else []

    def acceptance(self):
        """What each library builds and runs, by its Python bindings."""
        modes = {"tensorrt": ("here",), "rtx": ("CURRENT",) if self.quick else ("CURRENT", "here", "SM80", "SM89", "SM120")}
        for library, names in modes.items():
            for mode in names:
                for kind in ("input", "constant"):
                    command = [self.python, "acceptance.py", library, mode, kind]
                    self.asker.ask(f"acceptance-{library}-{mode}-{kind}", command, limit=90 if self.quick else 600)

    def packed(self):
        """The packed packages of the small model: finished here where they were only prepared, verified, compared with the CPU."""
        for source in sorted(HERE.glob(f"engines/{self.target}-*")):
            name = source.name
            engine = self.asker.work / f"engine-{name}"
            if not engine.exists():
                shutil.copytree(source, engine)
            finish = ["./aotron", "build", engine, "--finish"]
            manifest = json.loads((source / "engine.json").read_text())
            prepared = any(plan["tensorrt"] and not plan["tensorrt"]["compiled"] for plan in manifest["plans"] if plan.get("tensorrt"))
            if prepared:
                self.asker.ask(f"finish-{name}", finish, limit=300)
            self.judge(name, engine)
            if not prepared and not self.quick:
                # Compiled elsewhere by TensorRT for RTX; TensorRT 11 on this card may do better.
                self.asker.ask(f"finish-{name}-here", finish, limit=600)
                self.judge(f"{name}-here", engine)

    def judge(self, name, engine):
        if self.can_verify:
            self.asker.ask(f"verify-{name}", ["./aotron", "verify", engine, "--target", self.target], limit=300)
        command = [self.python, "compare_logits.py", "./aotron", engine, self.target]
        self.asker.ask(f"logits-{name}", command, limit=300)

    def speed(self, shape, precisions):
        asker = self.asker
        checkpoint = asker.work / f"checkpoint-{shape}"
        free = shutil.disk_usage(asker.work).free
        if not checkpoint.exists() and free < DISK[shape]:
            why = f"{shape} needs {DISK[shape] / 1e9:.0f} GB of disk, {free / 1e9:.0f} GB are free"
            asker.keep(f"checkpoint-{shape}", {"status": "skipped", "why": why})
            return
        made = asker.ask(f"checkpoint-{shape}", [self.python, "checkpoint.py", checkpoint, shape])
        if made["status"] != "ok":
            return
        if not (checkpoint / "config.json").exists():
            # Made by an earlier run, which cleaned up after itself.
            subprocess.run([self.python, "checkpoint.py", checkpoint, shape], cwd=HERE, env=asker.environment)
        tokens = os.environ.get("AOTRON_TOKENS", "1024")
        prompt, decoded = os.environ.get("AOTRON_PROMPT", "512"), os.environ.get("AOTRON_DECODED", "128")
        for precision in precisions:
            name = f"{shape}-{precision}"
            engine = asker.work / f"engine-{name}"
            build = ["./aotron", "build", checkpoint, "--recipe", f"{self.target}:{precision}", "--force", "-o", engine]
            build += ["--slots", str(max(BATCHES)), "--max-sequence-tokens", tokens]
            built = asker.ask(f"build-{name}", build)
            if built["status"] != "ok" or not engine.exists():
                continue
            run = ["./aotron", "run", engine, "--target", self.target, "--token-ids", "1,2,3", "--max-tokens", "2", *self.accept]
            asker.ask(f"start-cold-{name}", run)
            asker.ask(f"start-warm-{name}", run)
            for batch in (1, 8) if self.quick else BATCHES:
                bench = ["./aotron", "bench", engine, "--target", self.target, "--prompt-tokens", prompt]
                bench += ["--decode-tokens", decoded, "--batch", str(batch), "--format", "json", *self.accept]
                asker.ask(f"speed-{name}-{batch}", bench)
                if not self.quick:
                    asker.ask(f"speed-{name}-{batch}-no-graphs", [*bench, "--no-cuda-graphs"])
            remove(engine)
        for batch in (1,) if self.quick else BATCHES:
            asker.ask(f"peer-{shape}-{batch}", [self.python, "peer.py", checkpoint, str(batch)], limit=120 if self.quick else 1800)
        if shape == "8b":
            remove(checkpoint)


def main():
    parser = argparse.ArgumentParser(description="Asks every question that needs a GPU.")
    parser.add_argument("results", type=Path)
    parser.add_argument("--quick", action="store_true", help="within eight minutes")
    parser.add_argument("--shape", choices=sorted(DISK), help="of the model to time [default: mid, with --quick small]")
    parser.add_argument("--only", metavar="PREFIX", help="only questions whose names start so")
    parser.add_argument("--again", action="store_true", help="ask again what failed")
    flags = parser.parse_args()
    flags.results.mkdir(parents=True, exist_ok=True)
    results = flags.results.resolve()
    asker = Asker(results, flags)
    python = sys.executable
    machine = asker.ask("machine", [python, "machine.py"], limit=60)
    asker.ask("doctor", ["./aotron", "doctor", "--format", "json"], limit=120)
    asker.ask("bandwidth", [python, "machine.py", "--bandwidth"], limit=120)
    target = isinstance(machine.get("answer"), dict) and machine["answer"].get("target")
    if target:
        experiment = Experiment(asker, target, flags.quick)
        experiment.packed()
        shape = flags.shape or ("small" if flags.quick else "mid")
        precisions = ["bf16", "w8a8", "int8", "int4"] if target == "a100" else ["bf16", "fp8", "int8"]
        if flags.quick:
            experiment.acceptance()
            experiment.speed(shape, precisions[:2])
        else:
            experiment.speed(shape, precisions)
            experiment.acceptance()
    else:
        asker.keep("target", {"status": "failed", "said": ["no GPU here is an A100 (SM 8.0) or an H100 (SM 9.0)"]})
    print((results / "summary.md").read_text())
    print(f"{results}: send this folder back, without work/ and cache/")
    answers = [json.loads(path.read_text()) for path in results.glob("*.json")]
    sys.exit(any(answer["status"] in ("failed", "crashed", "timeout") for answer in answers))


if __name__ == "__main__":
    main()
