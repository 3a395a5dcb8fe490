"""compare_logits.py AOTRON ENGINE TARGET: a GPU plan's logits and greedy answers beside the CPU plan's, as JSON.

The relative error of a row is its largest difference divided by its largest magnitude. Between plans of one precision, only
the order of summation and the BF16 rounding of intermediate values differ. Needs numpy. Exits with 1 if a row is not finite
or off by more than LIMIT."""

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy

PROMPTS = ["What is the capital of France?", "What is 17 + 25?", 'What is "water" in German?']
LENGTHS = (1, 2, 17, 64, 200, 400)
LIMIT = 0.1


def read_safetensors(path):
    """The FP32 tensors of a safetensors file."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    tensors = {}
    for name, info in json.loads(data[8 : 8 + length]).items():
        if name == "__metadata__":
            continue
        first, last = (8 + length + offset for offset in info["data_offsets"])
        assert info["dtype"] == "F32", f"{name} is {info['dtype']}"
        tensors[name] = numpy.frombuffer(data[first:last], numpy.float32).reshape(info["shape"])
    return tensors


def run(command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def compare(name, expected, found):
    error = numpy.abs(found - expected).max(-1) / numpy.abs(expected).max(-1)
    worst = int(numpy.nanargmax(error)) if numpy.isfinite(error).any() else 0
    return {
        "name": name,
        "tokens": len(expected),
        "worst_relative_error": float(error[worst]),
        "worst_position": worst,
        "median_relative_error": float(numpy.median(error)),
        "same_best_token": float((found.argmax(-1) == expected.argmax(-1)).mean()),
        "not_finite": int((~numpy.isfinite(found)).sum()),
    }


def main():
    aotron, engine, target = sys.argv[1:4]
    manifest = json.loads(Path(engine, "engine.json").read_text())
    vocabulary = manifest["model"]["vocab_size"]
    most = min(plan["limits"]["max_sequence_tokens"] for plan in manifest["plans"])
    random.seed(7)
    lists = [[random.randrange(4, vocabulary) for _ in range(n)] for n in LENGTHS if n < most]
    # A plan that does not verify is not run unless one insists, and how far off it is is the question here.
    insist = ["--accept-unverified"] if "--accept-unverified" in run([aotron, "score", "--help"]) else []
    logits = {}
    with tempfile.TemporaryDirectory() as folder:
        ids = Path(folder, "ids.json")
        ids.write_text(json.dumps(lists))
        for plan in ("cpu", target):
            out = Path(folder, f"{plan}.safetensors")
            run([aotron, "score", engine, "--ids", str(ids), "--logits", str(out), "--target", plan, *insist])
            logits[plan] = read_safetensors(out)
    rows = [compare(name, expected, logits[target][name]) for name, expected in sorted(logits["cpu"].items())]
    answers = {}
    ask = [aotron, "run", engine, "--format", "json", *insist]
    for prompt in PROMPTS if manifest.get("tokenizer") else []:
        said = {
            plan: json.loads(run([*ask, "--prompt", prompt, "--target", plan]))["text"]
            for plan in ("cpu", target)
        }
        answers[prompt] = {**said, "same": said["cpu"] == said[target]}
    good = all(row["not_finite"] == 0 and row["worst_relative_error"] <= LIMIT for row in rows)
    if not good:
        row = max(rows, key=lambda row: (row["not_finite"], row["worst_relative_error"]))
        print(f"WRONG: {row['name']} is off by {row['worst_relative_error']:.2g} at position {row['worst_position']}, "
              f"{row['not_finite']} values are not finite", file=sys.stderr)
    print(json.dumps({"good": good, "limit": LIMIT, "logits": rows, "answers": answers}, indent=1))
    sys.exit(not good)


if __name__ == "__main__":
    main()
