#!/usr/bin/env python3
"""Charts of `aotron bench --format json` and of tools/peers/compare_speed.py.

    target/release/aotron bench engines/mid --format json > bf16.json
    python tools/plot_bench.py docs/speed.svg bf16.json int8.json
    python tools/plot_bench.py speed.png comparison.json

One row of panels for prefill and one for each batch size and depth of decoding: on the left tokens per second, medians, with the range
from the least to the most as a line; on the right the fraction of what the machine allowed beside the measurement. The format
is that of the file's name (svg, png, pdf). Needs matplotlib.
"""

import argparse
import json
import pathlib
import sys

try:
    import matplotlib
except ImportError:
    sys.exit("plot_bench.py needs matplotlib: pip install matplotlib")

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

COLOURS = ["#2f6fb0", "#e08a3c", "#4c9a6a", "#a05a9c", "#8a8f98", "#c04f4f"]
GRID, TEXT = "#dfe3e8", "#22272e"


def records_of_bench(told, series):
    """(panel, group, series, spread, fraction, limit) of each figure of `aotron bench`."""
    for case in told["cases"]:
        group, held = case["precision"], case["prompt_tokens"] or case["depth"]
        if case["prefill_tokens_per_second"]:
            panel = ("prefill", case["batch"], held)
            yield panel, group, series, case["prefill_tokens_per_second"], case["multiply_fraction"], case["multiply_unit"]
        panel = ("decode", case["batch"], held)
        yield panel, group, series, case["decode_tokens_per_second"], case["bandwidth_fraction"], "memory reads"


def records_of_comparison(told, _series):
    """The same of a comparison with llama.cpp, whose fraction is not measured."""
    for row in told["summary"]:
        panel = ("prefill" if row["cell"] == "prefill" else "decode", row["batch"], row["held_tokens"])
        yield panel, row["pair"], "aotron", row["aotron"], row["fraction"], row["limit"]
        yield panel, row["pair"], "llama.cpp", row["llama"], None, None


def read(paths):
    told = {path: json.loads(path.read_text()) for path in paths}
    # Of several files, a series is an instruction set if these differ, or else they are all one series of several precisions.
    sets = {bench.get("instructions") or bench["target"] for bench in told.values() if "cases" in bench}
    seen, records = set(), []
    for path, content in told.items():
        is_bench = "cases" in content
        series = content.get("instructions") or content.get("target") if is_bench and len(sets) > 1 else "aotron"
        of = records_of_bench if is_bench else records_of_comparison
        for record in of(content, series):
            panel, group, series_name, *rest = record
            if (panel, group, series_name) in seen:
                series_name = f"{series_name} ({path.stem})"
            seen.add((panel, group, series_name))
            records.append((panel, group, series_name, *rest))
    return told, records


def title_of(panel):
    phase, batch, held = panel
    sequences = "1 sequence" if batch == 1 else f"{batch} sequences"
    return f"Prefill of {held:,} tokens, {sequences}" if phase == "prefill" else f"Decode after {held:,} tokens, {sequences}"


