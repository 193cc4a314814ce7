"""checking: what an attempt is told, on a toy exercise; the real ones are in test_exercises.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv3_mini.course.checking import (
    Draw,
    Drawing,
    Exercise,
    Verdict,
    Wrong,
    difference,
    judge,
    lines_of_code,
)
from dsv3_mini.course.exercises import check, exercise


def scaled_case(draw: Draw) -> dict[str, Any]:
    return {"x_T": draw.normal(draw.randint(2, 5)), "factor": draw.randint(2, 4)}


def scaled(x_T: Tensor, factor: int) -> Tensor:
    return torch.stack([x * factor for x in x_T])


TOY = Exercise(
    identifier="00.1", title="Scale", difficulty=1, importance=1, minutes=1, lines=1,
    case=scaled_case, oracle=scaled, alt="nothing", picture=lambda answer: Drawing("bars", {}),
    wrong=(
        Wrong(lambda x, factor: x + factor, "a sum"),
        Wrong(lambda x, factor: (x * factor)[:1], "the first number alone"),
        Wrong(lambda x, factor: x.view(3), "something for three numbers"),
    ),
)  # fmt: skip


def stub(x: Tensor, factor: int) -> Tensor:
    # YOUR CODE HERE
    raise NotImplementedError()


def in_place(x: Tensor, factor: int) -> Tensor:
    return x.mul_(factor)


def raises(x: Tensor, factor: int) -> float:
    shift = 0
    return 1 / shift


def long_way(x: Tensor, factor: int) -> Tensor:
    """A docstring does not count."""
    # nor does a comment
    total = torch.zeros_like(x)
    for _ in range(factor):
        total = total + x
    return total


def half_a_sum(x: Tensor, factor: int) -> Tensor:
    return x + factor if len(x) < 4 else x * factor


def with_nan(x: Tensor, factor: int) -> Tensor:
    return torch.where(torch.arange(len(x)) > 1, x * factor, torch.nan)


SHAPE, FACTOR = scaled_case(Draw(0))["x_T"].shape, scaled_case(Draw(0))["factor"]
FIRST = f"not yet. Case 1 of 20, x_T {tuple(SHAPE)}, factor = {FACTOR}: "
REPLIES: dict[str, tuple[Any, str]] = {
    "right": (lambda x, factor: factor * x, "solved"),
    "a stub": (stub, "open. Write the function, run its cell, then this one again"),
    "too long": (long_way, "solved. It takes 4 lines, and 1 are enough; is there a shorter way?"),
    "a known wrong answer": (lambda x, f: f + x, "not yet. This looks like: a sum"),
    "one that fails alike": (
        lambda x, f: x.reshape(3),
        "not yet. This looks like: something for three numbers",
    ),
    "no function": (3, "not yet. Give check the function itself, not the int 3"),
    "its result": (torch.ones(2), "not yet. Give check the function itself, not a tensor (2,)"),
    "nothing returned": (lambda x, f: None, FIRST + "it returns None; is a return missing?"),
    "a list": (lambda x, f: (x * f).tolist(), FIRST + "expected a tensor (5,), got a list of 5"),
    "a shape": (lambda x, f: (x * f)[None], FIRST + "expected the shape (5,), got (1, 5)"),
    "a dtype": (
        lambda x, f: x.double() * f,
        FIRST + "expected the dtype torch.float32, got torch.float64",
    ),
    "NaN": (with_nan, FIRST + "2 of 5 numbers are NaN"),
    "in place": (in_place, FIRST + "the argument x_T is changed in place: work on a copy"),
    "raises": (raises, FIRST + "it raises ZeroDivisionError: division by zero, in `return 1 / "),
    "too few parameters": (lambda x: x, FIRST + "it raises TypeError: "),
    "wrong in some cases": (half_a_sum, "not yet. Case 2 of 20, x_T (3,)"),
}


@pytest.mark.parametrize("name", REPLIES)
def test_reply(name: str) -> None:
    attempt, expected = REPLIES[name]
    reply = str(judge(TOY, attempt))
    assert reply.startswith(expected), reply
    assert "\n" not in reply


def test_the_first_difference_is_shown_with_numbers() -> None:
    def off_by_one(x: Tensor, factor: int) -> Tensor:
        return x * factor + torch.arange(len(x)) / 10

    x, factor = scaled_case(Draw(0)).values()
    end = f"most of all [4]: expected {x[4] * factor:.6g}, got {x[4] * factor + 0.4:.6g}"
    assert judge(TOY, off_by_one).message.endswith("4 of 5 numbers differ, " + end)


@pytest.mark.parametrize(
    ("expected", "got", "words"),
    [
        (3, 3, ""),
        (3, 3.0, "expected the int 3, got the float 3.0"),
        (3, 4, "expected 3, got 4"),
        (0.5, 0.50001, ""),
        (0.5, 0.6, "expected 0.5, got 0.6"),
        (0.0, 1e-6, ""),
        (float("inf"), float("inf"), ""),
        (2.0, 2, ""),
        (True, 1, "expected the bool True, got the int 1"),
        ((1, 2), [1, 2], ""),
        ((1, 2), (1, 3), "value 2: expected 2, got 3"),
        ((1, 2), (1, 2, 3), "expected a tuple of 2, got a tuple of 3"),
        ({"a": 1}, {"a": 2}, "a: expected 1, got 2"),
        ({"a": 1}, 2, "expected something of type dict, got the int 2"),
        ([1], torch.ones(1), "expected a list of 1, got a tensor (1,)"),
        (torch.tensor([1, 2]), torch.tensor([1, 2]), ""),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), "1 of 2 numbers differ, most of all [1]: "),
        (torch.tensor([0.0, -torch.inf]), torch.tensor([0.0, -torch.inf]), ""),
        (torch.tensor([0.0, -torch.inf]), torch.tensor([0.0, -9.0]), "1 of 2 numbers differ, "),
        (torch.tensor(1e3), torch.tensor(1e3 + 0.05), ""),
        (torch.tensor(1e-3), torch.tensor(2e-3), "1 of 1 numbers differ, most of all []: "),
        (torch.empty(0), torch.empty(0), ""),
        (torch.tensor(True), torch.tensor(False), "1 of 1 numbers differ, "),
    ],
)
def test_difference(expected: Any, got: Any, words: str) -> None:
    found = difference(expected, got, 1e-4)
    assert found.startswith(words), found
    assert bool(found) == bool(words), found


def test_a_case_depends_on_its_seed_alone() -> None:
    one, same, other = (scaled_case(Draw(seed)) for seed in (1, 1, 2))
    assert not difference(one, same, 0)
    assert difference(one, other, 0)


def test_run_sees_more_than_the_result() -> None:
    def with_gradient(function: Callable[..., Tensor], x: Tensor, factor: int) -> Any:
        x = x.clone().requires_grad_()
        y = function(x, factor).sum()
        return y.detach(), torch.autograd.grad(y, x)[0] if y.requires_grad else None

    toy = replace(TOY, run=with_gradient)
    assert judge(toy, lambda x, factor: factor * x).state == "solved"
    detached = judge(toy, lambda x, factor: factor * x.detach())
    assert detached.message.endswith("value 2: it returns None; is a return missing?")


def test_lines_of_code_are_statements() -> None:
    source = '''
    def f(x):
        """What it does."""
        ### BEGIN SOLUTION
        y = (x +
             1)  # one

        return y
        ### END SOLUTION
    '''
    assert lines_of_code(source) == 2


def test_card() -> None:
    assert TOY.card() == (
        "## 00.1 Scale\n\ndifficulty 1 of 5 ●○○○○ · importance 1 of 5 ●○○○○ · 1 minutes · "
        "at most 1 line"
    )
    assert str(Verdict("solved")) == "solved"


def test_check_prints_the_reply(capsys: pytest.CaptureFixture[str]) -> None:
    def open_stub(*sizes: int) -> int:
        raise NotImplementedError

    assert check("02.1", exercise("02.1").oracle) is True
    assert capsys.readouterr().out.startswith("02.1 solved")
    assert check("02.1", open_stub) is False
    said = "02.1 open. Write the function, run its cell, then this one again\n"
    assert capsys.readouterr().out == said


def test_a_long_reply_is_broken_between_words(capsys: pytest.CaptureFixture[str]) -> None:
    def too_long(*case: int) -> None:
        raise ValueError("no " * 60)

    assert check("02.1", too_long) is False
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 1
    assert max(map(len, lines)) <= 92


@pytest.mark.parametrize(
    ("identifier", "message"),
    [
        ("02.9", "exercise '02.9' does not exist; expected one of 02.1, 02.2, "),
        ("99.1", "notebook '99' has no exercises; expected one of "),
        ("", "notebook '' has no exercises; expected one of "),
    ],
)
def test_an_unknown_identifier_is_refused(identifier: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        check(identifier, stub)


@pytest.mark.parametrize("got", [3.0, -math.inf, math.nan])
def test_only_infinity_equals_infinity(got: float) -> None:
    assert difference(math.inf, got, 1e-4).startswith("expected inf, got")
    assert not difference(math.inf, math.inf, 1e-4)
