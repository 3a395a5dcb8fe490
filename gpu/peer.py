"""peer.py CHECKPOINT BATCH: transformers in BF16 with torch.compile and a static cache, on the workload of `aotron bench`: 512
prompt tokens and 128 decoded tokens. Tokens per second over all sequences, medians of five, as JSON. Needs torch."""

import json
import os
import statistics
import sys
import time

import torch
import transformers
from transformers import AutoModelForCausalLM, StaticCache

PROMPT = int(os.environ.get("AOTRON_PROMPT", 512))
DECODED = int(os.environ.get("AOTRON_DECODED", 128))
REPEAT, WARM_UP = 5, 2


def main():
    checkpoint, batch = sys.argv[1], int(sys.argv[2])
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).to("cuda").eval()
    decode = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
    # One cache for all runs: a new one would be compiled for again, within what is timed.
    cache = StaticCache(model.config, max_cache_len=PROMPT + DECODED + 1)
    prefill_seconds, decode_seconds = [], []
    for run in range(REPEAT + WARM_UP):
        cache.reset()
        ids = torch.randint(4, model.config.vocab_size, (batch, PROMPT), device="cuda")
        position = torch.arange(PROMPT, device="cuda")
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.no_grad():
            out = model(ids, past_key_values=cache, cache_position=position, use_cache=True, logits_to_keep=1)
            torch.cuda.synchronize()
            middle = time.perf_counter()
            token = out.logits[:, -1:].argmax(-1)
            position = torch.tensor([PROMPT], device="cuda")
            for _ in range(DECODED):
                out = decode(token, past_key_values=cache, cache_position=position, use_cache=True)
                token = out.logits[:, -1:].argmax(-1)
                position = position + 1
            torch.cuda.synchronize()
        if run >= WARM_UP:
            prefill_seconds.append(middle - start)
            decode_seconds.append(time.perf_counter() - middle)
    print(
        json.dumps(
            {
                "transformers": transformers.__version__,
                "torch": torch.__version__,
                "cases": [
                    {
                        "batch": batch,
                        "prefill_tokens_per_second": batch * PROMPT / statistics.median(prefill_seconds),
                        "decode_tokens_per_second": batch * DECODED / statistics.median(decode_seconds),
                    }
                ],
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
