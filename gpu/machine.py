"""machine.py [--bandwidth]: the GPU, its driver and the software here as JSON, or its memory bandwidth."""

import json
import os
import platform
import subprocess
import sys
import time

import cuda


def words(command):
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()
    except OSError as error:
        return f"{command[0]}: {error}"


def version(package):
    try:
        from importlib.metadata import version as installed

        return installed(package)
    except Exception:
        return None


def bandwidth(driver, gpu):
    """Bytes a second of a copy within the GPU's memory, each byte counted as read and as written."""
    size = int(os.environ.get("AOTRON_COPY_BYTES", 2 << 30))
    card = cuda.Gpu(driver, gpu["index"])
    source, target = card.allocate(size), card.allocate(size)
    seconds = []
    for _ in range(5):
        card.wait()
        start = time.perf_counter()
        for _ in range(10):
            card.copy(target, source, size)
        card.wait()
        seconds.append((time.perf_counter() - start) / 10)
    # The first round also raises the clocks.
    return {"gpu": gpu["name"], "copied_bytes": size, "copy_bytes_per_second": 2 * size / sorted(seconds[1:])[1]}


def main():
    driver = cuda.Driver()
    gpu = cuda.chosen(driver)
    if "--bandwidth" in sys.argv:
        print(json.dumps(bandwidth(driver, gpu), indent=1))
        return
    fields = "name,driver_version,clocks.max.sm,clocks.max.mem,power.limit,pci.bus_id"
    print(
        json.dumps(
            {
                "gpu": gpu["name"],
                "index": gpu["index"],
                "sm": gpu["sm"],
                "memory_bytes": gpu["memory_bytes"],
                "target": cuda.target_of(gpu["sm"]),
                "gpus": driver.gpus(),
                "driver_cuda": driver.cuda_version(),
                "nvidia_smi": words(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]),
                "python": platform.python_version(),
                "libc": " ".join(platform.libc_ver()),
                "cores": os.cpu_count(),
                "packages": {name: version(name) for name in ("torch", "transformers", "numpy", "tensorrt", "tensorrt_rtx")},
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
