"""Run everything that must hold before a commit: ``python -m tests``, or some stages by name.

The stages run in order and all of them, so that one run shows everything that is wrong; only
``browser``, which needs Chromium and several minutes more, waits until it is named. The last line
is the verdict; the line before it counts the tests and notebook cells that really ran.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from tests.browser.lab import chromium
from tests.environment import EXERCISES, FIXED, NOTEBOOKS, ROOT, notebook_paths
from tests.notebooks import health

COMMANDS = {
    "lint": ["ruff", "check", "."],
    "format": ["ruff", "format", "--check", "."],
    "types": ["mypy"],
    # Two processes, a file in one of them, since its tests share what it made.
    "tests": ["pytest", "tests", "--ignore=tests/browser", "-n", "2", "--dist", "loadfile",
              "--no-loadscope-reorder"],
    # A test writes the student's notebooks anew, runs them and compares: not twice. A notebook's
    # cells share a kernel, so that it is in one process, too.
    "notebooks": ["pytest", "--nbval", "notebooks", "--ignore=notebooks/exercises",
                  "-n", "2", "--dist", "loadfile"],
    "browser": ["pytest", "tests/browser", "-n", "2", "--dist", "loadgroup"],
}  # fmt: skip
NAMED = ("browser",)
"""Stages that run only where they are named."""


@dataclass
class Result:
    """What one stage did; the counts stay 0 where a stage has no single tests."""

    name: str
    ok: bool
    seconds: float
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    summary: str = ""  # what the verdict says; the stage's name where empty
    notes: list[str] = field(default_factory=list)


def run_stage(name: str) -> Result:
    """Run one stage, its output going straight to the terminal."""
    command = COMMANDS[name]
    print(f"\n== {name}: {' '.join(command)}", flush=True)
    if name == "browser" and chromium() is None:
        print("no Chromium found; name one in the variable DSV3_CHROMIUM")
        return Result(name, True, 0.0, summary="nothing in a browser, for want of one")
    if name == "notebooks" and not notebook_paths(recurse=True):
        print("no notebook found")
        missing = NOTEBOOKS.is_dir()  # before the first notebook there is no folder
        return Result(
            name, not missing, 0.0, summary="notebooks/ is empty" if missing else "0 notebooks"
        )

    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        extra = [f"--junitxml={report}"] if command[0] == "pytest" else []
        if extra and not sys.stdout.isatty():
            extra.append("--color=no")  # nbval colours its output even in a file
        start = time.perf_counter()
        status = subprocess.run(
            [sys.executable, "-m", *command, *extra],
            cwd=ROOT,
            env=os.environ | FIXED,
            stdin=subprocess.DEVNULL,
            check=False,
        ).returncode
        result = Result(name, status == 0, time.perf_counter() - start)
        if extra:
            count(result, report)
    if name == "notebooks":
        describe_notebooks(result)
    return result


def count(result: Result, report: Path) -> None:
    """Fill in the counts from pytest's report; a run that counted nothing has failed."""
    cases = ElementTree.parse(report).getroot().iter("testcase") if report.exists() else []
    seconds: dict[str, float] = defaultdict(float)
    for case in cases:
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            result.failed += 1
        elif "skipped" in kinds:
            result.skipped += 1
        else:
            result.passed += 1
        seconds[case.get("classname", "")] += float(case.get("time", 0))
    ran = result.passed + result.failed
    result.ok = result.ok and result.passed > 0 and result.failed == 0
    result.summary = f"{result.passed} tests" if result.ok else f"{result.failed} of {ran} tests"
    slowest = sorted(seconds.items(), key=lambda item: -item[1])[:3]
    result.notes.append("slowest: " + ", ".join(f"{n or '?'} {s:.1f} s" for n, s in slowest))


def describe_notebooks(result: Result) -> None:
    """Say how much of the notebooks' output is really compared."""
    paths = [path for path in notebook_paths(recurse=True) if path.parent != EXERCISES]
    counts = [health.comparison(health.read(path)) for path in paths]
    outputs, strict, pictures = (sum(numbers) for numbers in zip(*counts, strict=True))
    share = f"{strict / outputs:.0%}" if outputs else "nothing"
    cells = result.passed + result.failed
    result.summary = f"{len(paths)} notebooks ({cells} cells, {share} compared strictly)"
    if not result.ok:
        result.summary = f"{result.failed} of {cells} cells in {len(paths)} notebooks"
    result.notes.append(
        f"{strict} of {outputs} code cells with outputs are compared strictly ({share}), "
        f"{pictures} of them with pictures, whose pixels nbval does not compare"
    )


def duration(seconds: float) -> str:
    """8.4 s, or 4 min 12 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{round(seconds) // 60} min {round(seconds) % 60} s"


def closing_lines(results: list[Result], seconds: float) -> list[str]:
    """The count of tests and cells, then one line of what passed or what failed."""
    passed, failed, skipped = (
        sum(getattr(result, kind) for result in results) for kind in ("passed", "failed", "skipped")
    )
    counts = f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else "")
    good = ", ".join(result.summary or result.name for result in results if result.ok)
    bad = ", ".join(result.summary or result.name for result in results if not result.ok)
    if not bad:
        return [counts, f"all passed: {good} in {duration(seconds)}"]
    rest = f"; passed: {good}" if good else ""
    return [counts, f"failed: {bad}{rest}; in {duration(seconds)}"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests", description="Run every check.")
    names = ", ".join(COMMANDS)
    parser.add_argument(
        "stages", nargs="*", metavar="STAGE", help=f"{names}; default: all but the last"
    )
    chosen: list[str] = parser.parse_args().stages
    unknown = set(chosen) - set(COMMANDS)
    if unknown:
        parser.error(f"unknown stage {', '.join(sorted(unknown))}; there are {names}")
    chosen = chosen or [name for name in COMMANDS if name not in NAMED]

    start = time.perf_counter()
    results = [run_stage(name) for name in COMMANDS if name in chosen]
    print()
    for result in results:
        verdict = "passed" if result.ok else "FAILED"
        print(f"{result.name:10} {verdict}  {duration(result.seconds):>12}  {result.summary}")
        for note in result.notes:
            print(f"{'':18}{note}")
    print("\n" + "\n".join(closing_lines(results, time.perf_counter() - start)), flush=True)
    return 0 if all(result.ok for result in results) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("\nstopped")
