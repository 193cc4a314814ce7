"""Does every notebook notice? ``python -m tests.mutants.notebooks``, or some by number: 00 05b.

A notebook that stays green whatever the package does explains nothing. So one number that each of
them depends on is broken in a copy of the repository, and nbval runs the notebook there until a
cell goes red: by an output other than the committed one, or by an assertion in the cell. Another
error does not count, since code that stops is noticed anyway, and neither does the fingerprint,
which nbval never reads. Then the same cells must be green in a copy where nothing was broken.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.environment import FIXED, ROOT
from tests.mutants.__main__ import copy
from tests.mutants.mutant import Mutant
from tests.notebooks.health import code_cells, read

REPORT = Path(__file__).with_suffix(".md")
COPIED = ("dsv3_mini", "tests", "notebooks", "conftest.py", "pyproject.toml")
LEFT_OUT = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
SECONDS = 1200  # notebook 05b trains for minutes on one slow core
COLOUR = re.compile(r"(?:\x1b|#x1B)\[[0-9;]*m")
RAISED = re.compile(r"^(\w+)\s+Traceback", re.MULTILINE)
ASSERTED = re.compile(r"^-+> +\d+ +(assert .*)", re.MULTILINE)


def broken(notebook: str, name: str, file: str, old: str, new: str) -> Mutant:
    """One number of the package, and the notebook that must notice; 0: of no kind of mistake."""
    return Mutant(0, name, file, old, new, (f"notebooks/{notebook}.ipynb",))


BROKEN = [
    broken(
        "00_start_here", "an MTP layer is counted with four norms in place of five",
        "accounting.py", "attention + moe + 5 * hidden", "attention + moe + 4 * hidden",
    ),
    broken(
        "01_kv_cache", "a cached number is counted as one byte in place of two",
        "accounting.py", "bytes_per_number: int = 2", "bytes_per_number: int = 1",
    ),
    broken(
        "02_mla", "V3's latent for keys and values has 256 numbers in place of 512",
        "config.py", "kv_lora_rank: int = 512", "kv_lora_rank: int = 256",
    ),
    broken(
        "03_rope_decoupling", "the frequencies fall twice as fast from pair to pair",
        "rope.py", "theta ** (pairs / width)", "theta ** (2 * pairs / width)",
    ),
    broken(
        "04_deepseek_moe", "a group is ranked by its best expert in place of its two best",
        "dsv3_mini/course/nodes.py", ".values[:2].sum()", ".values[:1].sum()",
    ),
    broken(
        "05_load_balancing", "the bias moves towards the load, not against it",
        "balance.py", "return bias + gamma * step", "return bias - gamma * step",
    ),
    broken(
        "05b_balancing_compared", "the study's learning rate is 0.00005 in place of 0.005",
        "dsv3_mini/course/balance_study.py", "learning_rate=5e-3", "learning_rate=5e-5",
    ),
    broken(
        "06_multi_token_prediction", "the loss of depth k is divided by T - k in place of T",
        "mtp.py", "tokens_BT.shape[0] * length", "tokens_BT.shape[0] * (length - depth)",
    ),
    broken(
        "07_speculative_decoding", "after an accepted draft position 0 speaks, not position 1",
        "speculative.py",
        "decide(choose(out.logits[:, 1], temperature, generator)",
        "decide(choose(out.logits[:, 0], temperature, generator)",
    ),
    broken(
        "08_fp8_numbers", "E4M3 is taken to end at 240 in place of 448",
        "fp8_numbers.py", "E4M3: 448.0", "E4M3: 240.0",
    ),
    broken(
        "09_fp8_training", "64 numbers share a scale in place of 128",
        "fp8_numbers.py", "SIDE = 128", "SIDE = 64",
    ),
    broken(
        "10_train_it_all", "training is counted as twice the forward pass in place of three times",
        "accounting.py", "return 3 * forward_flops", "return 2 * forward_flops",
    ),
    broken(
        "11_full_width", "an expert is counted with two matrices in place of three",
        "accounting.py", "3 * config.moe_intermediate_size", "2 * config.moe_intermediate_size",
    ),
    broken(
        "12_claims", "the bias moves by 0.01 a step in place of 0.001",
        "train.py", "gamma: float = 0.001", "gamma: float = 0.01",
    ),
]  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What became of one notebook over one broken number."""

    mutant: Mutant
    red: bool
    cell: str
    """The first red cell and why it is red; if none is, what happened instead."""


