"""Try deliberate mistakes: ``python -m tests.mutants``, or some by number or name.

Each mistake is made in a fresh copy of the package and the tests, and the tests named beside it
run there until the first fails. It counts as caught if a test did its work and failed, by an
assertion or an error that the package raises on purpose; code that no longer runs does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.environment import FIXED, ROOT
from tests.mutants import MISTAKES, MUTANTS
from tests.mutants.mutant import Mutant
from tests.mutants.witness import FILE

Ignore = Callable[[str, list[str]], set[str]]
REPORT = Path(__file__).with_name("report.md")
COPIED = ("dsv3_mini", "tests", "pyproject.toml")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "assets", "notebooks", "browser")
SECONDS = 300  # a mistake may make a loop endless
# Without nbval and the like, whose import takes longer than most tests; ``addopts`` needs them.
PLUGINS = ["-o", "addopts=", "-p", "no:cacheprovider", "-p", "tests.mutants.witness"]
OWN = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONDONTWRITEBYTECODE": "1"}


@dataclass(frozen=True)
class Outcome:
    """What became of one mistake."""

    mutant: Mutant
    caught: bool
    by: str
    """The test that failed first; if none did as it should, what happened instead."""


def copy(
    source: Path, target: Path, names: Sequence[str] = COPIED, left_out: Ignore = LEFT_OUT
) -> None:
    """The package and its tests, without what no test of a mistake reads; or what is named."""
    target.mkdir()
    for name in names:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, ignore=left_out)
        else:
            shutil.copy2(source / name, target / name)


def run(folder: Path, tests: Sequence[str]) -> tuple[int, str]:
    """Pytest's exit status in a copy, and the end of what it wrote; -1 if it took too long."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", *PLUGINS, *tests]
    try:
        done = subprocess.run(
            command, cwd=folder, env=os.environ | FIXED | OWN, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return -1, f"no end after {SECONDS} s"
    return done.returncode, (done.stdout + done.stderr)[-3000:]


def judge(mutant: Mutant, folder: Path, status: int, output: str) -> Outcome:
    """Whether a test saw the mistake, from what the witness noted."""
    if not (folder / FILE).exists():
        return Outcome(mutant, False, f"no verdict, exit status {status}: {output[-300:]}")
    seen = json.loads((folder / FILE).read_text(encoding="utf-8"))
    first = seen["first"]
    if first and first["when"] == "call" and status == 1:
        if not all(Path(path).is_relative_to(folder) for path in seen["imported"]):
            return Outcome(mutant, False, f"not the copy was tested: {seen['imported']}")
        # Failed is pytest.fail, as when an error was expected and did not come.
        if {"AssertionError", "ValueError", "Failed", mutant.crash} & set(first["errors"]):
            return Outcome(mutant, True, first["test"])
    if first:
        return Outcome(mutant, False, f"BROKEN: {first['errors'][0]} in {first['test']}")
    return Outcome(mutant, False, "SURVIVED" if status == 0 else f"exit status {status}")


def attempt(mutant: Mutant, base: Path) -> Outcome:
    """Make the mistake in a copy of ``base`` and run its tests there."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as scratch:
        folder = Path(scratch).resolve() / "copy"
        copy(base, folder)
        path = folder / mutant.path
        path.write_text(mutant.apply(path.read_text(encoding="utf-8")), encoding="utf-8")
        return judge(mutant, folder, *run(folder, mutant.tests))


def select(words: Sequence[str], sample: int | None, mutants: Sequence[Mutant]) -> list[Mutant]:
    """By the mistake's number or a part of the name; ``sample`` takes some, evenly spread."""
    chosen = list(mutants)
    for word in words:
        if not any(matches(word, mutant) for mutant in mutants):
            raise SystemExit(f"no mistake is called or numbered {word!r}")
    if words:
        chosen = [m for m in mutants if any(matches(word, m) for word in words)]
    if sample is not None:
        many = min(max(sample, 1), len(chosen))
        chosen = [chosen[i * len(chosen) // many] for i in range(many)]
    return chosen


def matches(word: str, mutant: Mutant) -> bool:
    return mutant.mistake == int(word) if word.isdigit() else word.lower() in mutant.name.lower()


def totals(outcomes: Sequence[Outcome]) -> str:
    caught = sum(outcome.caught for outcome in outcomes)
    survived = sum(outcome.by == "SURVIVED" for outcome in outcomes)
    kinds = len({outcome.mutant.mistake for outcome in outcomes})
    rest = len(outcomes) - caught - survived
    return (
        f"{caught} of {len(outcomes)} caught, {survived} survived, {rest} without a verdict "
        f"({kinds} of {len(MISTAKES)} kinds of mistake)"
    )


def table(outcomes: Sequence[Outcome]) -> str:
    """The report in Markdown."""
    lines = ["# Deliberate mistakes and the tests that catch them", ""]
    lines += ["Written by `python -m tests.mutants --write`. Each mistake was made in a copy of"]
    lines += ["the package; the test named is the first that failed there.", ""]
    lines += [totals(outcomes) + ".", "", "| | mistake | made in | caught by |", "|-|-|-|-|"]
    for number, title in MISTAKES.items():
        lines.append(f"| {number} | **{title}** | | |")
        for outcome in outcomes:
            if outcome.mutant.mistake == number:
                by = outcome.by.replace("|", "\\|").replace("\n", " ")
                lines.append(f"| | {outcome.mutant.name} | `{outcome.mutant.path}` | `{by}` |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None, mutants: Sequence[Mutant] = MUTANTS) -> int:
    """0 if every chosen mistake was caught, else 1."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("chosen", nargs="*", metavar="NUMBER|NAME", help="of mistakes; else all")
    parser.add_argument("--sample", type=int, metavar="N", help="only N of them, evenly spread")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time (1)")
    parser.add_argument("--write", action="store_true", help=f"all of them, into {REPORT.name}")
    options = parser.parse_args(arguments)
    if options.write and (options.chosen or options.sample is not None):
        parser.error("--write makes a report of all mistakes; leave out names and --sample")
    chosen = select(options.chosen, options.sample, mutants)

    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        base = Path(scratch) / "base"
        copy(ROOT, base)
        for mutant in chosen:
            mutant.apply((base / mutant.path).read_text(encoding="utf-8"))
        status, output = run(base, sorted({test for mutant in chosen for test in mutant.tests}))
        if status != 0:
            print(f"{output}\nthe tests fail without any mistake (exit status {status})")
            return 1
        print("no mistake made: the tests pass", flush=True)
        outcomes = []
        with ThreadPoolExecutor(options.jobs) as pool:
            for outcome in pool.map(lambda mutant: attempt(mutant, base), chosen):
                outcomes.append(outcome)
                made = outcome.mutant
                print(f"{made.mistake:2}  {made.name}: {outcome.by}", flush=True)
    print(totals(outcomes))
    if options.write:
        REPORT.write_text(table(outcomes), encoding="utf-8")
    return 0 if all(outcome.caught for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
