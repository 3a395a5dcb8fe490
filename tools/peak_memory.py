#!/usr/bin/env python3
"""Runs a command and prints its time and the most private memory it had (anonymous pages: mapped files do not count).

    python tools/peak_memory.py target/release/aotron build build/8b --recipe cpu -o engines/8b
"""

import re
import subprocess
import sys
import threading
import time


class Sampler:
    """Looks at a process's memory every 20 ms, inside a `with` that the process ends in."""

    def __init__(self, process: subprocess.Popen):
        self.private = self.resident = 0
        """Most bytes of anonymous pages, and of all resident ones."""
        self._process, self._ended = process, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Sampler":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.is_set():
            try:
                with open(f"/proc/{self._process.pid}/status") as status:
                    found = dict(re.findall(r"^(RssAnon|VmHWM):\s+(\d+) kB", status.read(), re.MULTILINE))
                self.private = max(self.private, int(found.get("RssAnon", 0)) * 1024)
                self.resident = max(self.resident, int(found.get("VmHWM", 0)) * 1024)
            except OSError:
                pass
            self._ended.wait(0.02)


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    start = time.perf_counter()
    process = subprocess.Popen(sys.argv[1:])
    with Sampler(process) as peak:
        process.wait()
    seconds = time.perf_counter() - start
    print(
        f"{seconds:.1f} s, exit code {process.returncode}, private memory at most {peak.private / 2**30:.2f} GiB, "
        f"resident with mapped files {peak.resident / 2**30:.2f} GiB",
        file=sys.stderr,
    )
    sys.exit(process.returncode)


if __name__ == "__main__":
    main()
