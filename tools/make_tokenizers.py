"""Train the small SentencePiece models of tests/data/tokenizers, and write what SentencePiece makes of many texts.

    python tools/make_tokenizers.py train     # byte_bpe.model, nmt_bpe.model, unigram.model
    python tools/make_tokenizers.py golden    # lines.jsonl, <model>.jsonl, variants.jsonl

Golden files: lines.jsonl has one text a line. Line i of <model>.jsonl is {"ids"} of text i, with "text" where decoding
them gives another one; more lines of {"ids", "text"} follow, of arbitrary ids. A line of variants.jsonl is a model with
edits, and [line, ids, decoded] of some texts.
"""

import io
import json
import random
import sys
import unicodedata
from pathlib import Path

import sentencepiece as spm
from sentencepiece import sentencepiece_model_pb2 as spm_pb2

OUT = Path("tests/data/tokenizers")
MODELS = ["byte_bpe", "nmt_bpe", "unigram"]

# Words of twelve scripts.
SCRIPTS = {
    "latin": "the cat sat on a mat naïve café über straße señor İstanbul fiancée Ærø łódź Tiếng Việt œuvre don't",
    "greek": "και το νερό είναι καλό ἀρχή σοφία ΆΛΦΑ ήλιος θάλασσα",
    "cyrillic": "привет мир как дела хорошо ёлка съешь ещё Київ ђак",
    "arabic": "مرحبا بالعالم كيف حالك السلام عليكم كِتَابٌ فارسی پنج ۱۲۳",
    "hebrew": "שלום עולם מה שלומך תודה רבה בְּרֵאשִׁית",
    "devanagari": "नमस्ते दुनिया आप कैसे हैं धन्यवाद क्षत्रिय श्री",
    "bengali": "নমস্কার বিশ্ব কেমন আছো ধন্যবাদ বাংলা",
    "thai": "สวัสดี ชาวโลก ขอบคุณ ครับ ภาษาไทย น้ำ",
    "tamil": "வணக்கம் உலகம் நன்றி தமிழ் எப்படி",
    "han": "你好 世界 今天天气很好 谢谢 中文 漢字 龘 𠀋",
    "kana": "こんにちは 世界 カタカナ ありがとう ございます ｶﾞｷﾞ がぎ",
    "hangul": "안녕하세요 세계 감사합니다 한국어 좋은 하루 각",
}
CODE = [
    "fn main() { println!(\"{}\", x[0]); }", "for i in range(10):\n    print(i)", "a += b->c[d] & 0xFF;",
    "<div class=\"x\">&amp;</div>", "SELECT * FROM t WHERE a <> 'b';", "{\"key\": [1, 2.5e-3, null]}", "#include <a.h>",
    "\tif (x) return;", "    def f(self):", "https://example.org/a?b=c&d=%20", "$ ls -la | grep foo", "\\frac{a}{b}",
]
ODD = [
    "😀", "👩‍👩‍👧", "🇩🇪", "👍🏽", "❤️", "1️⃣", "<s>", "</s>", "<unk>", "<pad>", "<0x41>", "<extra_id_0>", "<extra_id_1>",
    "<extra_id_", "<extra_id_1", "extra_id_1>", "<extra_id_2>", " ", "  ", "    ", "\n", "\n\n", "\r\n", "\t", "▁", "▁▁",
    "\u00a0", "\u200b", "\u200d", "\u2028", "\u3000", "\ufeff", "\u00ad", "e\u0301", "ﬁ", "Ａ", "ｱ", "½", "²", "…", "㍿",
    "①", "Ⅷ", "ǆ", "\u1e9b\u0323", "\x00", "\x01", "\x08", "\x1b[0m", "\x7f", "\x85", "\U0010ffff", "\ue000", "\ufffd",
    "...", "“”", "0123", "3.14", "１２３", "\u0344", "\u0f73", "가", "각", "𝔘", "ﷺ",
]


def words(name):
    return SCRIPTS[name].split()


def corpus():
    """Lines to train on: the repository's own documents, and sentences of the words."""
    rng = random.Random(1)
    lines = []
    for path in sorted([Path("README.md"), *Path("docs").glob("*.md"), *Path("src/text").glob("*.rs")]):
        lines += [line.strip() for line in path.read_text().split("\n") if line.strip()]
    for name in SCRIPTS:
        for _ in range(150):
            lines.append(" ".join(rng.choice(words(name)) for _ in range(rng.randint(2, 7))))
    return lines + CODE


