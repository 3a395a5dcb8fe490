"""Train the tiny chat model on generated dialogues and save it as BF16.

    python tools/tiny_chat/train.py --steps 3400 --state build/tiny-chat-state.pt

The loss covers the assistant's answers with their closing newline and `<extra_id_1>`. Weight
matrices of the layers are trained with Muon, everything else with AdamW; the learning rate rises
for a short while, stays, and falls to zero. A state file, rewritten at every report, lets an
interrupted run go on where it stopped; `--export` only writes the state's weights.
"""

import argparse
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # one thread per forward pass, several passes at once

import sentencepiece as spm  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from transformers import GenerationConfig, NemotronConfig, NemotronForCausalLM  # noqa: E402

from dialogues import DEV_SEED, TRAIN_SEED, held_out, training_stream  # noqa: E402

OUT = Path("tests/data/tiny-chat")
MAX_TOKENS = 320  # longer dialogues are not trained on
CONTEXT = 512
MODEL_SEED = 3

# How often each skill is drawn before the weights adapt to the errors on the dev set.
BASE_WEIGHTS = {
    "arithmetic": 3.0, "reverse": 0.8, "sort": 2.0, "count": 0.8, "calendar": 0.6, "capital": 0.6,
    "translate": 2.0, "memory": 5.0, "system": 1.5, "verse": 0.3, "unknown": 0.5, "smalltalk": 0.4,
    "mixed": 0.8,
}
DEV_COUNTS = dict.fromkeys(BASE_WEIGHTS, 40)


def new_model(vocab_size):
    """A fresh model; LayerNorm1P weights start at zero, which means a scale of one."""
    torch.manual_seed(MODEL_SEED)
    config = NemotronConfig(
        vocab_size=vocab_size, hidden_size=192, intermediate_size=768, num_hidden_layers=5,
        num_attention_heads=6, num_key_value_heads=6, head_dim=32, hidden_act="relu2",
        max_position_embeddings=CONTEXT, initializer_range=0.02, norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        bos_token_id=2, eos_token_id=3, pad_token_id=None, tie_word_embeddings=False,
    )
    model = NemotronForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.zero_()
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(0.2)
            elif "embed_tokens" in name:
                parameter.mul_(5.0)
    return model


class Encoder:
    """Dialogues to (ids, trained) pairs; `trained[i]` says whether token i carries loss."""

    def __init__(self):
        self.processor = spm.SentencePieceProcessor(model_file=str(OUT / "tokenizer.model"))

    def encode(self, dialogue):
        ids, trained = [], []
        for text, is_trained in dialogue.segments():
            piece_ids = self.processor.encode(text)
            ids += piece_ids
            trained += [is_trained] * len(piece_ids)
        return ids, trained


def batches(examples, tokens_per_batch):
    """Group examples of like length into right-padded (ids, trained) tensors."""
    examples = sorted(examples, key=lambda example: len(example[0]))
    group = []
    for example in examples:
        if group and (len(group) + 1) * len(example[0]) > tokens_per_batch:
            yield pad(group)
            group = []
        group.append(example)
    if group:
        yield pad(group)


def pad(group):
    width = max(len(ids) for ids, _ in group)
    ids = torch.zeros(len(group), width, dtype=torch.long)
    trained = torch.zeros(len(group), width, dtype=torch.bool)
    for row, (tokens, flags) in enumerate(group):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        trained[row, : len(flags)] = torch.tensor(flags)
    return ids, trained


