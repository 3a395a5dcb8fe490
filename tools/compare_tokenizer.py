"""Equality with SentencePiece on 20,000 lines, and speed beside it; writes docs/tokenizer.md.

    python tools/compare_tokenizer.py

Rounds alternate between the program and SentencePiece on the same lines, one thread each, so that both see the same
minutes of a shared machine.
"""

import datetime
import functools
import io
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import sentencepiece as spm
from sentencepiece import sentencepiece_model_pb2 as spm_pb2

import make_tokenizers

LINES = 20_000
ROUNDS = 5
LONG_BYTES = 1 << 20
HUGE = "bpe, of 256,000 pieces"

TEXT = """# Tokenizers compared with SentencePiece

Written by `tools/compare_tokenizer.py` on {date}, sentencepiece {version}, on two cores of a shared machine, so
only ratios of medians are given, not seconds.

{lines:,} lines ({bytes:,} bytes) in twelve scripts with emoji, code, control characters, special pieces and malformed UTF-8
replaced by U+FFFD, made by `tools/make_tokenizers.py` with another seed than its golden files. The comparison covers
all ids of all lines, and the text that they decode to.

| model | pieces | lines with equal ids | lines with equal text | encoding speed relative to SentencePiece | decoding speed |
| --- | --- | --- | --- | --- | --- |
{rows}

`byte_bpe`, `nmt_bpe` and `unigram` are the models of tests/data/tokenizers, `tiny-chat` that of tests/data/tiny-chat. The
three large ones are trained by the script on the texts and the source of this repository, those with `nmt_nfkc` with its
full table.

Encoding and decoding are timed over all lines, one thread, {rounds} alternating rounds of one run each. For aotron
that is the Rust library (`benches/tokenizer.rs`), built with `--release`. For SentencePiece it is the Python package,
called once with the list of all lines (`num_threads=1`), so its times include the construction of Python lists and strings,
but not a call per line.

The model of 256,000 pieces is the large one with byte fallback, extended by random combinations of its pieces to the size
of the 8B model's. Loading it takes {load:.1f} times as long as it takes SentencePiece.

Long texts, {long_bytes:,} bytes each, encoded at once, times SentencePiece's speed; all ids are {equal}:

| model | one letter | letters without spaces | words |
| --- | --- | --- | --- |
{long}
"""


@functools.cache
def program():
    """The path of benches/tokenizer.rs, compiled."""
    command = "cargo bench --no-run --locked --bench tokenizer --message-format json".split()
    messages = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    artifacts = [message for message in map(json.loads, messages) if message["reason"] == "compiler-artifact"]
    return next(a["executable"] for a in artifacts if a["target"]["name"] == "tokenizer" and a["executable"])


def large_model(**options):
    """A model trained on all there is here."""
    lines = make_tokenizers.corpus()
    for path in sorted(Path("src").rglob("*.rs")):
        lines += [line for line in path.read_text().split("\n") if line.strip()]
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, num_threads=1, minloglevel=2, **options)
    return model.getvalue()


def huge_model(model, pieces):
    """A model of so many pieces: those of this one, put together at random."""
    rng = random.Random(5)
    proto = spm_pb2.ModelProto.FromString(model)
    normal = [piece.piece for piece in proto.pieces if piece.type == piece.NORMAL]
    inner = [piece for piece in normal if "▁" not in piece]
    known = {piece.piece for piece in proto.pieces}
    score = min(piece.score for piece in proto.pieces)
    while len(proto.pieces) < pieces:
        text = rng.choice(normal) + rng.choice(inner)
        if len(text) > 16 or text in known:
            continue
        known.add(text)
        score -= 1
        proto.pieces.add(piece=text, score=score)
        normal.append(text)
        if "▁" not in text:
            inner.append(text)
    return proto.SerializeToString()


def timed(run):
    started = time.perf_counter()
    result = run()
    return result, time.perf_counter() - started


