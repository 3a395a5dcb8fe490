"""Answer the held-out conversations with transformers in FP32 and write answers.jsonl.

    python tools/tiny_chat/evaluate.py          # answers.jsonl and the table of the README
    python tools/tiny_chat/evaluate.py chat     # talk to the model in the terminal

Each turn is decoded greedily, one sequence at a time, with the model's own stripped answers in the
history. A conversation is exact if all its answers are.
"""

import json
import sys
from pathlib import Path

import sentencepiece as spm
import torch
from transformers import NemotronForCausalLM

from dialogues import Dialogue, read_conversations

DATA = Path("tests/data/tiny-chat")
MAX_NEW_TOKENS = 200
EOS = 3


class Chat:
    """The shipped weights, widened from BF16 to FP32, behind a greedy decoder."""

    def __init__(self):
        self.processor = spm.SentencePieceProcessor(model_file=str(DATA / "tokenizer.model"))
        self.stops = {EOS, self.processor.piece_to_id("<extra_id_1>")}
        self.model = NemotronForCausalLM.from_pretrained(
            DATA, dtype=torch.float32, attn_implementation="eager")
        self.model.eval()

    @torch.no_grad()
    def greedy(self, prompt_ids):
        """(generated ids with the stop id, smallest gap between the two best logits)."""
        ids, margin, cache = [], float("inf"), None
        step = torch.tensor([prompt_ids])
        for _ in range(MAX_NEW_TOKENS):
            output = self.model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            best = output.logits[0, -1].topk(2)
            ids.append(best.indices[0].item())
            margin = min(margin, (best.values[0] - best.values[1]).item())
            if ids[-1] in self.stops:
                break
            step = best.indices[:1].unsqueeze(0)
        return ids, margin

    def answer(self, prompt):
        """The answer to a rendered prompt, as the record of one turn."""
        prompt_ids = self.processor.encode(prompt)
        ids, margin = self.greedy(prompt_ids)
        text_ids = ids[:-1] if ids[-1] in self.stops else ids
        return {"prompt_ids": prompt_ids, "token_ids": ids,
                "text": self.processor.decode(text_ids).strip(), "min_margin": round(margin, 4)}


def evaluate():
    """Write answers.jsonl; print the accuracy per skill and the spread of the margins."""
    chat, scores, margins, failures = Chat(), {}, [], []
    with open(DATA / "answers.jsonl", "w", encoding="utf-8") as out:
        for number, dialogue in enumerate(read_conversations(DATA / "conversations.jsonl")):
            turns = []
            for _ in dialogue.turns:
                turns.append(chat.answer(dialogue.prompt([turn["text"] for turn in turns])))
            expected = [answer for _, answer in dialogue.turns]
            exact = [turn["text"] for turn in turns] == expected
            record = {"id": number, "exact": exact, "turns": turns}
            out.write(json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n")
            scores.setdefault(dialogue.skill, []).append(exact)
            margins += [turn["min_margin"] for turn in turns]
            if not exact:
                failures.append((number, dialogue, [turn["text"] for turn in turns]))
    for number, dialogue, texts in failures:
        print(f"not exact: {number} {dialogue.skill} {dialogue.system!r} {dialogue.turns} -> {texts}")
    print("\n| Skill | Conversations | Exact | Share |\n|---|---:|---:|---:|")
    for skill in sorted(scores):
        exact = scores[skill]
        print(f"| {skill} | {len(exact)} | {sum(exact)} | {sum(exact) / len(exact):.1%} |")
    everything = [exact for of_skill in scores.values() for exact in of_skill]
    print(f"| all | {len(everything)} | {sum(everything)} | {sum(everything) / len(everything):.1%} |")
    margins.sort()
    shares = ", ".join(f"{p} %: {margins[len(margins) * p // 100]:.2f}" for p in (1, 5, 10, 25, 50))
    print(f"\nsmallest margin {margins[0]:.4f}; quantiles of {len(margins)} turns: {shares}; "
          f"below 0.5: {sum(m < 0.5 for m in margins)}, below 0.1: {sum(m < 0.1 for m in margins)}")


def talk(system):
    """A conversation in the terminal; an empty line starts a new one, end of input leaves."""
    chat, answers, dialogue = Chat(), [], Dialogue("chat", [], system)
    for line in sys.stdin:
        if not line.strip():
            answers, dialogue = [], Dialogue("chat", [], system)
            continue
        dialogue.turns.append((line.strip(), ""))
        turn = chat.answer(dialogue.prompt(answers))
        answers.append(turn["text"])
        print(f"{turn['text']}    [{turn['min_margin']:.2f}]", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["chat"]:
        talk(" ".join(sys.argv[2:]))
    else:
        evaluate()
