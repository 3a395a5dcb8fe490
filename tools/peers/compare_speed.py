#!/usr/bin/env python3
"""Speed of aotron on a CPU beside llama.cpp on the same weights, in alternating rounds: A B A B.

    tools/peers/build_llama.sh build/peers
    python tools/peers/compare_speed.py --llama build/peers --out build/speed.json \\
        --pair bf16=engines/mid,build/peers/mid-bf16.gguf --pair int8=engines/mid-int8,build/peers/mid-q8_0.gguf

A round measures every pair of an aotron package and a GGUF once: prefill of a prompt, decoding after as many tokens, and decoding
of several sequences after as many tokens each, by `aotron bench`, and by `llama-bench` and `llama-batched-bench`, each without and
with flash attention, of which the one with the better median counts. Both see the same minutes, so compare ratios; but leave the
machine idle, since other load does not slow both alike. aotron's fraction of what the machine allowed beside each measurement is in the last column: of the multiply
instruction's rate for prefill, of the rate of reading memory for decoding.

--isa avx2 sets AOTRON_CPU=avx2 and takes the build of llama.cpp that `LLAMA_CPU=avx2 tools/peers/build_llama.sh` made; give it
packages that were built or repacked for that CPU.

--out is written after each pair of each round, and the same command goes on where it was stopped; with more --rounds it adds
to them. The table is of the rounds that are complete. Needs Python 3.9 or later and no package.
"""

import argparse
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys


class Failure(Exception):
    """A program failed, or did not answer as expected."""


def run(command, **variables):
    """The standard output of a program."""
    command = [str(part) for part in command]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables})
    except OSError as error:
        raise Failure(f"cannot run {command[0]}: {error.strerror}") from error
    if done.returncode != 0:
        raise Failure(f"{' '.join(command)} exited with {done.returncode}: {done.stderr.strip()[-500:]}")
    return done.stdout


def aotron(settings, program, package):
    """The cases of `aotron bench`, by cell."""
    variables = {"AOTRON_CPU": settings["isa"]} if settings["isa"] else {}
    command = [program, "bench", package, "--target", "cpu", "--format", "json", "--repeat", "1"]
    command += ["--threads", settings["threads"], "--decode-tokens", settings["decode_tokens"]]
    alone = json.loads(run([*command, "--prompt-tokens", settings["prompt_tokens"]], **variables))
    batched = [*command, "--depth", settings["prompt_tokens"], "--batch", settings["batch"]]
    together = json.loads(run(batched, **variables))
    prefill = {
        "tokens_per_second": alone["cases"][0]["prefill_tokens_per_second"]["median"],
        "fraction": alone["cases"][0]["multiply_fraction"],
        "limit": alone["cases"][0]["multiply_unit"],
    }
    cells = {"prefill": prefill}
    for cell, told in (("decode", alone), ("decode_batched", together)):
        case = told["cases"][0]
        cells[cell] = {
            "tokens_per_second": case["decode_tokens_per_second"]["median"],
            "fraction": case["bandwidth_fraction"],
            "limit": "memory reads",
            "probe_read_bytes_per_second": case["probe_read_bytes_per_second"],
        }
    return cells, {key: alone[key] for key in ("cpu", "instructions", "threads")}


def llama(settings, programs, model):
    """Tokens per second of llama.cpp, by cell, without and with flash attention."""
    prompt, decoded, batch = (str(settings[key]) for key in ("prompt_tokens", "decode_tokens", "batch"))
    cells = {"prefill": {}, "decode": {}, "decode_batched": {}}
    command = [programs / "llama-bench", "-m", model, "-t", settings["threads"], "-r", "1", "-o", "json"]
    batched = [programs / "llama-batched-bench", "-m", model, "-t", settings["threads"], "-b", "2048"]
    batched += ["-c", settings["batch"] * (settings["prompt_tokens"] + settings["decode_tokens"])]
    batched += ["-npp", prompt, "-ntg", decoded, "-npl", batch, "--output-format", "jsonl"]
    for flash in ("0", "1"):
        for cell, sizes in (("prefill", ["-p", prompt, "-n", "0"]), ("decode", ["-p", "0", "-n", decoded, "-d", prompt])):
            tests = json.loads(run([*command, *sizes, "-fa", flash]))
            if len(tests) != 1:
                raise Failure(f"llama-bench answered {len(tests)} tests, not 1")
            cells[cell][flash] = tests[0]["avg_ts"]
        lines = [line for line in run([*batched, "-fa", ("off", "on")[int(flash)]]).splitlines() if line.startswith("{")]
        if len(lines) != 1:
            raise Failure(f"llama-batched-bench answered {len(lines)} lines, not 1")
        cells["decode_batched"][flash] = json.loads(lines[0])["speed_tg"]
    return cells


