"""A pytest plugin that runs those of another server's own tests which a list names, and says why it leaves out the others.

    TEST_LIST=llama_tests.txt pytest -p peer_tests FOLDER

A line of the list is `VERDICT | NAME | REASON`. A name is a test's id, or a part of it up to `[`, `::` or `/` that stands
for all tests in it, or any beginning followed by `*`; of several that fit, the longest counts. The verdicts:

    run     the test has to pass
    fails   the test runs and has to fail, for the reason given; if it passes, that is an error
    out     the test is left out, for the reason given

A test of which the list says nothing is an error, and so is a line without a test.
"""

import collections
import os
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Line:
    verdict: str
    name: str
    reason: str

    def fits(self, test):
        if self.name.endswith("*"):
            return test.startswith(self.name[:-1])
        return test == self.name or test.startswith((self.name + "[", self.name + "::", self.name + "/"))

    @property
    def file(self):
        return self.name.split("::")[0]


def read_list(path):
    lines = []
    for number, text in enumerate(Path(path).read_text().splitlines(), 1):
        if not text or text.startswith("#"):
            continue
        fields = [field.strip() for field in text.split(" | ")]
        verdict, name, reason = fields + [""] * (3 - len(fields)) if len(fields) <= 3 else ("", "", "")
        if verdict not in ("run", "fails", "out") or not name or (verdict == "run") == bool(reason):
            raise pytest.UsageError(f"{path}:{number}: not `run | NAME`, `fails | NAME | REASON` or `out | NAME | REASON`")
        lines.append(Line(verdict, name, reason))
    return lines


class Selection:
    """Applies a list to the collected tests."""

    def __init__(self, lines):
        self.lines = lines
        self.left_out = collections.Counter()
        """How many tests each line leaves out; 0 for a file that is not read."""
        self.files_left_out = {line.file for line in lines} - {line.file for line in lines if line.verdict != "out"}

    def line_of(self, test):
        return max((line for line in self.lines if line.fits(test)), key=lambda line: len(line.name), default=None)

    @pytest.hookimpl
    def pytest_ignore_collect(self, collection_path, config):
        """Files of which nothing runs are not imported."""
        if collection_path.suffix != ".py" or not collection_path.name.startswith("test_"):
            return None
        name = collection_path.relative_to(config.rootpath).as_posix()
        return True if name in self.files_left_out else None

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items):
        kept, left_out, used, unknown = [], [], set(), []
        for item in items:
            line = self.line_of(item.nodeid)
            used.add(line)
            if line is None:
                unknown.append(item.nodeid)
            elif line.verdict == "out":
                self.left_out[line] += 1
                left_out.append(item)
            else:
                if line.verdict == "fails":
                    item.add_marker(pytest.mark.xfail(reason=line.reason, strict=True))
                kept.append(item)
        files = {item.nodeid.split("::")[0] for item in items}
        stale = [line.name for line in self.lines if line.file in files and line not in used and line.name != line.file]
        if unknown or stale:
            raise pytest.UsageError("\n".join([f"not in the list: {name}" for name in unknown] +
                                              [f"in the list, but no such test: {name}" for name in stale]))
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept

    def pytest_terminal_summary(self, terminalreporter):
        self.left_out.update({line: 0 for line in self.lines if line.file in self.files_left_out})
        terminalreporter.section("left out")
        for line, count in sorted(self.left_out.items(), key=lambda pair: pair[0].name):
            number = f"{count} of " if count else ""
            terminalreporter.write_line(f"{number}{line.name}: {line.reason}")


def pytest_configure(config):
    config.pluginmanager.register(Selection(read_list(os.environ["TEST_LIST"])), "peer-test-selection")
