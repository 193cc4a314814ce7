"""How long the notebooks take: the stage of ``python -m tests notebooks``, run once."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from tests.__main__ import COMMANDS
from tests.bench.timing import say
from tests.environment import FIXED, ROOT


@dataclass(frozen=True)
class NotebookTimes:
    """Seconds in all, as by a clock on the wall, and of each notebook's cells."""

    wall: float
    passed: bool
    each: dict[str, float]


def run_notebooks() -> NotebookTimes:
    """All notebooks, executed and compared; their output goes to stderr."""
    say("notebooks: executing all of them")
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        began = time.perf_counter()
        status = subprocess.run(
            [sys.executable, "-m", *COMMANDS["notebooks"], f"--junitxml={report}"],
            cwd=ROOT, env=os.environ | FIXED, stdin=subprocess.DEVNULL, stdout=sys.stderr,
            check=False,
        ).returncode  # fmt: skip
        wall = time.perf_counter() - began
        each = read_report(report.read_text(encoding="utf-8"))
    say(f"notebooks: {wall:.0f} s")
    return NotebookTimes(wall, status == 0, each)


def read_report(xml: str) -> dict[str, float]:
    """Seconds of each notebook, the sum of its cells', out of pytest's report."""
    seconds: dict[str, float] = defaultdict(float)
    for case in ElementTree.fromstring(xml).iter("testcase"):
        seconds[case.get("classname", "?")] += float(case.get("time", 0))
    return dict(seconds)