def run(folder: Path, chosen: Sequence[str]) -> tuple[int, list[tuple[str, str]]]:
    """Cells in order until the first red one: nbval's exit status; names, what is wrong or ''."""
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", "--nbval", "-x", "-p", "no:cacheprovider"]
    own = {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    status = subprocess.run(
        [*command, f"--junitxml={report}", "--color=no", *chosen], cwd=folder,
        env=os.environ | FIXED | own, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        timeout=SECONDS, check=False,
    ).returncode  # fmt: skip
    seen = []
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        wrong = [child for child in case if child.tag in ("failure", "error")]
        text = "\n".join(f"{child.get('message')}\n{child.text}" for child in wrong)
        seen.append((case.get("name", ""), COLOUR.sub("", text)))
    return status, seen


def reason(wrong: str) -> str:
    """Why a cell is red, from what nbval wrote; what does not count begins with a capital."""
    if "Cell outputs differ" in wrong:
        return "another output"
    found = RAISED.search(wrong)
    if found is None:
        return f"NO VERDICT: {wrong[:200]}"
    if found[1] != "AssertionError":
        return f"BROKEN: {found[1]}"
    line = ASSERTED.search(wrong)
    return f"`{line[1].strip()}`" if line else "an assertion of the package"


def attempt(mutant: Mutant) -> Outcome:
    """Break the number in a copy, run to the first red cell, and the same cells without it."""
    (notebook,) = mutant.tests
    with tempfile.TemporaryDirectory(prefix="broken-") as scratch:
        folder = Path(scratch).resolve() / "copy"
        copy(ROOT, folder, COPIED, LEFT_OUT)
        path = folder / mutant.path
        text = path.read_text(encoding="utf-8")
        path.write_text(mutant.apply(text), encoding="utf-8")
        status, seen = run(folder, [notebook])
        if status == 0:
            return Outcome(mutant, False, "STAYED GREEN")
        name, wrong = seen[-1]
        why = reason(wrong)
        if status != 1 or why[0].isupper():
            return Outcome(mutant, False, f"{why} in {name}, exit status {status}")
        path.write_text(text, encoding="utf-8")
        status, _ = run(folder, [f"{notebook}::{cell}" for cell, _ in seen])
        if status != 0:
            return Outcome(mutant, False, f"red up to {name} WITHOUT ANYTHING BROKEN, too")
        # nbval counts code cells from 0, a reader counts all cells from 1.
        place, _ = code_cells(read(folder / notebook))[int(name.removeprefix("Cell "))]
    return Outcome(mutant, True, f"cell {place}: {why}")


def select(words: Sequence[str]) -> list[Mutant]:
    """By the notebooks' numbers; all without any."""
    numbers = {Path(mutant.tests[0]).stem.split("_")[0]: mutant for mutant in BROKEN}
    if unknown := set(words) - numbers.keys():
        known = ", ".join(numbers)
        raise SystemExit(f"no notebook {', '.join(sorted(unknown))}; there are {known}")
    return [mutant for number, mutant in numbers.items() if not words or number in words]


def table(outcomes: Sequence[Outcome]) -> str:
    """The report in Markdown."""
    red = sum(outcome.red for outcome in outcomes)
    lines = ["# A broken number turns each notebook red", ""]
    lines += ["Written by `python -m tests.mutants.notebooks --write`. One number was broken in a"]
    lines += ["copy of the package, and nbval ran the notebook there until the cell named, the"]
    lines += ["first that was red. Without the broken number the same cells are green.", ""]
    lines += [f"{red} of {len(outcomes)} notebooks went red.", ""]
    lines += ["| notebook | broken | in | first red cell |", "|-|-|-|-|"]
    for outcome in outcomes:
        made, cell = outcome.mutant, outcome.cell.replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {Path(made.tests[0]).stem} | {made.name} | `{made.path}` | {cell} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if every chosen notebook went red, else 1."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants.notebooks", description=__doc__)
    parser.add_argument("chosen", nargs="*", metavar="NN", help="numbers of notebooks; else all")
    parser.add_argument("--write", action="store_true", help=f"all of them, into {REPORT.name}")
    options = parser.parse_args(arguments)
    if options.write and options.chosen:
        parser.error("--write makes a report of all notebooks; leave out the numbers")
    outcomes = []
    for mutant in select(options.chosen):
        outcomes.append(attempt(mutant))
        print(f"{Path(mutant.tests[0]).stem}: {mutant.name}: {outcomes[-1].cell}", flush=True)
    print(f"{sum(outcome.red for outcome in outcomes)} of {len(outcomes)} notebooks went red")
    if options.write:
        REPORT.write_text(table(outcomes), encoding="utf-8")
    return 0 if all(outcome.red for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