def spread(values):
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summary(settings, rounds):
    """A row per pair and cell."""
    rows = []
    for pair in settings["pairs"]:
        own = [entry for entry in rounds if entry["pair"] == pair]
        for cell in ("prefill", "decode", "decode_batched") if own else ():
            ours = spread([entry["aotron"][cell]["tokens_per_second"] for entry in own])
            flash, theirs = max(
                ((flash, spread([entry["llama"][cell][flash] for entry in own])) for flash in ("0", "1")),
                key=lambda of: of[1]["median"],
            )
            fractions = [entry["aotron"][cell]["fraction"] for entry in own]
            rows.append(
                {
                    "pair": pair,
                    "cell": cell,
                    "batch": settings["batch"] if cell == "decode_batched" else 1,
                    "held_tokens": settings["prompt_tokens"],
                    "rounds": len(own),
                    "aotron": ours,
                    "llama": theirs,
                    "flash_attention": flash == "1",
                    "ratio": ours["median"] / theirs["median"],
                    "fraction": None if None in fractions else statistics.median(fractions),
                    "limit": own[0]["aotron"][cell]["limit"],
                }
            )
    return rows


def table(rows):
    names = {"prefill": "prefill", "decode": "decode", "decode_batched": "decode"}
    lines = ["| weights | cell | aotron, tokens/s | llama.cpp, tokens/s | ratio | aotron's fraction |", "| --- " * 6 + "|"]
    for row in rows:
        cell = f"{names[row['cell']]}, batch {row['batch']}"
        shown = [f"{s['median']:.1f} ({s['min']:.1f} to {s['max']:.1f})" for s in (row["aotron"], row["llama"])]
        flash = ", flash attention" if row["flash_attention"] else ""
        fraction = "" if row["fraction"] is None else f"{100 * row['fraction']:.0f} % of {row['limit']}"
        lines.append(f"| {row['pair']} | {cell} | {shown[0]} | {shown[1]}{flash} | {row['ratio']:.2f} | {fraction} |")
    return "\n".join(lines)


def programs_of(folder, isa):
    """The folder of llama.cpp's programs that build_llama.sh made for a CPU."""
    wanted = re.compile(r"llama-build-[0-9.]+" + (f"-{re.escape(isa)}" if isa else ""))
    found = [path / "bin" for path in sorted(folder.glob("llama-build-*")) if wanted.fullmatch(path.name)]
    found = [path for path in found if (path / "llama-bench").exists()]
    if not found:
        how = f"LLAMA_CPU={isa} " if isa else ""
        raise Failure(f"{folder} has no build of llama.cpp for this; make it: {how}tools/peers/build_llama.sh {folder}")
    return found[-1]


def pair_of(text):
    match = re.fullmatch(r"([^=,]+)=([^,]+),([^,]+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text}: a pair is NAME=PACKAGE,MODEL.gguf")
    return match.group(1), [str(pathlib.Path(path).resolve()) for path in match.group(2, 3)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    pair_help = "a name, an aotron package and a GGUF of the same checkpoint; repeat for more"
    parser.add_argument("--pair", type=pair_of, action="append", required=True, metavar="NAME=PACKAGE,GGUF", help=pair_help)
    parser.add_argument("--llama", type=pathlib.Path, required=True, help="the folder that build_llama.sh was given")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="JSON file of the results")
    parser.add_argument("--program", default="target/release/aotron")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--decode-tokens", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8, help="sequences of the batched cell")
    parser.add_argument("--isa", choices=["avx2"], help="instruction set of both [default: the machine's best]")
    options = parser.parse_args()

    settings = {key: getattr(options, key) for key in ("threads", "prompt_tokens", "decode_tokens", "batch", "isa")}
    settings["pairs"] = dict(options.pair)
    results = {"settings": settings, "machine": None, "summary": [], "rounds": []}
    if options.out.exists():
        results = json.loads(options.out.read_text())
        if results["settings"] != settings:
            print(f"error: {options.out} was measured with {results['settings']}; name another file", file=sys.stderr)
            return 2
    rounds = results["rounds"]
    try:
        programs = programs_of(options.llama, options.isa)
        for number in range(options.rounds):
            for pair, (package, model) in settings["pairs"].items():
                if any((entry["round"], entry["pair"]) == (number, pair) for entry in rounds):
                    continue
                load = os.getloadavg()[0]
                ours, results["machine"] = aotron(settings, options.program, package)
                theirs = llama(settings, programs, model)
                rounds.append({"round": number, "pair": pair, "load_before": load, "aotron": ours, "llama": theirs})
                results["summary"] = summary(settings, rounds)
                new = options.out.with_suffix(".new")
                new.write_text(json.dumps(results, indent=1) + "\n")
                new.replace(options.out)
                print(f"round {number + 1} of {options.rounds}, {pair}: done", file=sys.stderr)
    except (Failure, KeyError, IndexError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(results["summary"]))
    busy = sum(entry["load_before"] > options.threads + 1 for entry in rounds)
    if busy:
        print(f"warning: {busy} of {len(rounds)} measurements began under other load; they say little", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
