"""Train the SentencePiece model, write the equal tokenizer.json, and prove them equal.

    python tools/tiny_chat/tokenizer.py train    # tokenizer.model, tokenizer.json, tokenizer_config.json
    python tools/tiny_chat/tokenizer.py check    # equality on the corpus and on random strings
"""

import io
import itertools
import json
import random
import sys
from pathlib import Path

import sentencepiece as spm
from sentencepiece import sentencepiece_model_pb2 as spm_pb2
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

import facts
from dialogues import held_out, training_stream

OUT = Path("tests/data/tiny-chat")
VOCAB_SIZE = 2816
USER_DEFINED = ["<extra_id_0>", "<extra_id_1>", "<extra_id_2>", "\n"]
CORPUS_WEIGHTS = {
    "arithmetic": 1, "reverse": 3, "sort": 3, "count": 2, "calendar": 3, "capital": 4,
    "translate": 8, "memory": 4, "system": 6, "verse": 1, "unknown": 3, "smalltalk": 2,
}


def corpus(count, seed):
    """Texts of generated dialogues."""
    stream = training_stream(CORPUS_WEIGHTS, seed=seed, copying=False)
    return [dialogue.text() for dialogue in itertools.islice(stream, count)]


def lines_for_training():
    """Lines of the corpus, and every closed-set word often enough to become one piece."""
    lines = []
    for text in corpus(20000, seed=5):
        lines += [line for line in text.split("\n") if line]
    words = [w for row in facts.TRANSLATIONS for w in row] + facts.WORDS + facts.COLOURS + facts.PETS
    words += [*facts.CAPITALS, *facts.CAPITALS.values(), *facts.DAYS, *facts.MONTHS, *facts.LANGUAGES]
    words += [*facts.NAMES, *facts.PET_NAMES, *facts.PERSONAS, *facts.TITLES]
    for word in words:
        lines += [word, f"a {word}"] * 500
    for word in [*facts.CAPITALS, *facts.CAPITALS.values(), *facts.DAYS, *facts.MONTHS]:
        lines += [word.upper(), f"A {word.upper()}"] * 500
    return lines


def train():
    """Write tokenizer.model, tokenizer.json and tokenizer_config.json."""
    OUT.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines_for_training()), model_writer=model, model_type="bpe",
        vocab_size=VOCAB_SIZE, byte_fallback=True, character_coverage=1.0,
        normalization_rule_name="identity", add_dummy_prefix=False,
        remove_extra_whitespaces=False, split_digits=True, user_defined_symbols=USER_DEFINED,
        pad_id=0, unk_id=1, bos_id=2, eos_id=3, num_threads=1, minloglevel=2,
    )
    (OUT / "tokenizer.model").write_bytes(model.getvalue())
    convert()
    config = {
        "add_bos_token": False, "add_eos_token": False, "bos_token": "<s>", "eos_token": "</s>",
        "unk_token": "<unk>", "pad_token": "<pad>", "clean_up_tokenization_spaces": False,
        "model_max_length": 512, "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (OUT / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def convert():
    """Write tokenizer.json with the vocabulary and the merges of tokenizer.model."""
    proto = spm_pb2.ModelProto()
    proto.ParseFromString((OUT / "tokenizer.model").read_bytes())
    vocab = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    normal = {p.piece: p.score for p in proto.pieces if p.type == p.NORMAL}
    merges = []
    for piece, score in normal.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in normal and right in normal:
                merges.append((-score, cut, left, right))
    merges = [(left, right) for _, _, left, right in sorted(merges, key=lambda m: m[:2])]
    tokenizer = Tokenizer(models.BPE(
        vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in USER_DEFINED])
    assert tokenizer.get_vocab_size() == len(proto.pieces)
    tokenizer.save(str(OUT / "tokenizer.json"))


def random_strings(count, seed=9):
    """Hostile strings: many scripts, emoji, runs of spaces, pieces in odd places."""
    rng = random.Random(seed)
    words = [w for row in facts.TRANSLATIONS for w in row] + facts.WORDS
    odd = USER_DEFINED + [
        "<s>", "</s>", "<unk>", "<pad>", "<0x41>", "<extra_id_", "<extra_id_3>", "extra_id_1>", " ",
        "  ", "    ", "\n\n", "\r\n", "\t", "▁", "▁▁", "\u00a0", "\u200b", "\u200d", "\ufeff", "é", "e\u0301",
        "ﬁ", "Ａ", "İ", "ß", "😀", "👩‍👩‍👧", "🇩🇪", "𝔘", "\U0010ffff", "\x01", "\x7f", "0123", "½", "²",
        "日本語", "한국어", "ไทย", "हिन्दी", "עברית", "العربية", "Ω", "ǆ", "…", "“”", "'s", "...",
    ]
    for _ in range(count):
        parts = []
        for _ in range(rng.randint(0, 24)):
            roll = rng.random()
            if roll < 0.35:
                parts.append(rng.choice(odd))
            elif roll < 0.6:
                parts.append(rng.choice(words))
            elif roll < 0.75:
                letters = "abcdeghilmnorstuwABST 01239.,?!\"'"
                parts.append("".join(rng.choice(letters) for _ in range(rng.randint(1, 9))))
            elif roll < 0.85:
                parts.append(" ")
            else:
                low, high = rng.choice([(1, 0x2FF), (0x370, 0x7FF), (0x800, 0xD7FF),
                                        (0xE000, 0xFFFF), (0x10000, 0x10FFFF)])
                code = rng.randint(low, high)
                parts.append(chr(code))
        yield "".join(parts)


def check():
    """Fail unless both tokenizers give the same ids and the same text for everything tried."""
    processor = spm.SentencePieceProcessor(model_file=str(OUT / "tokenizer.model"))
    tokenizer = Tokenizer.from_file(str(OUT / "tokenizer.json"))
    texts = corpus(20000, seed=6)
    texts += [d.text() for d in held_out()]
    texts += list(random_strings(20000))
    wrong = 0
    for text in texts:
        ids = processor.encode(text)
        other = tokenizer.encode(text, add_special_tokens=False).ids
        decoded = processor.decode(ids)
        again = tokenizer.decode(other, skip_special_tokens=False)
        if ids != other or decoded != again or decoded != text.replace("▁", " "):
            wrong += 1
            if wrong <= 5:
                print("DIFFERS", ascii(text), ids, other, ascii(decoded), ascii(again), sep="\n  ")
    print(f"{len(texts)} strings, {wrong} differ")
    return wrong


def main():
    if sys.argv[1:] == ["train"]:
        train()
    elif sys.argv[1:] == ["check"]:
        sys.exit(check() > 0)
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
