"""The pass over all small changes: what it makes, how it reads them, and what its report says.

``python -m tests.mutants.general`` makes them, which takes most of an hour. Here is the rest.
"""

from __future__ import annotations

import ast
import re

from tests.environment import ROOT
from tests.mutants.general import ENOUGH, REPORT, TESTS, Change, changes, prepare, reasons, table

SOURCE = """\
@once
@property
def f(x):
    if x > 1:
        raise ValueError("one")
    raise ValueError(
        "two"
    )


class C:
    @classmethod
    def g(cls): return 1

    @property
    def h(self): return 2
"""
PREPARED = """\
def f(x):
    if x > 1:
        # pragma: no mutate start
        raise ValueError("one")
        # pragma: no mutate end
    # pragma: no mutate start
    raise ValueError(
        "two"
    )
    # pragma: no mutate end
f = property(f)
f = once(f)


class C:
    @classmethod
    def g(cls): return 1

    def h(self): return 2
    h = property(h)
"""
MADE = """\
def x_f__mutmut_orig(a):
    return a + 1
def x_f__mutmut_1(a):
    return a - 1
class C:
    def xǁCǁg__mutmut_orig(self):
        return h(1,
                 2)
    def xǁCǁg__mutmut_1(self):
        return h(1,
                 )
"""


def test_what_mutmut_gets_to_see() -> None:
    assert prepare(SOURCE) == PREPARED
    for module in TESTS:
        source = (ROOT / f"dsv3_mini/{module}.py").read_text(encoding="utf-8")
        raises = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Raise)]
        assert prepare(source).count("no mutate start") == len(raises)
        ast.parse(prepare(source))


def test_what_it_made_is_read() -> None:
    codes = {"dsv3_mini.m.x_f__mutmut_1": 1, "dsv3_mini.m.xǁCǁg__mutmut_1": 0}
    assert list(changes("m", MADE, codes)) == [
        Change("m", "f", "return a + 1", "return a - 1", "killed"),
        Change("m", "C.g", "2)", ")", "survived"),
    ]


def test_the_tests_are_there() -> None:
    for names in TESTS.values():
        assert all((ROOT / f"tests/test_{name}.py").exists() for name in names)


def test_every_reason_is_about_a_line_that_is_there() -> None:
    for (module, function, old, _), why in reasons().items():
        text = prepare((ROOT / f"dsv3_mini/{module}.py").read_text(encoding="utf-8"))
        name = function.rpartition(".")[2]
        line = old.replace("def f(", f"def {name}(")
        assert " ".join(line.split()) in " ".join(text.split()), (
            f"{module}.{function} has no longer {line!r}"
        )
        assert f"def {name}(" in text
        assert why


def test_the_report_has_enough_and_says_why() -> None:
    """Rewritten by ``python -m tests.mutants.general --write``."""
    report = REPORT.read_text(encoding="utf-8")
    row = r"^\| (\S+) \| \d* ?\| (\d+) \| (\d+) \| (\d+) \| (\d+) \|"
    rows = re.findall(row, report, re.MULTILINE)
    assert [name for name, *_ in rows] == [*TESTS, "all"]
    many, killed, late, left = (int(n) for n in rows[-1][1:])
    assert killed + late + left == many
    assert killed + late >= ENOUGH * many
    assert "no reason yet" not in report


def test_a_survivor_without_a_reason_is_told() -> None:
    found = [Change("rope", "f", "a | b", "", fate) for fate in ("survived", "timed out")]
    without = table({"rope": found}, {}, "tool 1.0")
    assert "rules of tool 1.0 make" in without
    assert "| rope |  | 2 | 0 | 1 | 1 | 50.0% |\n| all |  | 2 | 0 | 1 | 1 | 50.0% |" in without
    assert "| `f` | `a \\| b` | (nothing) | **no reason yet** |" in without
    assert "| `f` | `a \\| b` | (nothing) | (timed out) |" in without
    because = table({"rope": found}, {found[0].key: "because"}, "tool 1.0")
    assert "| (nothing) | because |" in because
