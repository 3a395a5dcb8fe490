#!/usr/bin/env python3
"""Speed of an aotron CPU package beside transformers on the same checkpoint, in alternating rounds.

    python tools/make_checkpoint.py build/mid --shape mid --shards 4
    target/release/aotron build build/mid --recipe cpu -o engines/mid
    python tools/compare_speed.py build/mid engines/mid --rounds 3

Each round runs `aotron bench` and then transformers (eager attention, BF16, KV cache) in a process of its own, batch 1,
so that both see the same minutes of a shared machine. Printed: medians over the rounds and their ratio.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time


def transformers_speed(checkpoint: str, prompt_tokens: int, decode_tokens: int) -> dict:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16, attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (1, prompt_tokens), generator=generator)
    with torch.inference_mode():
        model(ids[:, :16])  # warm-up
        start = time.perf_counter()
        out = model(ids, use_cache=True, logits_to_keep=1)
        prefill = time.perf_counter() - start
        token, cache = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
        start = time.perf_counter()
        for _ in range(decode_tokens):
            out = model(token, past_key_values=cache, use_cache=True)
            token, cache = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
        decode = time.perf_counter() - start
    return {"prefill": prompt_tokens / prefill, "decode": decode_tokens / decode}


def aotron_speed(program: str, engine: str, prompt_tokens: int, decode_tokens: int) -> dict:
    command = [program, "bench", engine, "--batch", "1", "--repeat", "1", "--format", "json"]
    command += ["--prompt-tokens", str(prompt_tokens), "--decode-tokens", str(decode_tokens)]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    case = result["cases"][0]
    return {
        "prefill": case["prefill_tokens_per_second"]["median"],
        "decode": case["decode_tokens_per_second"]["median"],
        "bandwidth": case["probe_read_bytes_per_second"] / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("engine", nargs="?")
    parser.add_argument("--program", default="target/release/aotron")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--decode-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--transformers-only", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = (options.prompt_tokens, options.decode_tokens)
    if options.transformers_only:
        print(json.dumps(transformers_speed(options.checkpoint, *sizes)))
        return

    again = [sys.executable, __file__, options.checkpoint, "--transformers-only"]
    again += ["--prompt-tokens", str(sizes[0]), "--decode-tokens", str(sizes[1])]
    ours, theirs = [], []
    for _ in range(options.rounds):
        ours.append(aotron_speed(options.program, options.engine, *sizes))
        output = subprocess.run(again, check=True, capture_output=True, text=True).stdout
        theirs.append(json.loads(output.splitlines()[-1]))
        print(f"round {len(ours)}: aotron {ours[-1]}, transformers {theirs[-1]}", file=sys.stderr)
    for phase in ("prefill", "decode"):
        a, b = (statistics.median(r[phase] for r in runs) for runs in (ours, theirs))
        print(f"{phase}: aotron {a:.1f} tokens/s, transformers {b:.1f} tokens/s, ratio {a / b:.2f}")
    print(f"memory reads beside it: {statistics.median(r['bandwidth'] for r in ours):.1f} GB/s")


if __name__ == "__main__":
    main()
