#!/usr/bin/env python3
"""Upper bounds of decoding throughput by how the KV cache is kept, for docs/gpu-kv.md.

    python3 tools/gpu_kv_bounds.py [--classes 256,512,1024,2048,4096]

A step reads the weights once and the keys and values that its attention reads; memory bandwidth bounds the step. A load
is a prompt length and an answer length; over an answer a sequence holds prompt + answer / 2 tokens on average. Prefill,
launches and the arithmetic are left out: these are bounds, not predictions.
"""

import argparse

GIB = 1 << 30
LAYERS, KV_HEADS, HEAD_DIM = 32, 32, 128
LOADS = [(128, 128), (128, 2048), (2048, 128), (2048, 2048)]
CLASSES = "256,512,1024,2048,4096"
# Bandwidth in bytes/s (NVIDIA's data sheets), weights that a step reads, and memory for KV, after the recipes. The H100's
# weights are FP8 with a BF16 head: 6.44 GB of codes, 2.1 GB of head; the A100's are BF16.
CARDS = [("H100 SXM 80 GB, FP8 weights", 3.35e12, 8.6e9, 56 * GIB), ("A100 SXM 80 GB, BF16 weights", 2.039e12, 15.0e9, 48 * GIB)]


def kv_bytes_per_token(element_bytes: int) -> int:
    return 2 * LAYERS * KV_HEADS * HEAD_DIM * element_bytes


def bound(reserved: float, read: float, element_bytes: int, card: tuple) -> tuple[int, float]:
    """Sequences that fit, and tokens/s, if each reserves and reads so many tokens."""
    _, bandwidth, weights, memory = card
    token = kv_bytes_per_token(element_bytes)
    sequences = int(memory // (reserved * token))
    return sequences, sequences / ((weights + sequences * read * token) / bandwidth)


def mean_capacity(prompt: int, answer: int, classes: list[int]) -> float:
    """Mean capacity of a sequence that starts in the smallest class that holds its prompt and moves up as it grows."""
    lengths = range(prompt + 1, prompt + answer + 1)
    return sum(next(c for c in classes if c >= min(n, classes[-1])) for n in lengths) / answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", default=CLASSES, help="capacities in tokens (default: %(default)s)")
    classes = sorted(int(c) for c in parser.parse_args().classes.split(","))
    for card in CARDS:
        print(f"\n{card[0]}, {card[3] // GIB} GiB of KV\n")
        ways = ["slots of 4,096", "final class", "moving up", "moving up, lengths", "pages, BF16", "pages, FP8"]
        print("| prompt → answer | " + " | ".join(ways) + " |")
        print("| --- |" + " --- |" * len(ways))
        for prompt, answer in LOADS:
            total, mean = prompt + answer, prompt + answer / 2
            capacity = next(c for c in classes if c >= min(total, classes[-1]))
            moving = mean_capacity(prompt, answer, classes)
            cells = [
                bound(4096, 4096, 2, card),
                bound(capacity, capacity, 2, card),
                bound(moving, moving, 2, card),
                bound(moving, mean, 2, card),
                bound(mean, mean, 2, card),
                bound(mean, mean, 1, card),
            ]
            row = " | ".join(f"{rate:,.0f} ({sequences})" for sequences, rate in cells)
            print(f"| {prompt} → {answer} | {row} |")


if __name__ == "__main__":
    main()
