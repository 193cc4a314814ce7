"""Which lines of the package do unit tests reach? ``python -m tests.coverage``, 15 minutes.

The tests run as in ``python -m tests``, without the browser's, and the processes that they start
are counted, too; copies of the package, as tests make some, are not. Words are pytest's: names of
files, for one, in place of all. Fails where a test does, or below 95 % of lines.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.__main__ import COMMANDS
from tests.environment import FIXED, ROOT

LEAST = 95  # percent
CONFIG = """
[run]
source = {package}
data_file = {data}
parallel = true
sigterm = true
patch =
    subprocess
    _exit
"""


def main(words: Sequence[str]) -> int:
    """0 if the tests pass and reach enough."""
    command = COMMANDS["tests"]
    if words:
        command = [*(word for word in command if word != "tests"), *words]
    with tempfile.TemporaryDirectory(prefix="coverage-") as scratch:
        config = Path(scratch) / "config"
        data = Path(scratch) / "data"
        config.write_text(CONFIG.format(package=ROOT / "dsv3_mini", data=data), encoding="utf-8")

        def coverage(verb: str, *more: str) -> int:
            return subprocess.run(
                [sys.executable, "-m", "coverage", verb, f"--rcfile={config}", *more],
                cwd=ROOT, env=os.environ | FIXED, stdin=subprocess.DEVNULL, check=False,
            ).returncode  # fmt: skip

        failed = coverage("run", "-m", *command)
        missed = coverage("combine", "--quiet") or coverage(
            "report", "--show-missing", "--skip-covered", f"--fail-under={LEAST}"
        )
    return failed or missed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
