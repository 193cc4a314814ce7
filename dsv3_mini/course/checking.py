"""Exercises that check themselves, and say what kind of mistake a wrong answer looks like.

Why: 'wrong' teaches nothing. An exercise here knows three things that are written independently of
its solution: an oracle (slow: loops, numpy, another algorithm), random cases, and wrong answers
that people really give, each with a message. An attempt is put to the same cases as all of them.
It is solved where it equals the oracle; if it equals a wrong answer on every case, that answer's
message is the reply; otherwise the first difference is told in plain words. Whatever an attempt
does, the reply is a sentence and never a traceback.
"""

from __future__ import annotations

import ast
import inspect
import math
import random
import re
import textwrap
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

CASES = 20
Function = Callable[..., Any]


class Draw(random.Random):
    """Random choices and tensors to make a case of; one seed gives one case."""

    def normal(self, *shape: int) -> Tensor:
        """Normally distributed float32 numbers of this shape."""
        return torch.randn(shape, generator=torch.Generator().manual_seed(self.getrandbits(31)))


@dataclass(frozen=True)
class Wrong:
    """A wrong answer that people give, and what to tell them: 'this looks like: ' + ``message``.

    ``mistake`` is its number in the list of mistakes that published implementations make.
    """

    answer: Function
    message: str
    mistake: int | None = None


@dataclass(frozen=True)
class Drawing:
    """What to draw, as data: ``kind`` names a function of ``dsv3_mini.viz.exercises.DRAW``."""

    kind: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Exercise:
    """One exercise. ``oracle``, ``wrong`` and attempts are functions of the same arguments.

    identifier: notebook and number, as '02.1'
    difficulty, importance: 1 to 5
    lines: budget for the body, in statements as a formatter would write them
    case: the arguments by name, in the order of the parameters, drawn from a ``Draw``
    oracle: the right answer, written independently of the solution
    wrong: at least three
    picture: from a right answer to what it looks like
    alt: the same in words, also for those who do not see it
    tolerance: how far a number may be off, relative to the largest one expected
    run: puts a case to a function; give one where more than the returned value counts (a
        gradient, a count of operations, a tensor that is meant to be changed in place)
    """

    identifier: str
    title: str
    difficulty: int
    importance: int
    minutes: int
    lines: int
    case: Callable[[Draw], dict[str, Any]]
    oracle: Function
    wrong: tuple[Wrong, ...]
    picture: Callable[[Function], Drawing]
    alt: str
    tolerance: float = 1e-4
    run: Function = lambda function, *arguments: function(*arguments)

    def card(self) -> str:
        """The first lines of the exercise in its notebook."""
        dots = ["●" * n + "○" * (5 - n) for n in (self.difficulty, self.importance)]
        lines = f"{self.lines} line" + "s" * (self.lines > 1)
        return (
            f"## {self.identifier} {self.title}\n\n"
            f"difficulty {self.difficulty} of 5 {dots[0]} · importance {self.importance} of 5 "
            f"{dots[1]} · {self.minutes} minutes · at most {lines}"
        )


@dataclass(frozen=True)
class Verdict:
    """What is known of an attempt, and what to tell its author."""

    state: Literal["open", "solved", "not yet"]
    message: str = ""

    def __str__(self) -> str:
        return f"{self.state}. {self.message}" if self.message else self.state


class ArgumentChanged(Exception):
    """An attempt wrote into what it was given."""


def judge(exercise: Exercise, attempt: Any, seeds: Iterable[int] = range(CASES)) -> Verdict:
    """Put the cases of ``seeds`` to ``attempt``."""
    seeds = list(seeds)
    if not callable(attempt):
        return Verdict("not yet", f"Give check the function itself, not {kind_of(attempt)}")
    got = [outcome(exercise, attempt, seed) for seed in seeds]
    if any(isinstance(each, NotImplementedError) for each in got):
        return Verdict("open", "Write the function, run its cell, then this one again")

    def differences(answer: Function) -> Iterable[str]:
        for seed, mine in zip(seeds, got, strict=True):
            yield difference(outcome(exercise, answer, seed), mine, exercise.tolerance)

    found = list(differences(exercise.oracle))
    if not any(found):
        return Verdict("solved", remark(exercise, attempt))
    for wrong in exercise.wrong:
        if not any(differences(wrong.answer)):
            return Verdict("not yet", f"This looks like: {wrong.message}")
    number, first = next((n, text) for n, text in enumerate(found) if text)
    where = line_that_raised(got[number], attempt)
    case = described(exercise.case(Draw(seeds[number])))
    return Verdict("not yet", f"Case {number + 1} of {len(seeds)}, {case}: {first}{where}")


def outcome(exercise: Exercise, answer: Function, seed: int) -> Any:
    """What ``answer`` makes of a case: a value, or the exception that it raised."""
    case = exercise.case(Draw(seed))
    try:
        value = exercise.run(answer, *case.values())
    except Exception as error:  # whatever an attempt raises, the reply is a sentence
        return error
    for name, before in exercise.case(Draw(seed)).items():
        if difference(before, case[name], 0):
            return ArgumentChanged(f"the argument {name} is changed in place: work on a copy")
    return value