def bars(axes, groups, colours, values, ranges, label, inside=False):
    """Grouped bars with their values, a series for each colour; a missing one leaves its place empty."""
    width = 0.8 / len(colours)
    top = max([high for _, high in ranges.values()] + list(values.values()) + [1e-9])
    for index, (name, colour) in enumerate(colours.items()):
        for place, group in enumerate(groups):
            value = values.get((group, name))
            if value is None:
                continue
            x = place + (index - (len(colours) - 1) / 2) * width
            low, high = ranges.get((group, name), (value, value))
            axes.bar(x, value, width * 0.9, color=colour, zorder=2)
            if high > low:
                axes.plot([x, x], [low, high], color=TEXT, linewidth=1, zorder=3)
            style = {"textcoords": "offset points", "ha": "center", "fontsize": 9}
            if inside and value > 0.15 * top:
                axes.annotate(label(value), (x, value), (0, -4), va="top", color="white", fontweight="bold", **style)
            else:
                axes.annotate(label(value), (x, max(value, high)), (0, 3), color=TEXT, **style)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.set_ylim(0, top * 1.18)
    axes.grid(axis="y", color=GRID, zorder=0)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=TEXT)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#9aa2ab")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path, help="the picture: .svg, .png or .pdf")
    parser.add_argument("results", type=pathlib.Path, nargs="+", help="JSON files")
    parser.add_argument("--title", help="heading [default: the machine]")
    options = parser.parse_args()
    try:
        told, records = read(options.results)
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"error: cannot read the results: {error!r}; give files of `aotron bench --format json`", file=sys.stderr)
        return 1
    if not records:
        print("error: there is nothing to draw in these files", file=sys.stderr)
        return 1
    panels = sorted({record[0] for record in records}, key=lambda panel: (panel[0] != "prefill", panel[1:]))
    names = dict.fromkeys(record[2] for record in records)
    series = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}
    with_fraction = {record[2] for record in records if record[4] is not None}
    measured = {name: colour for name, colour in series.items() if name in with_fraction}
    plt.rcParams.update({"font.size": 10, "font.family": "DejaVu Sans", "svg.fonttype": "path", "text.color": TEXT})
    groups_of = {panel: list(dict.fromkeys(r[1] for r in records if r[0] == panel)) for panel in panels}
    most = max(len(groups) for groups in groups_of.values())
    wide = max(3.6, 0.7 * most * len(series) + 1)
    narrow = max(3.2, 0.7 * most * max(1, len(measured)) + 1)
    figure, grid = plt.subplots(
        len(panels),
        2,
        figsize=(wide + narrow, 2.7 * len(panels) + 1),
        width_ratios=[wide, narrow],
        squeeze=False,
        layout="constrained",
        facecolor="white",
    )
    for (left, right), panel in zip(grid, panels):
        own = [record for record in records if record[0] == panel]
        groups = groups_of[panel]
        values = {(r[1], r[2]): r[3]["median"] for r in own}
        ranges = {(r[1], r[2]): (r[3]["min"], r[3]["max"]) for r in own}
        bars(left, groups, series, values, ranges, lambda value: f"{value:,.0f}" if value >= 100 else f"{value:.1f}")
        left.set_title(title_of(panel), loc="left", fontsize=10, fontweight="bold")
        left.set_ylabel("tokens per second", color=TEXT)
        fractions = {(r[1], r[2]): 100 * r[4] for r in own if r[4] is not None}
        if not fractions:
            right.axis("off")
            continue
        bars(right, groups, measured, fractions, {}, lambda value: f"{value:.0f} %", inside=True)
        right.set_ylim(0, max(110, 1.1 * max(fractions.values())))
        right.axhline(100, color="#9aa2ab", linewidth=1, linestyle="--", zorder=1)
        limits = list(dict.fromkeys(r[5] for r in own if r[4] is not None))
        right.set_title("Fraction of " + " or ".join(limits), loc="left", fontsize=10)
        right.set_ylabel("%", color=TEXT)
    machines = []
    for content in told.values():
        machine = content.get("machine") or content
        threads = f"{machine['threads']} threads" if machine.get("threads") else None
        known = [machine.get("cpu") or machine.get("target"), threads, machine.get("instructions")]
        machines.append(", ".join(part for part in known if part))
    figure.get_layout_engine().set(h_pad=0.12, w_pad=0.08)
    figure.suptitle(options.title or "; ".join(dict.fromkeys(machines)), fontsize=11, x=0.01, ha="left")
    if len(series) > 1:
        handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in series.values()]
        figure.legend(handles, list(series), loc="outside lower left", ncols=len(series), frameon=False)
    figure.savefig(options.out, dpi=150, facecolor="white")
    return 0


if __name__ == "__main__":
    sys.exit(main())