def nmt_rules():
    """Some hundreds of the rules of nmt_nfkc, for all of them take 240 KB: as SentencePiece's own table maps them."""
    normalizer = spm.SentencePieceNormalizer(rule_name="nmt_nfkc")
    ranges = [(0x01, 0x20), (0x7F, 0x100), (0x1C4, 0x1CD), (0x344, 0x345), (0x2000, 0x2070), (0x2100, 0x2180),
              (0x2460, 0x2474), (0x3000, 0x3001), (0xFB00, 0xFB07), (0xFDFA, 0xFDFB), (0xFE00, 0xFE10),
              (0xFEFF, 0xFF00), (0xFF01, 0xFFA0), (0xFFFC, 0xFFFE), (0x1D504, 0x1D51D)]
    sources = [chr(code) for low, high in ranges for code in range(low, high)]
    for code in range(0xC0, 0x180):
        parts = unicodedata.normalize("NFD", chr(code))
        if len(parts) > 1:
            sources.append(parts)
    sources += ["ｶﾞ", "ｷﾞ", "か\u3099", "\u1e9b\u0323", "\u1100\u1161", "\u1100\u1161\u11a8"]
    rows = []
    for source in sources:
        # Spaces at the ends would be cut.
        target = normalizer.normalize("x" + source + "x").replace("▁", " ")[1:-1]
        if target != source:
            rows.append(" ".join(f"{ord(c):X}" for c in source) + "\t" + " ".join(f"{ord(c):X}" for c in target))
    return "\n".join(rows) + "\n"


def train():
    OUT.mkdir(parents=True, exist_ok=True)
    rules = OUT / "rules.tsv"
    rules.write_text(nmt_rules())
    byte_bpe = dict(
        model_type="bpe", vocab_size=1500, byte_fallback=True, character_coverage=0.995, split_digits=True,
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
        user_defined_symbols=["<extra_id_0>", "<extra_id_1>", "\n"], allow_whitespace_only_pieces=True,
        pad_id=0, unk_id=1, bos_id=2, eos_id=3)
    nmt_bpe = dict(
        model_type="bpe", vocab_size=1600, character_coverage=0.999, normalization_rule_tsv=str(rules),
        user_defined_symbols=["<sep>"])
    unigram = dict(
        model_type="unigram", vocab_size=1500, character_coverage=0.999, normalization_rule_tsv=str(rules),
        user_defined_symbols=["<extra_id_0>", "ﬁ!"], pad_id=3)
    for name, options in [("byte_bpe", byte_bpe), ("nmt_bpe", nmt_bpe), ("unigram", unigram)]:
        model = io.BytesIO()
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus()), model_writer=model, num_threads=1, minloglevel=2, **options)
        # The path of the rules' file is no part of the model.
        proto = spm_pb2.ModelProto.FromString(model.getvalue())
        proto.normalizer_spec.normalization_rule_tsv = ""
        (OUT / f"{name}.model").write_bytes(proto.SerializeToString())
        print(name, len(proto.pieces), "pieces,", proto.ByteSize(), "bytes")
    rules.unlink()


def texts(count, seed, longest=9):
    """Texts of all scripts with odd things in odd places."""
    rng = random.Random(seed)
    names = list(SCRIPTS)
    for index in range(count):
        main = names[index % len(names)]
        parts = []
        for _ in range(rng.randint(0, longest)):
            roll = rng.random()
            if roll < 0.45:
                parts.append(rng.choice(words(main)))
            elif roll < 0.55:
                parts.append(rng.choice(words(rng.choice(names))))
            elif roll < 0.72:
                parts.append(rng.choice(ODD))
            elif roll < 0.78:
                parts.append(rng.choice(CODE))
            elif roll < 0.84:
                parts.append(rng.randbytes(rng.randint(1, 6)).decode("utf-8", errors="replace"))
            elif roll < 0.88:
                parts.append(rng.choice("abc xyz\u0301") * rng.randint(2, 12))
            elif roll < 0.94:
                word = rng.choice(words(main)).encode()
                parts.append(word[:rng.randint(0, len(word))].decode("utf-8", errors="replace"))
            else:
                low, high = rng.choice([(1, 0x2FF), (0x370, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF),
                                        (0x10000, 0x10FFFF)])
                parts.append(chr(rng.randint(low, high)))
            if rng.random() < 0.6:
                parts.append(" ")
        yield "".join(parts)


