"""What the checks of clients share: the server's address, one line a check, and what `aotron run` answers."""

import json
import os
import subprocess
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request

PROMPT = "<extra_id_0>System\n{system}\n<extra_id_1>User\n{user}\n<extra_id_1>Assistant\n"
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
CHECKPOINT = os.path.join(ROOT, "tests", "data", "tiny-chat")


def base_url():
    """The server's address, such as http://127.0.0.1:8000, from the command line."""
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} BASE_URL")
    return sys.argv[1].rstrip("/")


class Checks:
    """Counts checks and prints a line for each."""

    def __init__(self, client):
        self.client, self.passed, self.failed = client, 0, 0

    def that(self, name, holds, found=""):
        self.passed += bool(holds)
        self.failed += not holds
        verdict = "ok  " if holds else "FAIL"
        print(f"{verdict} {self.client}: {name}" + ("" if holds else f": {found}"), flush=True)
        return bool(holds)

    def equal(self, name, found, expected):
        return self.that(name, found == expected, f"found {found!r}, expected {expected!r}")

    def raises(self, name, errors, words, call):
        """Checks that a call fails as expected; returns the error."""
        try:
            found = call()
        except errors as error:
            self.that(name, all(word in str(error) for word in words), f"{error!r} lacks one of {words}")
            return error
        except Exception as error:
            self.that(name, False, f"another error: {error!r}")
            return None
        self.that(name, False, f"no error, but {found!r}")
        return None

    def runs(self, name, call):
        """Calls a function that makes checks; an exception in it is a failed check."""
        try:
            return call()
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)
            own = [frame for frame in at if frame.filename.startswith(os.path.dirname(os.path.abspath(__file__)))]
            line = own[-1].lineno if own else at[-1].lineno
            self.that(name, False, f"line {line}: {error!r} {error}")
            return None

    def end(self):
        print(f"{self.client}: {self.passed} passed, {self.failed} failed", flush=True)
        sys.exit(1 if self.failed or not self.passed else 0)


def card_prompt(user, system=""):
    """The model card's prompt format."""
    return PROMPT.format(system=system, user=user)


def aotron(*arguments, text=None):
    """Standard output of the program that also serves; its engine follows the command's name."""
    program, engine = os.environ["AOTRON"], os.environ["ENGINE"]
    command = [program, arguments[0], engine, *arguments[1:]]
    return subprocess.run(command, input=text, check=True, capture_output=True, text=True).stdout


def run_raw(prompt, *arguments):
    """What `aotron run --raw` makes of a prompt: a dictionary with text, token_ids and finish_reason."""
    return json.loads(aotron("run", "--raw", "--format", "json", *arguments, "--prompt-file", "-", text=prompt))


def get(url, body=None, headers=None):
    """Status and body of a plain request, for what a client does not show."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json", **(headers or {})}
    request = urllib.request.Request(url, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=600) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def while_busy(url, call, headers=None, seconds=4):
    """Calls a function while other requests have all slots for some seconds; returns its result and the seconds it took.

    The others are of a priority that comes first, so a stream that waits behind them sends nothing but comments at first.
    """
    ends = time.monotonic() + seconds
    body = {"prompt": "a", "n": 16, "max_tokens": 100, "ignore_eos": True, "priority": -1}

    def keep_busy():
        while time.monotonic() < ends:
            get(f"{url}/v1/completions", body, headers)

    threads = [threading.Thread(target=keep_busy, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    started = time.monotonic()
    result = call()
    took = time.monotonic() - started
    for thread in threads:
        thread.join()
    return result, took
