"""Exercises of notebook 03, rotations: a stored key that moves, and the checkpoint's other layout.

Legend: S stored tokens, C latent, R rotary width, K = C + R, P = R / 2 pairs, H heads, N content
width, X = H (N + R).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv3_mini.course.checking import Draw, Drawing, Exercise, Function, Wrong
from dsv3_mini.course.exercises.nb02_cache import turn, turn_halves

# ------------------------------------------------------------------- 03.1 a stored token that moves


def move_case(draw: Draw) -> dict[str, Any]:
    pairs = draw.randint(2, 4)
    return {
        "rows_SK": draw.normal(draw.randint(2, 6), draw.randint(8, 12) + 2 * pairs),
        "speed_P": draw.uniform(0.8, 1.2) * 20.0 ** -(torch.arange(pairs) / pairs),
        "by": draw.choice([-1, 1]) * draw.randint(1, 40),
    }


def move_step_by_step(rows_SK: Tensor, speed_P: Tensor, by: int) -> Tensor:
    """A token at a time, a pair at a time, by one position at a time, in complex numbers."""
    moved = rows_SK.double().numpy().copy()
    start = moved.shape[1] - 2 * len(speed_P)
    for row in moved:
        for pair, speed in enumerate(speed_P.double().numpy()):
            place = start + 2 * pair
            z = complex(row[place], row[place + 1])
            for _ in range(abs(by)):
                z *= np.exp(1j * speed) if by > 0 else np.exp(-1j * speed)
            row[place : place + 2] = z.real, z.imag
    return torch.tensor(moved, dtype=torch.float32)


def moving(make: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> Function:
    """The answer of somebody who makes latents and keys of latents, keys and angles (S, P) so."""

    def answer(rows_SK: Tensor, speed_P: Tensor, by: int) -> Tensor:
        c_SC, k_SR = rows_SK.tensor_split([rows_SK.shape[1] - 2 * len(speed_P)], dim=1)
        return torch.cat(make(c_SC, k_SR, (by * speed_P).expand(len(rows_SK), -1)), dim=1)

    return answer


def to_new_position(rows_SK: Tensor, speed_P: Tensor, by: int) -> Tensor:
    angle_SP = (by + torch.arange(len(rows_SK)))[:, None] * speed_P
    return moving(lambda c, k, a: (c, turn(k, angle_SP)))(rows_SK, speed_P, by)


def turn_leading(x_SC: Tensor, angle_SP: Tensor) -> Tensor:
    turned, rest = x_SC.tensor_split([2 * angle_SP.shape[1]], dim=1)
    return torch.cat((turn(turned, angle_SP), rest), dim=1)


def move_picture(answer: Function) -> Drawing:
    draw, speed_P = Draw(3), torch.tensor([0.5, 0.25, 0.12, 0.06])
    latent_SC = draw.normal(1, 8).expand(24, -1)
    key_SR = turn(torch.ones(24, 8), torch.arange(24.0)[:, None] * speed_P)
    rows_SK = torch.cat((latent_SC, key_SR), dim=1)
    return Drawing("maps", {
        "panels": {"as stored": rows_SK, "moved by 12": answer(rows_SK, speed_P, 12)},
        "rows": "row of the cache", "columns": "latent: 0 to 7; rotary key: 8 to 15",
        "unit": "value",
    })  # fmt: skip


MOVE = Exercise(
    identifier="03.1", title="A stored token that moves",
    difficulty=2, importance=4, minutes=15, lines=7,
    case=move_case, oracle=move_step_by_step, picture=move_picture,
    alt="two caches of the same token at 24 positions. The latent's columns are stripes, the same "
    "in both. The rotary key's waves stand twelve rows higher after the move: row 0 has what row "
    "12 had.",
    wrong=(
        Wrong(moving(lambda c, k, a: (turn_leading(c, a), turn(k, a))),
              "the latent is turned as well; which part of a row knows its position?", 3),
        Wrong(moving(lambda c, k, a: (turn_leading(c, a), k)),
              "the latent is turned and the rotary key is not; the key stands at the end of a row",
              3),
        Wrong(moving(lambda c, k, a: (c, turn_halves(k, a))),
              "number i is paired with i + R/2; in these rows the pairs are neighbours", 7),
        Wrong(moving(lambda c, k, a: (c, turn(k, -a))),
              "the pairs turn the other way; by > 0 moves a token to a later position"),
        Wrong(to_new_position,
              "each row is turned by its whole new position; it is turned by its old one already"),
        Wrong(moving(lambda c, k, a: (c, turn(k, a[:, :1].expand_as(a)))),
              "all pairs turn as fast as the first; each has its own speed"),
        Wrong(moving(lambda c, k, a: (c, turn(k, a.flip(1)))),
              "the speeds are used from the last to the first"),
        Wrong(moving(lambda c, k, a: (c, turn(k, a.rad2deg()))),
              "angles in degrees; cos and sin expect radians"),
        Wrong(lambda rows, speed, by: rows.clone(),
              "nothing is turned; a stored rotary key belongs to the position it was made at"),
    ),
)  # fmt: skip

# ----------------------------------------------------------------------- 03.2 two layouts of pairs


def layout_case(draw: Draw) -> dict[str, Any]:
    heads, nope, rotary = draw.randint(2, 4), draw.randint(3, 9), draw.choice([6, 8, 10])
    w_XC = draw.normal(heads * (nope + rotary), draw.randint(3, 6))
    return {"w_XC": w_XC, "heads": heads, "nope": nope}


def layout_row_by_row(w_XC: Tensor, heads: int, nope: int) -> Tensor:
    """Each row is carried to where the other layout looks for it."""
    each, moved = len(w_XC) // heads, torch.empty_like(w_XC)
    half = (each - nope) // 2
    for number, row in enumerate(w_XC):
        head, place = divmod(number, each)
        if place >= nope:
            pair, member = divmod(place - nope, 2)
            place = nope + pair + half * member
        moved[head * each + place] = row
    return moved


def evens_first(x: Tensor) -> Tensor:
    return torch.cat((x[..., 0::2, :], x[..., 1::2, :]), dim=-2)


def ordering(order: Callable[[Tensor, int], Tensor]) -> Function:
    """The answer of somebody who orders the rows of every head, (H, N + R, C), so; N is given."""

    def answer(w_XC: Tensor, heads: int, nope: int) -> Tensor:
        return order(w_XC.unflatten(0, (heads, -1)), nope).flatten(0, 1)

    return answer


def rotary_rows(order: Callable[[Tensor], Tensor]) -> Function:
    """The answer of somebody who orders the rotary rows of every head, (H, R, C), so."""
    return ordering(lambda w, n: torch.cat((w[:, :n], order(w[:, n:])), dim=1))


def heads_as_one(w_HXC: Tensor, nope: int) -> Tensor:
    rotary_HRC = w_HXC[:, nope:]
    mixed = evens_first(rotary_HRC.flatten(0, 1)).view_as(rotary_HRC)
    return torch.cat((w_HXC[:, :nope], mixed), dim=1)


def layout_picture(answer: Function) -> Drawing:
    moved = answer(torch.eye(24), 2, 4)
    return Drawing("maps", {
        "panels": {"two heads: 4 content rows and 8 rotary rows each": moved},
        "rows": "row in the new matrix", "columns": "row in the checkpoint",
        "unit": "1: it came from here",
    })  # fmt: skip


LAYOUT = Exercise(
    identifier="03.2", title="From one layout of pairs to the other",
    difficulty=3, importance=3, minutes=12, lines=5,
    case=layout_case, oracle=layout_row_by_row, picture=layout_picture,
    alt="where each of 24 rows came from. Rows 0 to 3 of each head stay. Its eight rotary rows "
    "form two parallel flights of steps: first rows 4, 6, 8, 10 of the head, then 5, 7, 9, 11.",
    wrong=(
        Wrong(lambda w, heads, nope: w.clone(),
              "nothing is moved; the other code would turn numbers of different pairs together", 7),
        Wrong(rotary_rows(lambda x: x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)),
              "the way back: rows that lie in halves are brought together as neighbours", 7),
        Wrong(rotary_rows(lambda x: evens_first(x).roll(x.shape[1] // 2, 1)),
              "the second members come first, and all pairs then turn backwards", 7),
        Wrong(ordering(lambda w, n: evens_first(w)),
              "the content rows are moved too; they are never turned", 3),
        Wrong(ordering(lambda w, n: torch.cat((evens_first(w[:, :n]), w[:, n:]), dim=1)),
              "the content rows are moved, the rotary rows are not; content comes first", 3),
        Wrong(ordering(heads_as_one),
              "the pairs of all heads are sorted together; the halves belong to one head"),
        Wrong(ordering(lambda w, n: torch.cat((evens_first(w[:, n:]), w[:, :n]), dim=1)),
              "the rotary rows now stand before the content rows; each block stays in its place"),
    ),
)  # fmt: skip

EXERCISES = (MOVE, LAYOUT)