def edited(name, edits):
    """The model with edits, which src/text/sentencepiece/tests.rs makes too."""
    proto = spm_pb2.ModelProto.FromString((OUT / f"{name}.model").read_bytes())
    for key, value in edits.items():
        if key in ["add_dummy_prefix", "remove_extra_whitespaces", "escape_whitespaces"]:
            setattr(proto.normalizer_spec, key, value)
        elif key in ["treat_whitespace_as_suffix", "unk_surface"]:
            setattr(proto.trainer_spec, key, value)
        elif key == "unused_every":
            for number, piece in enumerate(proto.pieces):
                if piece.type == piece.NORMAL and number % value == 0:
                    piece.type = piece.UNUSED
        elif key == "equal_scores":
            for piece in proto.pieces:
                if piece.type == piece.NORMAL:
                    piece.score = value
        elif key == "user_defined":
            for text in value:
                proto.pieces.add(piece=text, score=0.0, type=4)
        else:
            raise KeyError(key)
    return proto.SerializeToString()


VARIANTS = [
    {"add_dummy_prefix": True},
    {"add_dummy_prefix": False},
    {"remove_extra_whitespaces": True},
    {"remove_extra_whitespaces": False},
    {"add_dummy_prefix": True, "remove_extra_whitespaces": True},
    {"add_dummy_prefix": False, "remove_extra_whitespaces": True},
    {"escape_whitespaces": False},
    {"escape_whitespaces": False, "add_dummy_prefix": True, "remove_extra_whitespaces": True},
    {"treat_whitespace_as_suffix": True, "add_dummy_prefix": True},
    {"treat_whitespace_as_suffix": True, "remove_extra_whitespaces": True, "add_dummy_prefix": True},
    {"unk_surface": ""},
    {"unk_surface": " ?"},
    {"unused_every": 2},
    {"unused_every": 7},
    {"equal_scores": 0.0},
    {"equal_scores": -3.5, "unused_every": 3},
    {"user_defined": ["  ", "   ", "<extra", "<extra_id_10>", "é c", "▁▁▁", "日本", "e\u0301", "Ａ", "\t"],
     "add_dummy_prefix": True},
]


def write(path, rows):
    with open(OUT / path, "w") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=True, separators=(",", ":")) + "\n")


def golden():
    lines = list(texts(3000, seed=2))
    write("lines.jsonl", lines)
    rng = random.Random(3)
    for name in MODELS:
        processor = spm.SentencePieceProcessor(model_file=str(OUT / f"{name}.model"))
        rows = []
        for line in lines:
            ids = processor.encode(line)
            text = processor.decode(ids)
            rows.append({"ids": ids} | ({} if text == line else {"text": text}))
        for _ in range(600):
            high = rng.choice([12, 280, processor.get_piece_size()])
            ids = [rng.randrange(high) for _ in range(rng.randint(0, 12))]
            rows.append({"ids": ids, "text": processor.decode(ids)})
        write(f"{name}.jsonl", rows)
    rows = []
    for number, edits in enumerate(VARIANTS):
        for name in MODELS:
            processor = spm.SentencePieceProcessor(model_proto=edited(name, edits))
            cases = []
            for index in range(number, len(lines), 40):
                ids = processor.encode(lines[index])
                cases.append([index, ids, processor.decode(ids)])
            decoded = []
            for _ in range(40):
                ids = [rng.randrange(rng.choice([9, processor.get_piece_size()])) for _ in range(rng.randint(0, 5))]
                decoded.append([ids, processor.decode(ids)])
            rows.append({"model": name, "edits": edits, "encoded": cases, "decoded": decoded})
    write("variants.jsonl", rows)


if __name__ == "__main__":
    if sys.argv[1:] == ["train"]:
        train()
    elif sys.argv[1:] == ["golden"]:
        golden()
    else:
        sys.exit(__doc__)
