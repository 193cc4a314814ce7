"""The numbers broken for notebooks: one for each, up to date, and judged fairly.

``python -m tests.mutants.notebooks`` breaks all of them, which takes minutes. Here is the quickest.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.environment import ROOT, notebook_paths
from tests.mutants import notebooks
from tests.mutants.notebooks import BROKEN, REPORT, main, reason, select

# Other words in an error: the notebook's fingerprint changes, and nothing that it prints.
HARMLESS = notebooks.broken(
    "00_start_here", "an error has other words", "config.py",
    "each key head serves equally many", "every key head serves equally many",
)  # fmt: skip


def test_every_notebook_has_its_number_and_what_it_changes_is_there_once() -> None:
    assert [mutant.tests for mutant in BROKEN] == [
        (str(path.relative_to(ROOT)),) for path in notebook_paths()
    ]
    for mutant in [*BROKEN, HARMLESS]:
        assert mutant.path.startswith("dsv3_mini/")
        text = (ROOT / mutant.path).read_text(encoding="utf-8")
        changed = mutant.apply(text)
        assert changed != text
        compile(changed, mutant.path, "exec")


def test_the_report_is_about_these_numbers() -> None:
    """Rewritten by ``python -m tests.mutants.notebooks --write``; every notebook went red."""
    report = REPORT.read_text(encoding="utf-8")
    assert f"{len(BROKEN)} of {len(BROKEN)} notebooks went red" in report
    rows = re.findall(r"^\| (\d\S+) \| (.+) \| `(.+)` \| cell \d+: .+ \|$", report, re.MULTILINE)
    assert rows == [(Path(m.tests[0]).stem, m.name, m.path) for m in BROKEN]


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ("Cell 3: Cell outputs differ\n mismatch 'stdout'", "another output"),
        ("red\n---\nAssertionError    Traceback (most\n---> 11 assert a == b", "`assert a == b`"),
        ("red\nAssertionError   Traceback (most\n", "an assertion of the package"),
        ("red\nRuntimeError     Traceback (most\n----> 2 f()", "BROKEN: RuntimeError"),
        ("red\nImportError      Traceback (most", "BROKEN: ImportError"),
        ("Timeout of 240 seconds exceeded", "NO VERDICT: Timeout of 240"),
    ],
)  # fmt: skip
def test_why_a_cell_is_red(wrong: str, why: str) -> None:
    assert reason(wrong).startswith(why)


def test_some_by_number() -> None:
    assert [mutant.tests[0][10:13] for mutant in select(["12", "05b"])] == ["05b", "12_"]
    assert select([]) == BROKEN
    with pytest.raises(SystemExit, match="no notebook 13; there are 00, 01"):
        select(["13"])


def test_the_first_notebook_goes_red(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["00"]) == 0
    out = capsys.readouterr().out
    assert ": cell 18: `assert mtp == parameters.mtp" in out
    assert out.endswith("1 of 1 notebooks went red\n")


def test_a_fingerprint_alone_turns_nothing_red(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / HARMLESS.path).read_text(encoding="utf-8")
    before, after = (ast.dump(ast.parse(each)) for each in (text, HARMLESS.apply(text)))
    assert before != after, "the fingerprint is made of this"
    monkeypatch.setattr(notebooks, "BROKEN", [HARMLESS])
    assert main(["00"]) == 1
    assert "an error has other words: STAYED GREEN\n0 of 1 notebooks" in capsys.readouterr().out
