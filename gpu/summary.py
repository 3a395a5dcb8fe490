"""summary.py RESULTS: formats the results of run.sh as Markdown for docs/gpu.md."""

import json
import sys
from pathlib import Path


def main() -> None:
    folder = Path(sys.argv[1])
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json")) if path.stat().st_size}
    machine = found.get("bandwidth") or found.get("machine") or {}
    print(f"{machine.get('gpu')}, driver {machine.get('driver')}, CUDA {machine.get('cuda')}, torch {machine.get('torch')}")
    if rate := machine.get("copy_bytes_per_second"):
        print(f"copies {rate / 1e12:.2f} TB/s (read and written)")
    print("\n| TensorRT for RTX | builds | runs | linear error | attention error | us, 1 token |\n|---|---|---|---|---|---|")
    for mode, answer in found.get("acceptance", {}).items():
        if isinstance(answer, dict):
            one = answer.get("tokens_1", {})
            words = answer.get("exception") or (answer.get("log") or [""])[-1][:120]
            print(
                f"| {mode} | {answer.get('built', words)} | {one.get('enqueued', words)} "
                f"| {one.get('product_relative_error', '')} | {one.get('attention_relative_error', '')} "
                f"| {one.get('microseconds_per_run', '')} |"
            )
    print("\n| plan | worst relative error | same best token | answers as the CPU's |\n|---|---|---|---|")
    for name, answer in found.items():
        if name.startswith("logits-"):
            rows, answers = answer["logits"], answer["answers"].values()
            worst = max(row["worst_relative_error"] for row in rows)
            same = min(row["same_best_token"] for row in rows)
            print(f"| {name[7:]} | {worst:.2e} | {same:.3f} | {sum(a['same'] for a in answers)} of {len(answers)} |")
    print("\n| speed | batch | prefill tokens/s | decode tokens/s | bytes a step / copy rate, tokens/s |\n|---|---|---|---|---|")
    for name, answer in found.items():
        if name.startswith("speed-") or name == "peer":
            for figure in answer["figures"]:
                median = lambda key: figure[key]["median"] if isinstance(figure[key], dict) else figure[key]
                if "error" in figure:
                    print(f"| {name} | {figure['batch']} | {figure['error']} | | |")
                    continue
                floor = ""
                if rate and "decode_step_bytes" in figure:
                    floor = f"{figure['batch'] * rate / figure['decode_step_bytes']:.0f}"
                prefill, decode = median("prefill_tokens_per_second"), median("decode_tokens_per_second")
                print(f"| {name} | {figure['batch']} | {prefill:.0f} | {decode:.1f} | {floor} |")
    for name, answer in found.items():
        if "exit_code" in answer:
            print(f"- {name}: {answer['seconds']} s, exit code {answer['exit_code']} {answer['err'][-1:]}")
    for path in sorted(folder.glob("*.err")):
        print(f"- {path.stem} said: {path.read_text().strip().splitlines()[-1:]}")


if __name__ == "__main__":
    main()