def trained_logits(model, ids, trained):
    """Logits and targets of the trained tokens only. Padding is on the right, so the causal mask hides it."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        wanted = trained[:, 1:]
        logits = model.lm_head(hidden[wanted])
    return logits.float(), ids[:, 1:][wanted]


@torch.no_grad()
def dev_accuracy(model, examples):
    """Share of conversations with every trained token right, per skill.

    With greedy decoding a conversation is exact if and only if this holds, because up to its
    first wrong token the history is the expected one.
    """
    model.eval()
    right = {}
    for skill, encoded in examples.items():
        good = 0
        for ids, trained in batches(encoded, 4096):
            logits, targets = trained_logits(model, ids, trained)
            rows = torch.arange(len(ids)).unsqueeze(1).expand(-1, ids.shape[1] - 1)[trained[:, 1:]]
            wrong = rows[logits.argmax(-1) != targets]
            good += len(ids) - len(wrong.unique())
        right[skill] = good / len(encoded)
    model.train()
    return right


def optimizers(model):
    """Two for the matrices, so that they can step side by side, and one for everything else."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in n)]
    muon = dict(lr=5e-3, momentum=0.95, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
    return [
        torch.optim.Muon(matrices[::2], **muon),
        torch.optim.Muon(matrices[1::2], **muon),
        torch.optim.AdamW(others, lr=2.5e-3, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def gradients(model, batch, count):
    """The loss of one batch, as its share of `count` trained tokens, and its gradients."""
    logits, targets = trained_logits(model, *batch)
    loss = F.cross_entropy(logits, targets, reduction="sum") / count
    return loss.item(), torch.autograd.grad(loss, list(model.parameters()))


def lr_factor(step, steps):
    """Warm-up over 100 steps, constant to a quarter, then a cosine fall to zero."""
    if step < 100:
        return (step + 1) / 100
    done = step / steps
    return 1.0 if done < 0.25 else 0.5 * (1 + math.cos(math.pi * (done - 0.25) / 0.75))


def export(model):
    """Save the weights as BF16 with the configuration transformers writes."""
    shipped = NemotronForCausalLM(model.config).to(torch.bfloat16)
    shipped.load_state_dict({k: v.to(torch.bfloat16) for k, v in model.state_dict().items()})
    shipped.config.dtype = torch.bfloat16
    stop = Encoder().processor.piece_to_id("<extra_id_1>")
    shipped.generation_config = GenerationConfig(
        bos_token_id=2, eos_token_id=[3, stop], do_sample=False, max_new_tokens=200)
    shipped.save_pretrained(OUT, max_shard_size="1GB")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3400)
    parser.add_argument("--state", required=True, help="file that keeps the state of the run")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens per step")
    parser.add_argument("--micro", type=int, default=1024, help="tokens per forward pass")
    parser.add_argument("--threads", type=int, default=2, help="forward passes at once")
    parser.add_argument("--every", type=int, default=100, help="steps between reports")
    parser.add_argument("--export", action="store_true", help="only write the state's weights")
    args = parser.parse_args()

    encoder = Encoder()
    model = new_model(encoder.processor.vocab_size())
    print(sum(p.numel() for p in model.parameters()), "parameters", flush=True)
    opts = optimizers(model)
    base_lrs = [opt.param_groups[0]["lr"] for opt in opts]
    dev = held_out(seed=DEV_SEED, counts=DEV_COUNTS)
    excluded = {d.prefix_hashes()[-1] for d in dev + held_out()}
    dev_examples = {}
    for dialogue in dev:
        dev_examples.setdefault(dialogue.skill, []).append(encoder.encode(dialogue))
    weights = dict(BASE_WEIGHTS)
    step = 0
    state_path = Path(args.state)
    if state_path.exists():
        state = torch.load(state_path, weights_only=False)
        model.load_state_dict(state["model"])
        for opt, saved in zip(opts, state["optimizers"]):
            opt.load_state_dict(saved)
        step, weights = state["step"], state["weights"]
    if args.export:
        export(model)
        return

    stream = training_stream(weights, seed=TRAIN_SEED * 1_000_003 + step, excluded=excluded)
    stream = (encoder.encode(dialogue) for dialogue in stream)
    stream = (example for example in stream if len(example[0]) <= MAX_TOKENS)
    model.set_attn_implementation("eager")  # the fastest on a CPU for rows this short
    model.train()
    pool = ThreadPoolExecutor(args.threads)
    begun, seen, losses = time.time(), 0, []
    while step < args.steps:
        examples, tokens = [], 0
        while tokens < args.tokens:
            examples.append(next(stream))
            tokens += len(examples[-1][0])
        count = sum(sum(trained) for _, trained in examples)
        total = 0.0
        jobs = [pool.submit(gradients, model, batch, count) for batch in batches(examples, args.micro)]
        for job in jobs:
            loss, grads = job.result()
            total += loss
            for parameter, grad in zip(model.parameters(), grads):
                parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt, base in zip(opts, base_lrs):
            opt.param_groups[0]["lr"] = base * lr_factor(step, args.steps)
        list(pool.map(lambda opt: opt.step(), opts))
        model.zero_grad(set_to_none=True)
        step += 1
        seen += tokens
        losses.append(total)
        if step % args.every == 0 or step == args.steps:
            accuracy = dev_accuracy(model, dev_examples)
            for skill, base in BASE_WEIGHTS.items():
                weights[skill] = base * (0.3 + min(1.0, 4 * (1 - accuracy[skill])))
            saved = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in opts],
                     "step": step, "weights": weights}
            torch.save(saved, state_path.with_suffix(".new"))
            state_path.with_suffix(".new").replace(state_path)
            mean = sum(accuracy.values()) / len(accuracy)
            print(f"step {step} loss {sum(losses) / len(losses):.4f} dev {mean:.3f} "
                  f"{seen / (time.time() - begun):.0f} tokens/s {time.time() - begun:.0f} s "
                  + " ".join(f"{s} {a:.2f}" for s, a in accuracy.items()), flush=True)
            losses = []
    export(model)


if __name__ == "__main__":
    main()
