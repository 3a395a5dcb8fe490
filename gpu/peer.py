"""peer.py CHECKPOINT: transformers in BF16 with torch.compile and a static cache, on the workload of `aotron bench`: 512
prompt tokens and 128 decoded tokens at batch 1, 8 and 32. Tokens per second over all sequences, medians of five."""

import json
import statistics
import sys
import time

import torch

PROMPT, DECODED, REPEAT = 512, 128, 5


def main() -> None:
    import transformers
    from transformers import AutoModelForCausalLM, StaticCache

    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16, device_map="cuda").eval()
    answer = {"transformers": transformers.__version__, "torch": torch.__version__, "figures": []}
    decode = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
    for batch in (1, 8, 32):
        prefill_seconds, decode_seconds = [], []
        try:
            for run in range(REPEAT + 2):
                cache = StaticCache(model.config, max_cache_len=PROMPT + DECODED + 1)
                ids = torch.randint(4, model.config.vocab_size, (batch, PROMPT), device="cuda")
                position = torch.arange(PROMPT, device="cuda")
                torch.cuda.synchronize()
                start = time.perf_counter()
                with torch.no_grad():
                    out = model(ids, past_key_values=cache, cache_position=position, use_cache=True, logits_to_keep=1)
                    torch.cuda.synchronize()
                    middle = time.perf_counter()
                    for step in range(DECODED):
                        token = out.logits[:, -1:].argmax(-1)
                        position = torch.tensor([PROMPT + step], device="cuda")
                        out = decode(token, past_key_values=cache, cache_position=position, use_cache=True)
                    torch.cuda.synchronize()
                # The first two runs compile.
                if run >= 2:
                    prefill_seconds.append(middle - start)
                    decode_seconds.append(time.perf_counter() - middle)
            answer["figures"].append(
                {
                    "batch": batch,
                    "prefill_tokens_per_second": batch * PROMPT / statistics.median(prefill_seconds),
                    "decode_tokens_per_second": batch * DECODED / statistics.median(decode_seconds),
                }
            )
        except Exception as error:  # the message is the answer
            answer["figures"].append({"batch": batch, "error": repr(error)[:400]})
    print(json.dumps(answer, indent=1))


if __name__ == "__main__":
    main()
