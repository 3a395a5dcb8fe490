"""compare_logits.py AOTRON ENGINE TARGET: compares a GPU plan's logits and greedy answers with the CPU plan's.

Relative error is the largest difference divided by the largest magnitude, per row. Between plans of the same precision,
only the summation order and the BF16 rounding of intermediate values differ."""

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

PROMPTS = ["What is the capital of France?", "What is 17 + 25?", 'What is "water" in German?']


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Reads the FP32 tensors of a safetensors file without the safetensors package."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    tensors = {}
    for name, info in header.items():
        if name == "__metadata__":
            continue
        first, last = (8 + length + offset for offset in info["data_offsets"])
        assert info["dtype"] == "F32", f"{name} is {info['dtype']}"
        tensors[name] = torch.frombuffer(bytearray(data[first:last]), dtype=torch.float32).reshape(info["shape"])
    return tensors


def main() -> None:
    aotron, engine, target = sys.argv[1:4]
    vocabulary = json.loads(Path(engine, "engine.json").read_text())["model"]["vocab_size"]
    random.seed(7)
    lists = [[random.randrange(4, vocabulary) for _ in range(n)] for n in (1, 2, 17, 64, 200, 400)]
    with tempfile.TemporaryDirectory() as folder:
        ids = Path(folder, "ids.json")
        ids.write_text("\n".join(map(json.dumps, lists)) + "\n")
        logits = {}
        for plan in ("cpu", target):
            out = Path(folder, f"{plan}.safetensors")
            command = [aotron, "score", engine, "--ids", str(ids), "--logits", str(out), "--target", plan]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                sys.exit(f"{' '.join(command)}: {done.stderr.strip()}")
            logits[plan] = read_safetensors(out)
    rows = []
    for name, expected in logits["cpu"].items():
        found = logits[target][name]
        error = (found - expected).abs().amax(-1) / expected.abs().amax(-1)
        same = (found.argmax(-1) == expected.argmax(-1)).float().mean()
        rows.append(
            {
                "name": name,
                "shape": list(expected.shape),
                "worst_relative_error": float(error.max()),
                "median_relative_error": float(error.median()),
                "same_best_token": float(same),
                "not_finite": int((~torch.isfinite(found)).sum()),
            }
        )
    answers = {}
    for prompt in PROMPTS:
        said = [
            json.loads(
                subprocess.run(
                    [aotron, "run", engine, "--prompt", prompt, "--target", plan, "--format", "json"],
                    capture_output=True,
                    text=True,
                    check=True,
                ).stdout
            )["text"]
            for plan in ("cpu", target)
        ]
        answers[prompt] = {"cpu": said[0], target: said[1], "same": said[0] == said[1]}
    print(json.dumps({"logits": rows, "answers": answers}, indent=1))


if __name__ == "__main__":
    main()
