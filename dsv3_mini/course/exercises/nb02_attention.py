"""Exercises of notebook 02, the second half: keys and values, made and not made.

Legend: S tokens seen, H heads, C latent, N content width, R rotary width, V value width, K = C + R,
X = H (N + V) in a matrix and N + V with a head before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dsv3_mini.course.checking import Draw, Drawing, Exercise, Function, Wrong
from dsv3_mini.course.exercises.nb02_cache import norm

# ------------------------------------------------ 02.3 every head's keys and values, eqs 2, 4, 5


def expand_case(draw: Draw) -> dict[str, Any]:
    heads, nope, value = draw.randint(2, 4), draw.randint(3, 6), draw.randint(3, 6)
    latent, rotary = draw.randint(5, 9), draw.choice([2, 4, 6])
    w_XC = draw.normal(heads * (nope + value), latent) / latent**0.5
    rows_SK = draw.normal(draw.randint(3, 7), latent + rotary)
    return {"rows_SK": rows_SK, "w_XC": w_XC, "heads": heads, "nope": nope}


def expand_one_by_one(
    rows_SK: Tensor, w_XC: Tensor, heads: int, nope: int
) -> tuple[Tensor, Tensor]:
    """Head by head and token by token."""
    rows, w = rows_SK.double().numpy(), w_XC.double().numpy()
    each, latent = len(w) // heads, w.shape[1]
    made = [[w[i * each : (i + 1) * each] @ row[:latent] for row in rows] for i in range(heads)]
    keys = [[[*x[:nope], *r[latent:]] for x, r in zip(m, rows, strict=True)] for m in made]
    values = [[x[nope:] for x in head] for head in made]
    k, v = (torch.tensor(np.array(x), dtype=torch.float32) for x in (keys, values))
    return k, v


def reading(order: Callable[[Tensor, int, int], Tensor]) -> Function:
    """The answer of somebody who takes the rows of W for those of another order."""

    def answer(rows: Tensor, w_XC: Tensor, heads: int, nope: int) -> tuple[Tensor, Tensor]:
        return expand_one_by_one(rows, order(w_XC, heads, nope), heads, nope)

    return answer


def then(change: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]) -> Function:
    """The answer of somebody who puts right keys and values together in another way."""

    def answer(rows: Tensor, w_XC: Tensor, heads: int, nope: int) -> tuple[Tensor, Tensor]:
        return change(*expand_one_by_one(rows, w_XC, heads, nope), nope)

    return answer


def keys_before_values(w_XC: Tensor, heads: int, nope: int) -> Tensor:
    keys, values = (x.unflatten(0, (heads, -1)) for x in w_XC.tensor_split([heads * nope]))
    return torch.cat((keys, values), dim=1).flatten(0, 1)


def normed_again(rows_SK: Tensor, w_XC: Tensor) -> Tensor:
    latent = w_XC.shape[1]
    return torch.cat((norm(rows_SK[:, :latent]), rows_SK[:, latent:]), dim=1)


def expand_picture(answer: Function) -> Drawing:
    draw, position_S1 = Draw(0), torch.arange(16.0)[:, None]
    angle_SP = position_S1 * torch.tensor([1.0, 0.5, 0.25, 0.1])
    turning_SR = 2 * torch.stack((angle_SP.cos(), angle_SP.sin()), dim=2).flatten(1)
    rows_SK = torch.cat((draw.normal(16, 12), turning_SR), dim=1)
    keys, _ = answer(rows_SK, draw.normal(3 * 32, 12) / 4, 3, 16)
    panels = {f"keys of head {head}": key for head, key in enumerate(keys)}
    return Drawing(
        "maps", {"panels": panels, "rows": "token", "columns": "number", "unit": "value"}
    )


EXPAND = Exercise(
    identifier="02.3", title="Every head's keys and values",
    difficulty=2, importance=4, minutes=15, lines=6,
    case=expand_case, oracle=expand_one_by_one, picture=expand_picture,
    alt="the keys of three heads for 16 tokens. Columns 0 to 15, the content, differ from head to "
    "head; columns 16 to 23, the rotary key, show the same waves in all three.",
    wrong=(
        Wrong(reading(keys_before_values),
              "all key rows of W are taken to come first; each head has its keys, then its values"),
        Wrong(reading(lambda w, h, n: w.unflatten(0, (-1, h)).transpose(0, 1).flatten(0, 1)),
              "the heads' rows of W are taken in turn; the rows of one head stand together"),
        Wrong(reading(lambda w, h, n: w.unflatten(0, (h, -1)).roll(n, 1).flatten(0, 1)),
              "each head's values are taken to come before its keys"),
        Wrong(then(lambda k, v, n: (k[..., :n], v)),
              "the rotary key is missing from the keys", 2),
        Wrong(then(lambda k, v, n: (k.roll(k.shape[2] - n, 2), v)),
              "the rotary key stands before the content; equation 4 has it behind"),
        Wrong(then(lambda k, v, n: (k, torch.cat((v, k[..., n:]), 2))),
              "the rotary key entered the values too; position never does", 3),
        Wrong(then(lambda k, v, n: (k.transpose(0, 1), v.transpose(0, 1))),
              "tokens stand before heads; attention wants (heads, tokens, width)"),
        Wrong(lambda rows, w, h, n: expand_one_by_one(normed_again(rows, w), w, h, n),
              "the latent is normalised again; what is stored has been through the norm", 4),
    ),
)  # fmt: skip

# ----------------------------------------------- 02.4 a step without keys and values, V2 appendix C


def step_case(draw: Draw) -> dict[str, Any]:
    heads, nope, value = draw.randint(2, 4), draw.randint(6, 9), draw.randint(6, 9)
    latent, rotary = draw.randint(10, 14), draw.choice([2, 4])
    return {
        "q_nope_HN": draw.normal(heads, nope),
        "q_rope_HR": draw.normal(heads, rotary),
        "rows_SK": draw.normal(draw.randint(30, 50), latent + rotary),
        "w_XC": draw.normal(heads * (nope + value), latent) / latent**0.5,
    }


def step_one_by_one(q_nope_HN: Tensor, q_rope_HR: Tensor, rows_SK: Tensor, w_XC: Tensor) -> Tensor:
    """Keys and values in full, then attention, one head and one token at a time."""
    heads, nope = q_nope_HN.shape
    q_HK = torch.cat((q_nope_HN, q_rope_HR), 1).double().numpy()
    out = []
    for q, keys, values in zip(q_HK, *expand_one_by_one(rows_SK, w_XC, heads, nope), strict=True):
        logits = [sum(a * b for a, b in zip(q, k, strict=True)) for k in keys.double().numpy()]
        powers = np.exp(np.array(logits) / np.sqrt(len(q)))
        mean = sum(p * v for p, v in zip(powers, values.double().numpy(), strict=True))
        out.append(mean / powers.sum())
    return torch.tensor(np.array(out), dtype=torch.float32)


def counted(function: Function, q_nope: Tensor, q_rope: Tensor, rows: Tensor, w: Tensor) -> Any:
    """The output, and whether it took at most twice the operations of the absorbed path."""
    with FlopCounterMode(display=False) as counter:
        output = function(q_nope, q_rope, rows, w)
    (heads, _), latent = q_nope.shape, w.shape[1]
    absorbed = 2 * (w.numel() + heads * len(rows) * (rows.shape[1] + latent))
    return {"output": output, "few operations": counter.get_total_flops() <= 2 * absorbed}


def weighing(weights: Callable[[Tensor, Tensor, int, int, int], Tensor]) -> Function:
    """The absorbed path of somebody who makes weights of content scores and rotary scores so."""

    def answer(q_nope_HN: Tensor, q_rope_HR: Tensor, rows_SK: Tensor, w_XC: Tensor) -> Tensor:
        (heads, nope), rotary, latent = q_nope_HN.shape, q_rope_HR.shape[1], w_XC.shape[1]
        c_SC, k_SR = rows_SK.tensor_split([latent], dim=1)
        w_k, w_v = w_XC.unflatten(0, (heads, -1)).tensor_split([nope], dim=1)
        content = torch.einsum("hn,hnc->hc", q_nope_HN, w_k) @ c_SC.T
        shares = weights(content, q_rope_HR @ k_SR.T, nope, rotary, latent)
        return torch.einsum("hc,hvc->hv", shares @ c_SC, w_v)

    return answer


def expanding(q_nope_HN: Tensor, q_rope_HR: Tensor, rows_SK: Tensor, w_XC: Tensor) -> Tensor:
    w_HXC, latent = w_XC.unflatten(0, (len(q_nope_HN), -1)), w_XC.shape[1]
    made_HSX = rows_SK[:, :latent] @ w_HXC.mT
    del made_HSX  # only its cost counts
    return right(q_nope_HN, q_rope_HR, rows_SK, w_XC)


right = weighing(lambda a, b, n, r, c: ((a + b) / (n + r) ** 0.5).softmax(1))


def step_picture(answer: Function) -> Drawing:
    targets, tokens = [3, 8, 0, 11, 6, 2], 12
    w_HXC = torch.stack([torch.linalg.qr(Draw(h).normal(12, 12))[0] for h in range(6)])
    q_HN = torch.stack([40 * w[:, target] for w, target in zip(w_HXC, targets, strict=True)])
    w_XC = torch.cat((w_HXC, torch.eye(12).expand(6, -1, -1)), dim=1).flatten(0, 1)
    rows = torch.cat((torch.eye(tokens), torch.zeros(tokens, 4)), dim=1)
    out = answer(q_HN, torch.zeros(6, 4), rows, w_XC)
    names = [f"head {h}, asks for {target}" for h, target in enumerate(targets)]
    return Drawing("maps", {
        "panels": {"what six heads bring back from 12 tokens": out}, "rows": "",
        "columns": "number of the output", "unit": "value", "ticks": names,
    })  # fmt: skip


STEP = Exercise(
    identifier="02.4", title="A decode step without keys and values",
    difficulty=4, importance=5, minutes=25, lines=9,
    case=step_case, oracle=step_one_by_one, picture=step_picture, run=counted,
    alt="six heads, twelve tokens. Token t's latent is one at place t and zero elsewhere, and each "
    "head asks for another token: one bright cell a row, at 3, 8, 0, 11, 6 and 2.",
    wrong=(
        Wrong(weighing(lambda a, b, n, r, c: ((a + b) / n**0.5).softmax(1)),
              "the scale of the content part alone; the query has N + R numbers", 5),
        Wrong(weighing(lambda a, b, n, r, c: ((a + b) / (c + r) ** 0.5).softmax(1)),
              "the scale of the absorbed query's width, C + R; absorbing changes no score", 5),
        Wrong(weighing(lambda a, b, n, r, c: (a / n**0.5 + b / r**0.5).softmax(1)),
              "content and rotary scores with a scale each; their sum has one", 5),
        Wrong(weighing(lambda a, b, n, r, c: (a + b).softmax(1)),
              "the scale is missing", 5),
        Wrong(weighing(lambda a, b, n, r, c: (a / (n + r) ** 0.5).softmax(1)),
              "the rotary part of the score is missing", 2),
        Wrong(weighing(lambda a, b, n, r, c: ((a + b) / (n + r) ** 0.5).softmax(0)),
              "the softmax runs over heads; each head weighs the tokens"),
        Wrong(lambda q, p, rows, w: right(q, p, normed_again(rows, w), w),
              "the latent is normalised again; what is stored has been through the norm", 4),
        Wrong(expanding,
              "the right numbers, the long way: keys or values were made for every token"),
    ),
)  # fmt: skip

EXERCISES = (EXPAND, STEP)
