"""Runs a command and prints its duration, exit code and last lines as JSON."""

import json
import subprocess
import sys
import time


def main() -> None:
    start = time.perf_counter()
    done = subprocess.run(sys.argv[1:], capture_output=True, text=True)
    seconds = time.perf_counter() - start
    tail = lambda text: text.strip().splitlines()[-6:]
    answer = {"seconds": round(seconds, 3), "exit_code": done.returncode, "out": tail(done.stdout), "err": tail(done.stderr)}
    print(json.dumps(answer, indent=1))
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
