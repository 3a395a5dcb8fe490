#!/usr/bin/env python3
"""Runs a command and prints its time and the most private memory it had (anonymous pages: mapped files do not count).

    python tools/peak_memory.py target/release/aotron build build/8b --recipe cpu -o engines/8b
"""

import re
import subprocess
import sys
import time


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    start = time.perf_counter()
    process = subprocess.Popen(sys.argv[1:])
    peak = {"RssAnon": 0, "VmHWM": 0}
    while process.poll() is None:
        try:
            with open(f"/proc/{process.pid}/status") as status:
                for name, kib in re.findall(r"^(RssAnon|VmHWM):\s+(\d+) kB", status.read(), re.MULTILINE):
                    peak[name] = max(peak[name], int(kib))
        except OSError:
            pass
        time.sleep(0.02)
    seconds = time.perf_counter() - start
    print(
        f"{seconds:.1f} s, exit code {process.returncode}, private memory at most {peak['RssAnon'] / 2**20:.2f} GiB, "
        f"resident with mapped files {peak['VmHWM'] / 2**20:.2f} GiB",
        file=sys.stderr,
    )
    sys.exit(process.returncode)


if __name__ == "__main__":
    main()
