"""The deliberate mistakes: complete, up to date, and judged fairly.

``python -m tests.mutants`` makes all of them, which takes minutes. Here is a sample.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.environment import ROOT
from tests.mutants import MISTAKES, MUTANTS
from tests.mutants.__main__ import REPORT, judge, main, select
from tests.mutants.mutant import Mutant
from tests.mutants.witness import FILE

SAMPLE = (
    "mscale in the softmax scale is not squared",
    "the step has the wrong sign",
    "one rotary key per head is projected",
)
HARMLESS = Mutant(
    6, "a comment has other words", "rope.py", "# A ramp of no width would divide by zero;",
    "# A ramp without a width divides by zero;", ("tests/test_rope.py",),
)  # fmt: skip


def test_what_they_change_is_there_once() -> None:
    for mutant in MUTANTS:
        text = (ROOT / mutant.path).read_text(encoding="utf-8")
        changed = mutant.apply(text)
        assert changed != text, mutant.name
        compile(changed, mutant.path, "exec")
        for test in mutant.tests:
            file, _, name = test.partition("::")
            found = (ROOT / file).read_text(encoding="utf-8")
            assert not name or f"def {name}(" in found, f"{mutant.name}: there is no {test}"


def test_every_kind_of_mistake_is_made() -> None:
    assert list(MISTAKES) == list(range(1, 27))
    assert {mutant.mistake for mutant in MUTANTS} == set(MISTAKES)
    assert len(MUTANTS) >= 60
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert len({(m.file, m.old, m.new) for m in MUTANTS}) == len(MUTANTS)


def test_the_report_is_about_these_mistakes() -> None:
    """Rewritten by ``python -m tests.mutants --write``; every one of them was caught."""
    report = REPORT.read_text(encoding="utf-8")
    assert f"{len(MUTANTS)} of {len(MUTANTS)} caught, 0 survived, 0 without" in report
    rows = re.findall(r"^\| \| (.+) \| `(.+)` \| `(.+)` \|$", report, re.MULTILINE)
    made = sorted(MUTANTS, key=lambda mutant: mutant.mistake)
    assert [row[:2] for row in rows] == [(mutant.name, mutant.path) for mutant in made]
    for mutant, (_, _, by) in zip(made, rows, strict=True):
        assert by.startswith(mutant.tests)


def test_another_text_is_refused() -> None:
    for text in ("", HARMLESS.old * 2):
        with pytest.raises(ValueError, match=f"occurs {len(text) and 2} times in dsv3_mini/rope"):
            HARMLESS.apply(text)


@pytest.mark.parametrize(
    ("first", "status", "caught", "by"),
    [
        ({"when": "call", "errors": ["AssertionError", "Exception"]}, 1, True, "t::a"),
        ({"when": "call", "errors": ["CacheError", "ValueError"]}, 1, True, "t::a"),
        ({"when": "call", "errors": ["NameError", "Exception"]}, 1, False, "BROKEN: NameError"),
        ({"when": "call", "errors": ["RuntimeError"]}, 1, False, "BROKEN: RuntimeError in t::a"),
        ({"when": "setup", "errors": ["AssertionError"]}, 1, False, "BROKEN: AssertionError"),
        ({"when": "collect", "errors": ["E   SyntaxError"]}, 2, False, "BROKEN: E   SyntaxError"),
        ({}, 0, False, "SURVIVED"),
        ({}, 4, False, "exit status 4"),
    ],
)
def test_what_counts_as_caught(
    tmp_path: Path, first: dict[str, object], status: int, caught: bool, by: str
) -> None:
    seen = {"imported": [str(tmp_path / "x.py")], "first": first and {"test": "t::a", **first}}
    (tmp_path / FILE).write_text(json.dumps(seen))
    outcome = judge(HARMLESS, tmp_path, status, "")
    assert outcome.caught is caught
    assert outcome.by.startswith(by)


def test_code_from_elsewhere_was_not_tested(tmp_path: Path) -> None:
    first = {"test": "t::a", "when": "call", "errors": ["AssertionError"]}
    (tmp_path / FILE).write_text(json.dumps({"imported": [__file__], "first": first}))
    assert not judge(HARMLESS, tmp_path, 1, "").caught
    (tmp_path / FILE).unlink()
    assert judge(HARMLESS, tmp_path, 3, "no memory").by == "no verdict, exit status 3: no memory"


def test_some_by_number_name_or_sample() -> None:
    assert {mutant.mistake for mutant in select(["21", "9"], None, MUTANTS)} == {9, 21}
    assert [mutant.name for mutant in select(["not SQUARED"], None, MUTANTS)] == [SAMPLE[0]]
    assert len({mutant.mistake for mutant in select([], 5, MUTANTS)}) == 5
    with pytest.raises(SystemExit, match="no mistake is called or numbered '27'"):
        select(["27"], None, MUTANTS)


def test_a_sample_is_caught(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SAMPLE, "--jobs", "2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("no mistake made: the tests pass\n")
    assert out.endswith(
        "3 of 3 caught, 0 survived, 0 without a verdict (3 of 26 kinds of mistake)\n"
    )
    for test in ("test_rope.py::test_v3_temp", "test_balance.py::test_bias_step", "test_mla.py::"):
        assert f": tests/{test}" in out


def test_a_survivor_is_a_survivor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([], [HARMLESS]) == 1
    out = capsys.readouterr().out
    assert " 6  a comment has other words: SURVIVED\n0 of 1 caught, 1 survived" in out
