"""Equality with SentencePiece on 20,000 lines, and speed beside it; writes docs/tokenizer.md.

    cargo build --release --locked --example tokenizer
    python tools/compare_tokenizer.py [release|debug]

Rounds alternate between the program and SentencePiece on the same lines, one thread each, so that both see the same
minutes of a shared machine.
"""

import datetime
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import sentencepiece as spm

import make_tokenizers

PROFILE = sys.argv[1] if len(sys.argv) > 1 else "release"
PROGRAM = f"target/{PROFILE}/examples/tokenizer"
PROFILES = {
    "release": "built with `--release`",
    "debug": "built with the profile of tests: optimized a step less than a release, with overflow checks",
}
LINES = 20_000
ROUNDS = 3

TEXT = """# Tokenizers beside SentencePiece

Written by `tools/compare_tokenizer.py` on {date}, sentencepiece {version}, two cores of a shared machine: ratios of
medians are what to read, not seconds.

{lines:,} lines ({bytes:,} bytes) in twelve scripts with emoji, code, control characters, special pieces and malformed UTF-8
replaced by U+FFFD, made by `tools/make_tokenizers.py` with a seed its golden files do not use. Compared are all ids of
all lines, and the text those ids decode to.

| model | pieces | lines with equal ids | lines decoded equal | encode, times SentencePiece's speed | decode |
| --- | --- | --- | --- | --- | --- |
{rows}

`byte_bpe`, `nmt_bpe` and `unigram` are the models of tests/data/tokenizers, `tiny-chat` that of tests/data/tiny-chat. The
three large ones are trained when the script runs, on the texts and the source of this repository, with the whole table of
`nmt_nfkc` where they have it.

Encoding and decoding are timed over all lines, one thread, {rounds} alternating rounds of one run each. On aotron's side
that is the library from Rust (`benches/tokenizer.rs`), {profile}. On SentencePiece's it is its Python package, called once with the list of all lines
(`num_threads=1`), so the figures contain its making of Python lists and strings, but no call for each line.
{long}"""

LONG = """
Long texts, {bytes:,} bytes each, encoded once ({model}):

| text | equal ids | aotron | SentencePiece |
| --- | --- | --- | --- |
{rows}
"""


def large_model(**options):
    """A model trained on all there is here."""
    lines = make_tokenizers.corpus()
    for path in sorted(Path("src").rglob("*.rs")):
        lines += [line for line in path.read_text().split("\n") if line.strip()]
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, num_threads=1, minloglevel=2, **options)
    return model.getvalue()


def timed(run):
    started = time.perf_counter()
    result = run()
    return result, time.perf_counter() - started


def ours(model, lines):
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
        file.flush()
        done = subprocess.run([PROGRAM, str(model), file.name, "1"], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def compare(model, lines):
    """Equal ids, equal texts, and the medians' ratios of both."""
    processor = spm.SentencePieceProcessor(model_file=str(model))
    seconds = {"our encode": [], "their encode": [], "our decode": [], "their decode": []}
    for _ in range(ROUNDS):
        report = ours(model, lines)
        ids, encode = timed(lambda: processor.encode(lines, num_threads=1))
        texts, decode = timed(lambda: processor.decode(ids, num_threads=1))
        seconds["our encode"] += report["encode_seconds"]
        seconds["our decode"] += report["decode_seconds"]
        seconds["their encode"].append(encode)
        seconds["their decode"].append(decode)
    medians = {what: statistics.median(values) for what, values in seconds.items()}
    return {
        "pieces": processor.get_piece_size(),
        "ids": sum(a == b for a, b in zip(ids, report["ids"], strict=True)),
        "texts": sum(a == b for a, b in zip(texts, report["texts"], strict=True)),
        "encode": medians["their encode"] / medians["our encode"],
        "decode": medians["their decode"] / medians["our decode"],
    }


def long_texts(name, model):
    processor = spm.SentencePieceProcessor(model_file=str(model))
    words = " ".join(make_tokenizers.texts(40_000, seed=12))
    size = 1 << 20
    rows = []
    for what, text in [("one letter", "a" * size), ("letters without spaces", words.replace(" ", "")),
                       ("words", words)]:
        text = text.encode()[:size].decode(errors="ignore")
        report = ours(model, [text])
        ids, seconds = timed(lambda: processor.encode(text))
        equal = "yes" if ids == report["ids"][0] else "**no**"
        rows.append(f"| {what} | {equal} | {report['encode_seconds'][0]:.2f} s | {seconds:.2f} s |")
    return LONG.format(bytes=size, model=name, rows="\n".join(rows))


def main():
    lines = list(make_tokenizers.texts(LINES, seed=11))
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
        rows, wrong = [], 0
        for name, model in models.items():
            result = compare(model, lines)
            wrong += 2 * LINES - result["ids"] - result["texts"]
            rows.append(f"| {name} | {result['pieces']:,} | {result['ids']:,} | {result['texts']:,} | "
                        f"{result['encode']:.2f} | {result['decode']:.2f} |")
            print(rows[-1], flush=True)
        names = ["bpe, byte fallback, identity", "unigram, nmt_nfkc"]
        long = "".join(long_texts(name, models[name]) for name in names)
    Path("docs/tokenizer.md").write_text(TEXT.format(
        profile=PROFILES[PROFILE], date=datetime.date.today(), version=spm.__version__, lines=LINES, rounds=ROUNDS, rows="\n".join(rows),
        bytes=sum(len(line.encode()) for line in lines), long=long))
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
