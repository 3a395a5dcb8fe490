"""summary.py RESULTS: the answers of run.py as Markdown, whichever there are."""

import json
import sys
from pathlib import Path


def of(folder):
    found = {}
    for path in sorted(Path(folder).glob("*.json")):
        try:
            found[path.stem] = json.loads(path.read_text())
        except ValueError:
            found[path.stem] = {"status": "failed", "said": ["its file is not JSON"]}
    answer = lambda name: found.get(name, {}).get("answer")
    rows = [*machine(answer("machine"), answer("bandwidth")), *acceptance(found), *logits(found)]
    rows += speed(found, (answer("bandwidth") or {}).get("copy_bytes_per_second") if isinstance(answer("bandwidth"), dict) else None)
    return "\n".join([*rows, *times(found), *problems(found)]) + "\n"


def machine(found, copies):
    if not isinstance(found, dict):
        return ["The machine is not known: see machine.log."]
    memory = found["memory_bytes"] / 1e9
    lines = [f"{found['gpu']} (SM {found['sm'] / 10}, {memory:.0f} GB), CUDA {found['driver_cuda']}; {found['nvidia_smi']}"]
    if isinstance(copies, dict):
        lines.append(f"copies {copies['copy_bytes_per_second'] / 1e12:.2f} TB/s (read and written)")
    return lines


def acceptance(found):
    names = [name for name in found if name.startswith("acceptance-")]
    if not names:
        return []
    lines = ["", "| library, target, weight | attention | built | runs | linear error | attention error | us, 1 token |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name in names:
        told = found[name].get("answer")
        for attends in ("mask", "lengths"):
            part = told.get(attends) if isinstance(told, dict) else None
            if not isinstance(part, dict):
                lines.append(f"| {name[11:]} | {attends} | {found[name]['status']} | | | | |")
                continue
            words = part.get("exception") or (part.get("log") or [""])[-1][:120]
            runs = [part[key] for key in part if key.startswith("tokens_")]
            one = part.get("tokens_1", {})
            worst = lambda key: f"{max(run[key] for run in runs if key in run):.1e}" if any(key in r for r in runs) else ""
            good = all(run.get("good") for run in runs) if runs else words
            lines.append(
                f"| {name[11:]} | {attends} | {part.get('built', words)} | {good} | {worst('product_relative_error')} "
                f"| {worst('attention_relative_error')} | {one.get('microseconds_per_run', '')} |"
            )
    return lines


def logits(found):
    names = [name for name in found if name.startswith(("logits-", "verify-"))]
    if not names:
        return []
    lines = ["", "| plan | verdict | worst relative error | same best token | answers as the CPU's |", "|---|---|---|---|---|"]
    for name in names:
        told = found[name].get("answer")
        if not (isinstance(told, dict) and "logits" in told):
            lines.append(f"| {name} | {found[name]['status']} | | | |")
            continue
        rows, answers = told["logits"], list(told["answers"].values())
        worst = max(row["worst_relative_error"] for row in rows)
        same = min(row["same_best_token"] for row in rows)
        verdict = "good" if told["good"] else "WRONG"
        lines.append(f"| {name} | {verdict} | {worst:.2e} | {same:.3f} | {sum(a['same'] for a in answers)} of {len(answers)} |")
    return lines


def speed(found, rate):
    lines = ["", "| speed | batch | prefill tokens/s | decode tokens/s | at most, by the copy rate |", "|---|---|---|---|---|"]
    for name, told in found.items():
        cases = told["answer"].get("cases", []) if isinstance(told.get("answer"), dict) else []
        if not name.startswith(("speed-", "peer-")):
            continue
        if not cases:
            lines.append(f"| {name} | | {told['status']} | | |")
        for case in cases:
            median = lambda key: case[key]["median"] if isinstance(case[key], dict) else case[key]
            floor = ""
            if rate and "weight_bytes_per_token" in case:
                floor = f"{rate / (case['weight_bytes_per_token'] + case['kv_bytes_per_token']):.0f}"
            prefill, decode = median("prefill_tokens_per_second"), median("decode_tokens_per_second")
            lines.append(f"| {name} | {case['batch']} | {prefill:.0f} | {decode:.1f} | {floor} |")
    return lines if len(lines) > 3 else []


def times(found):
    names = [name for name in found if name.startswith(("finish-", "build-", "start-", "checkpoint-")) and "seconds" in found[name]]
    return ["", *(f"- {name}: {found[name]['seconds']:.1f} s, {found[name]['status']}" for name in names)] if names else []


def problems(found):
    bad = {name: told for name, told in found.items() if told["status"] != "ok"}
    lines = [f"- {name} {told['status']}: {(told.get('said') or [told.get('why', '')])[-1:]}" for name, told in bad.items()]
    counts = f"{len(found) - len(bad)} of {len(found)} questions answered"
    return ["", counts + ("; the others:" if lines else "."), *lines]


if __name__ == "__main__":
    print(of(sys.argv[1]))