def difference(expected: Any, got: Any, tolerance: float) -> str:
    """How ``got`` differs from ``expected``, in plain words; empty where it does not."""
    if isinstance(expected, Exception) or isinstance(got, Exception):
        if type(expected) is type(got):
            return ""
        if isinstance(got, ArgumentChanged):
            return str(got)
        return f"it raises {type(got).__name__}: {str(got).strip().partition(chr(10))[0]}"
    if got is None and expected is not None:
        return "it returns None; is a return missing?"
    if isinstance(expected, Tensor):
        return tensors_differ(expected, got, tolerance)
    if isinstance(expected, dict) and isinstance(got, dict) and list(expected) == list(got):
        pairs = [(f"{key}: ", one, got[key]) for key, one in expected.items()]
    elif isinstance(expected, tuple | list):
        if not isinstance(got, tuple | list) or len(got) != len(expected):
            return f"expected {kind_of(expected)}, got {kind_of(got)}"
        both = zip(expected, got, strict=True)
        pairs = [(f"value {n}: ", one, other) for n, (one, other) in enumerate(both, start=1)]
    elif isinstance(expected, float) and isinstance(got, int | float):
        close = math.isclose(got, expected, rel_tol=0, abs_tol=tolerance * (abs(expected) or 1.0))
        return "" if close or got == expected else f"expected {expected:.6g}, got {got:.6g}"
    elif type(expected) is not type(got):
        return f"expected {kind_of(expected)}, got {kind_of(got)}"
    else:
        return "" if expected == got else f"expected {expected!r}, got {got!r}"
    parts = (name + text for name, a, b in pairs if (text := difference(a, b, tolerance)))
    return next(parts, "")


def tensors_differ(expected: Tensor, got: Any, tolerance: float) -> str:
    """As ``difference``: kind, shape, dtype, NaN, and then the numbers."""
    if not isinstance(got, Tensor):
        return f"expected {kind_of(expected)}, got {kind_of(got)}"
    if expected.shape != got.shape:
        return f"expected the shape {tuple(expected.shape)}, got {tuple(got.shape)}"
    if expected.dtype != got.dtype:
        return f"expected the dtype {expected.dtype}, got {got.dtype}"
    one, other = expected.detach().double(), got.detach().double()
    if other.isnan().any() and not one.isnan().any():
        return f"{int(other.isnan().sum())} of {other.numel()} numbers are NaN"
    finite = one[one.isfinite()].abs()
    largest = finite.max().item() if finite.numel() else 0.0
    margin = tolerance * (largest or 1.0) if expected.dtype.is_floating_point else 0.0
    off = ~torch.isclose(other, one, rtol=0, atol=margin, equal_nan=True)
    if not off.any():
        return ""
    distance = (other - one).abs().nan_to_num(nan=torch.inf).masked_fill(~off, -1)
    place = tuple(int(i) for i in torch.unravel_index(distance.argmax(), one.shape))
    return (
        f"{int(off.sum())} of {one.numel()} numbers differ, most of all {list(place)}: "
        f"expected {one[place]:.6g}, got {other[place]:.6g}"
    )


def kind_of(thing: Any) -> str:
    """A thing in a sentence: 'a tensor (2, 3)', 'a list of 4', 'the int 5'."""
    if isinstance(thing, Tensor):
        return f"a tensor {tuple(thing.shape)}"
    if isinstance(thing, tuple | list):
        return f"a {type(thing).__name__} of {len(thing)}"
    if isinstance(thing, bool | int | float | str):
        return f"the {type(thing).__name__} {thing!r}"
    return "None" if thing is None else f"something of type {type(thing).__name__}"


def described(case: dict[str, Any]) -> str:
    """The arguments of a case, tensors by their shapes."""
    told = [(n, tuple(v.shape) if isinstance(v, Tensor) else f"= {v!r}") for n, v in case.items()]
    return ", ".join(textwrap.shorten(f"{name} {value}", 60) for name, value in told)


def line_that_raised(result: Any, attempt: Function) -> str:
    """', in `the line`' of the attempt, if it raised and its source is at hand."""
    file = getattr(getattr(attempt, "__code__", None), "co_filename", None)
    frames = traceback.extract_tb(getattr(result, "__traceback__", None))
    lines = [frame.line for frame in frames if frame.filename == file]
    return f", in `{lines[-1]}`" if lines and lines[-1] else ""


def remark(exercise: Exercise, attempt: Function) -> str:
    """A friendly word where an attempt is longer than the budget."""
    try:
        used = lines_of_code(inspect.getsource(attempt))
    except (OSError, TypeError, SyntaxError):  # its source is not at hand
        return ""
    more = f"It takes {used} lines, and {exercise.lines} are enough; is there a shorter way?"
    return more if used > exercise.lines else ""


def lines_of_code(source: str) -> int:
    """Lines in the bodies of functions, without comments, blank lines and docstrings."""
    nodes = ast.parse(textwrap.dedent(source)).body
    bodies = [node.body for node in nodes if isinstance(node, ast.FunctionDef)]
    text = r"Expr\(value=Constant\("
    code = [s for body in bodies for s in body if not re.match(text, ast.dump(s))]
    return len(ast.unparse(ast.Module(code, [])).splitlines())
