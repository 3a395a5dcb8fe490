#!/usr/bin/env python3
"""Compares greedy answers of llama.cpp's server and of `aotron serve` with the same weights, by token ids.

    compare_tokens.py http://127.0.0.1:8080 http://127.0.0.1:8000 --vocab 32000

Prompts are random token ids. Prints for each prompt how many tokens agree, and the largest difference of their
log-probabilities. Where the tokens part, it prints by how much each server prefers its own token to its second: with random
weights that is often less than what rounding changes. Exits with 1 if they part at a token which one of them prefers by more
than --tie. Needs nothing but Python 3.
"""

import argparse
import json
import random
import sys
import urllib.request


def post(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as reply:
        return json.load(reply)


def ask_llama(url, prompt, count):
    """The answer's ids, its log-probabilities, and how far the second choice lies behind each."""
    reply = post(f"{url}/completion", {"prompt": prompt, "n_predict": count, "temperature": 0, "ignore_eos": True,
                                       "return_tokens": True, "n_probs": 2, "cache_prompt": False})
    steps = reply["completion_probabilities"]
    margins = [abs(step["top_logprobs"][0]["logprob"] - step["top_logprobs"][1]["logprob"]) for step in steps]
    return [step["id"] for step in steps], [step["logprob"] for step in steps], margins


def ask_aotron(url, prompt, count):
    """The same of aotron."""
    reply = post(f"{url}/v1/completions", {"prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True,
                                           "return_token_ids": True, "logprobs": 2})
    choice = reply["choices"][0]
    margins = []
    for top in choice["logprobs"]["top_logprobs"]:
        first, second = sorted(top.values(), reverse=True)[:2] if len(top) > 1 else (0.0, 0.0)
        margins.append(first - second)
    return choice["token_ids"], choice["logprobs"]["token_logprobs"], margins


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llama", help="llama.cpp's server")
    parser.add_argument("aotron", help="aotron's server")
    parser.add_argument("--vocab", type=int, required=True, help="ids are below this")
    parser.add_argument("--prompts", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32, help="tokens of each answer")
    parser.add_argument("--tie", type=float, default=0.2, help="difference of log-probabilities that rounding may turn (0.2)")
    arguments = parser.parse_args()
    numbers = random.Random(0)
    parted = False
    for index in range(arguments.prompts):
        prompt = [numbers.randrange(8, arguments.vocab) for _ in range(arguments.prompt_tokens)]
        theirs, their_logprobs, their_margins = ask_llama(arguments.llama, prompt, arguments.tokens)
        ours, our_logprobs, our_margins = ask_aotron(arguments.aotron, prompt, arguments.tokens)
        agree = next((at for at, pair in enumerate(zip(theirs, ours)) if pair[0] != pair[1]), min(len(theirs), len(ours)))
        worst = max((abs(a - b) for a, b in zip(their_logprobs[:agree], our_logprobs[:agree])), default=0.0)
        line = f"prompt {index}: {agree} of {arguments.tokens} tokens agree, log-probabilities within {worst:.4f}"
        if agree < arguments.tokens:
            margins = their_margins[agree], our_margins[agree]
            line += f"; then llama.cpp prefers {theirs[agree]} by {margins[0]:.4f}, aotron {ours[agree]} by {margins[1]:.4f}"
            parted |= max(margins) > arguments.tie
        print(line)
    sys.exit(1 if parted else 0)


if __name__ == "__main__":
    main()
