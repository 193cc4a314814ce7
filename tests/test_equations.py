"""Every equation of the report has a function, a test that notices its mistakes, and a cell."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3_mini.course import equations
from dsv3_mini.course.settled import Cell
from tests.environment import ROOT

ROWS = equations.index()
FUNCTIONS = list({f"{f.path}:{f.name}": f for row in ROWS for f in row.functions}.values())

# Run by itself: spoils each function in turn and runs the tests that name one of its equations.
SPOIL = """
import dataclasses, importlib, json, sys, types
import pytest, torch

def spoilt(value):
    if isinstance(value, torch.Tensor):
        return value * 1.1 if value.is_floating_point() else value
    if isinstance(value, float):
        return value * 1.1
    if isinstance(value, (list, tuple)):
        return type(value)(map(spoilt, value))
    if dataclasses.is_dataclass(value):
        changed = {f.name: spoilt(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **changed)
    return value

def put(old, new):
    # Modules hold functions that they imported under their own names; classes hold methods.
    for module in [m for n, m in sys.modules.items() if n.startswith(("dsv3_mini", "tests"))]:
        classes = [v for v in vars(module).values() if isinstance(v, type)]
        for owner in [module, *classes]:
            for name, value in list(vars(owner).items()):
                if value is old:
                    setattr(owner, name, new)

codes = []
for path, name, tests in json.loads(sys.argv[1]):
    owner = importlib.import_module(path)
    for part in name.split("."):
        parent, owner = owner, vars(owner)[part]
    real = owner
    inner = real.fget if isinstance(real, property) else real
    def fake(*args, inner=inner, **kwargs):
        return spoilt(inner(*args, **kwargs))
    put(real, fake if inner is real else property(fake))
    fake = vars(parent)[part]
    codes.append(pytest.main(["-qq", "-x", "--no-header", "-p", "no:cacheprovider", *tests]))
    put(fake, real)
print("codes", json.dumps(codes))
"""


def spoil(functions: list[equations.Function]) -> list[int]:
    """What pytest says of the tests of each one's equations, once all its numbers are 1.1 fold."""
    jobs = []
    for each in functions:
        tests = {t for row in ROWS if row.equation in each.equations for t in row.tests}
        module = each.path.removesuffix(".py").replace("/", ".")
        jobs.append([module, each.name, sorted(f"{t.path}::{t.name}" for t in tests)])
    result = subprocess.run(
        [sys.executable, "-c", SPOIL, json.dumps(jobs)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert "codes" in result.stdout, result.stdout[-2000:] + result.stderr[-2000:]
    codes: list[int] = json.loads(result.stdout.rpartition("codes ")[2])
    return codes


def test_every_equation_has_a_function_a_test_and_a_cell() -> None:
    wrong = equations.missing(ROWS)
    assert not wrong, "\n".join(wrong)
    assert [row.equation for row in ROWS] == list(range(1, 26))


def test_a_spoilt_function_is_noticed_by_the_tests_of_its_equations() -> None:
    """Or a test would only name an equation, and not test the function that claims it.

    The last one shows that this can fail: eq 24's tests do not notice a spoilt router.
    """
    gate = next(f for f in FUNCTIONS if f.name == "Gate.forward")
    *codes, unnoticed = spoil([*FUNCTIONS, dataclasses.replace(gate, equations=(24,))])
    failed = pytest.ExitCode.TESTS_FAILED
    silent = [f.name for f, code in zip(FUNCTIONS, codes, strict=True) if code != failed]
    assert not silent, f"their equations' tests pass although they are wrong: {silent}"
    assert unnoticed == pytest.ExitCode.OK


def test_the_committed_page_is_the_present_one() -> None:
    committed = (ROOT / equations.PAGE).read_text(encoding="utf-8")
    assert committed == equations.page(ROWS), "run python -m dsv3_mini.course.equations --write"


def test_links_of_the_page_lead_to_files() -> None:
    folder = (ROOT / equations.PAGE).parent
    links = [part.partition(")")[0] for part in equations.page(ROWS).split("](")[1:]]
    assert len(links) > 75
    assert [link for link in links if not (folder / link).is_file()] == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Report eq 3.", [3]),
        ("report eqs 1-3, 5 and 7 to 9", [1, 2, 3, 5, 7, 8, 9]),
        ("Source: report\n    eqs 16, 17, and 24. More", [16, 17, 24]),
        ("Source: report eq 10, 4.3; 0.135234 for V3", [10]),
        ("report eq 4.3, and the reports eqs 5", []),
        ("Eq 18 counts the best", []),
        ("Loss-Free Balancing eq 4", []),
    ],
)
def test_what_a_docstring_refers_to(text: str, expected: list[int]) -> None:
    assert list(equations.numbers(text)) == expected


@pytest.mark.parametrize(
    ("kind", "source", "expected"),
    [
        ("markdown", "the affinity (eq 15), then eqs 17 to 20", [15, 17, 18, 19, 20]),
        ("markdown", '"eq 3" is its equation 3; arXiv 2408.15664 eq 7', []),
        ("code", "s = sigmoid(u)  # eq 15\nprint('eq 3')", [15]),
    ],
)
def test_what_a_cell_refers_to(kind: str, source: str, expected: list[int]) -> None:
    assert list(equations.mentions(Cell("a.ipynb", "", 1, "x", kind, source))) == expected


def repository(root: Path, docstring: str, test: str, text: str) -> list[equations.Row]:
    """The rows of a repository with one method, one test and one notebook."""
    for folder in ("dsv3_mini", "tests", "notebooks"):
        (root / folder).mkdir()
    code = f'class A:\n    def f(self):\n        """{docstring}"""\n'
    (root / "dsv3_mini" / "a.py").write_text(code)
    (root / "tests" / "test_a.py").write_text(f'def test_f():\n    """{test}"""\n')
    cell = {"cell_type": "markdown", "source": [f"# Title\n\n{text}"], "id": "x"}
    (root / "notebooks" / "00_a.ipynb").write_text(json.dumps({"cells": [cell]}))
    return equations.index(root)


@pytest.mark.parametrize(
    ("docstring", "test", "text", "lacks"),
    [
        ("Report eqs 1-25.", "Report eqs 1-25.", "eqs 1 to 25", []),
        ("Report eqs 1-24.", "Report eqs 1-25.", "eqs 1 to 25", ["eq 25: no docstring in dsv3"]),
        ("Report eqs 1-25.", "Report eqs 2-25.", "eqs 1 to 25", ["eq 1: no docstring of a test"]),
        ("Report eqs 1-25.", "Report eqs 1-25.", "eqs 1 to 24", ["eq 25: no notebook says"]),
    ],
)
def test_what_is_missing_is_named(
    docstring: str, test: str, text: str, lacks: list[str], tmp_path: Path
) -> None:
    rows = repository(tmp_path, docstring, test, text)
    wrong = equations.missing(rows)
    assert len(wrong) == len(lacks)
    assert all(message.startswith(lack) for message, lack in zip(wrong, lacks, strict=True))
    assert {f.name for row in rows for f in row.functions} == {"A.f"}
