"""Prints the GPU, its driver and the software versions; with --bandwidth, also its memory copy bandwidth."""

import json
import subprocess
import sys

import torch


def main() -> None:
    properties = torch.cuda.get_device_properties(0)
    found = {
        "gpu": torch.cuda.get_device_name(0),
        "compute_capability": list(torch.cuda.get_device_capability(0)),
        "memory_bytes": properties.total_memory,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"],
            capture_output=True,
            text=True,
        ).stdout.strip(),
    }
    if "--bandwidth" in sys.argv:
        source = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(3):
            target.copy_(source)
        begin.record()
        for _ in range(10):
            target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        # Each byte is read once and written once.
        found["copy_bytes_per_second"] = 2 * source.numel() * 10 / (begin.elapsed_time(end) / 1e3)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
