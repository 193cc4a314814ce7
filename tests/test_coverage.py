"""The command that measures which lines tests reach: it counts, and fails where it should."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.environment import ROOT


def test_one_file_does_not_reach_enough() -> None:
    """One test file passes, reaches its own module, and the rest of the package is missing."""
    # Where the tests themselves are measured, the processes that they start would be, too.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.coverage", "tests/test_config.py", "-n0"],
        cwd=ROOT, env=kept, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    lines = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line}
    assert " passed in " in done.stdout
    own, another = (
        int(lines[f"dsv3_mini/{name}.py"][3].rstrip("%")) for name in ("config", "speculative")
    )
    assert own > another, "what the file is about is reached, the rest only imported"
    assert "less than fail-under=95" in done.stdout