def ours(model, lines):
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
        file.flush()
        done = subprocess.run([program(), str(model), file.name, "1"], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def compare(model, lines):
    """Equal ids, equal texts, and how many times as fast as SentencePiece this is, by the medians."""
    content = model.read_bytes()
    seconds = {"our load": [], "their load": [], "our encode": [], "their encode": [], "our decode": [],
               "their decode": []}
    for _ in range(ROUNDS):
        report = ours(model, lines)
        processor, load = timed(lambda: spm.SentencePieceProcessor(model_proto=content))
        ids, encode = timed(lambda: processor.encode(lines, num_threads=1))
        texts, decode = timed(lambda: processor.decode(ids, num_threads=1))
        seconds["our load"].append(report["load_seconds"])
        seconds["our encode"] += report["encode_seconds"]
        seconds["our decode"] += report["decode_seconds"]
        seconds["their load"].append(load)
        seconds["their encode"].append(encode)
        seconds["their decode"].append(decode)
    medians = {what: statistics.median(values) for what, values in seconds.items()}
    return {
        "pieces": processor.get_piece_size(),
        "ids": sum(a == b for a, b in zip(ids, report["ids"], strict=True)),
        "texts": sum(a == b for a, b in zip(texts, report["texts"], strict=True)),
    } | {what: medians[f"their {what}"] / medians[f"our {what}"] for what in ["load", "encode", "decode"]}


def main():
    lines = list(make_tokenizers.texts(LINES, seed=11))
    words = " ".join(make_tokenizers.texts(40_000, seed=12))
    long_texts = [text.encode()[:LONG_BYTES].decode(errors="ignore")
                  for text in ["a" * LONG_BYTES, words.replace(" ", ""), words]]
    with tempfile.TemporaryDirectory() as folder:
        models = {name: Path("tests/data/tokenizers") / f"{name}.model" for name in make_tokenizers.MODELS}
        models["tiny-chat"] = Path("tests/data/tiny-chat/tokenizer.model")
        for name, options in [
            ("bpe, byte fallback, identity", dict(
                model_type="bpe", byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False,
                remove_extra_whitespaces=False, user_defined_symbols=["<extra_id_0>", "<extra_id_1>"])),
            ("bpe, nmt_nfkc", dict(model_type="bpe")),
            ("unigram, nmt_nfkc", dict(model_type="unigram")),
        ]:
            models[name] = Path(folder) / f"{len(models)}.model"
            models[name].write_bytes(large_model(vocab_size=12_000, hard_vocab_limit=False, **options))
        models[HUGE] = Path(folder) / "huge.model"
        models[HUGE].write_bytes(huge_model(models["bpe, byte fallback, identity"].read_bytes(), 256_000))
        rows, long_rows, wrong, unequal = [], [], 0, 0
        for name, model in models.items():
            result = compare(model, lines)
            wrong += 2 * LINES - result["ids"] - result["texts"]
            rows.append(f"| {name} | {result['pieces']:,} | {result['ids']:,} | {result['texts']:,} | "
                        f"{result['encode']:.2f} | {result['decode']:.2f} |")
            print(rows[-1], flush=True)
            if name == HUGE:
                load = 1 / result["load"]
            long = [compare(model, [text]) for text in long_texts]
            unequal += sum(1 - result["ids"] for result in long)
            long_rows.append(f"| {name} | " + " | ".join(f"{result['encode']:.2f}" for result in long) + " |")
            print(long_rows[-1], flush=True)
    Path("docs/tokenizer.md").write_text(TEXT.format(
        date=datetime.date.today(), version=spm.__version__, lines=LINES, rounds=ROUNDS, rows="\n".join(rows), load=load,
        bytes=sum(len(line.encode()) for line in lines), long_bytes=LONG_BYTES, long="\n".join(long_rows),
        equal="equal" if unequal == 0 else f"**not equal for {unequal} of the texts**"))
    sys.exit(wrong + unequal > 0)


if __name__ == "__main__":
    main()
