"""Exercises of notebook 06, which token goes in, which is asked for, and what an answer costs.

Legend: T positions, N = T + 1 tokens, K depths, V vocabulary. Positions and tokens count from 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv3_mini.course.checking import Draw, Drawing, Exercise, Function, Wrong


def drawn_tokens(draw: Draw, count: int, vocabulary: int) -> Tensor:
    """Tokens of which no two are equal, so that a wrong one never passes for the right one."""
    return torch.tensor(draw.sample(range(vocabulary), count))


# ---------------------------------------------------------------- 06.1 who meets whom, eqs 21, 24


def pairs_case(draw: Draw) -> dict[str, Any]:
    depth = draw.randint(1, 4)
    return {"tokens_N": drawn_tokens(draw, depth + draw.randint(4, 9), 99), "depth": depth}


def pairs_step_by_step(tokens_N: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """A position at a time, and as many times to the next token as the depth says."""
    tokens, joined, asked = tokens_N.tolist(), [], []
    for position in range(len(tokens)):
        reached = position
        for _ in range(depth):
            reached += 1
        if reached + 1 in range(len(tokens)):
            joined.append(tokens[reached])
            asked.append(tokens[reached + 1])
    return torch.tensor(joined), torch.tensor(asked)


def pairs_picture(answer: Function) -> Drawing:
    panels, tokens = {}, torch.arange(9)
    for depth in (1, 2, 3):
        joined, asked = answer(tokens, depth)
        cells = torch.zeros(8, 9)
        for position, (one, other) in enumerate(zip(joined, asked, strict=True)):
            cells[position, : position + 1] = 1
            cells[position, one], cells[position, other] = 2, 3
        panels[f"depth {depth}"] = cells
    unit = "1 read, 2 joined, 3 asked for"
    return Drawing("maps", {"panels": panels, "rows": "position", "columns": "token", "unit": unit})


PAIRS = Exercise(
    identifier="06.1", title="What goes in, what is asked for",
    difficulty=1, importance=5, minutes=10, lines=2,
    case=pairs_case, oracle=pairs_step_by_step, picture=pairs_picture,
    alt="nine tokens, eight positions, three depths. In each row, from left to right: what the "
    "main model has read, a gap at depths 2 and 3, the token joined, the token asked for. Each "
    "depth more moves the last two one column to the right, and one row more is empty.",
    wrong=(
        Wrong(lambda t, k: (t[k:-1], t[k:-1]),
              "the token that goes in is asked for; a copy would be a perfect answer", 20),
        Wrong(lambda t, k: (t[k + 1 :], t[k + 1 :]),
              "the answer goes in; what is joined lies one token before what is asked for", 20),
        Wrong(lambda t, k: (t[k:-1], t[k + 1 : -1]),
              "the answers are one column short; the last token is an answer, too", 20),
        Wrong(lambda t, k: (t[k:-2], t[k + 1 : -1]),
              "one position too few; the last token never goes in, but it is an answer", 20),
        Wrong(lambda t, k: (t[k - 1 : -2], t[k + 1 :]),
              "what is joined lies two tokens before the answer; that is known from the depth "
              "before"),
        Wrong(lambda t, k: (t[1:-1], t[2:]),
              "each depth is given depth 1's tokens; each depth looks one token further"),
        Wrong(lambda t, k: (t[k + 1 : -1], t[k + 2 :]),
              "one depth too many; depth 1 joins position i with token i + 1"),
        Wrong(lambda t, k: (t.roll(-k)[:-1], t.roll(-k - 1)[:-1]),
              "positions without an answer get tokens from the start of the text; leave them out"),
    ),
)  # fmt: skip

# ------------------------------------------------------------------------ 06.4 the loss, eqs 24, 25


def loss_case(draw: Draw) -> dict[str, Any]:
    depths, vocabulary = draw.randint(2, 3), draw.randint(14, 18)
    positions = depths + draw.randint(3, 6)
    return {
        "logits_KTV": 2 * draw.normal(depths, positions, vocabulary),
        "tokens_N": drawn_tokens(draw, positions + 1, vocabulary),
        "weight": draw.choice([0.1, 0.3, 0.5]),
    }


def loss_by_adding(logits_KTV: Tensor, tokens_N: Tensor, weight: float) -> Tensor:
    """Every probability on its own, from the last token backwards."""
    depths, positions, _ = logits_KTV.shape
    surprise = []
    for depth, rows in enumerate(logits_KTV.double().numpy()):
        for asked in reversed(range(depth + 2, positions + 1)):
            powers = np.exp(rows[asked - depth - 2])
            surprise.append(-np.log(powers[tokens_N[asked]] / powers.sum()))
    return torch.tensor(weight * sum(surprise) / (positions * depths), dtype=torch.float32)


def scoring(
    score: Callable[[Tensor, Tensor, int, int], Tensor], scale: Callable[[int, float], float]
) -> Function:
    """The answer of somebody who scores a depth (rows, tokens, k, T) so, and scales the sum so."""

    def answer(logits_KTV: Tensor, tokens_N: Tensor, weight: float) -> Tensor:
        rows_KTV, (depths, positions, _) = logits_KTV.log_softmax(2), logits_KTV.shape
        scores = [score(rows_KTV[k - 1], tokens_N, k, positions) for k in range(1, depths + 1)]
        return torch.stack(scores).sum() * scale(depths, weight)

    return answer


def surprise(rows_TV: Tensor, tokens_T: Tensor) -> Tensor:
    return -rows_TV.gather(1, tokens_T[:, None]).sum()


def right_score(rows: Tensor, tokens: Tensor, k: int, positions: int) -> Tensor:
    return surprise(rows[:-k], tokens[k + 1 :]) / positions


def right_scale(depths: int, weight: float) -> float:
    return weight / depths


def without_softmax(logits_KTV: Tensor, tokens_N: Tensor, weight: float) -> Tensor:
    depths, positions, _ = logits_KTV.shape
    scores = [right_score(logits_KTV[k - 1], tokens_N, k, positions) for k in range(1, depths + 1)]
    return torch.stack(scores).sum() * weight / depths


def loss_picture(answer: Function) -> Drawing:
    lengths, vocabulary = [8, 16, 32, 64], 16
    curves = {
        f"{depths} depth" + "s" * (depths > 1): [
            answer(torch.zeros(depths, n, vocabulary), torch.arange(n + 1) % vocabulary, 1.0).item()
            for n in lengths
        ]
        for depths in (1, 2, 4)
    }
    return Drawing("lines", {
        "x": lengths, "curves": curves | {"ln 16": [float(np.log(16))] * len(lengths)},
        "xlabel": "positions T", "ylabel": "loss of guessing among 16 tokens (nats)", "logx": True,
    })  # fmt: skip


LOSS = Exercise(
    identifier="06.4", title="The loss",
    difficulty=3, importance=4, minutes=15, lines=6,
    case=loss_case, oracle=loss_by_adding, picture=loss_picture,
    alt="the loss, with lambda 1, of a module that finds all 16 tokens equally likely. Every "
    "answer costs ln 16, 2.77 nats, but the lines rise towards it from below: of T positions, k "
    "are not asked at depth k, and the sum is divided by T all the same. More depths, lower lines.",
    wrong=(
        Wrong(scoring(lambda r, t, k, n: right_score(r, t, k, n) * n / (n - k), right_scale),
              "a mean over the T - k answers; equation 24 divides by T"),
        Wrong(scoring(lambda r, t, k, n: surprise(r[:-k], t[k:-1]) / n, right_scale),
              "depth k is asked for token i + k, which went in; its answer is the one after", 20),
        Wrong(scoring(lambda r, t, k, n: surprise(r[: -k - 1], t[k + 1 : -1]) / n, right_scale),
              "the answers are one column short; the last token is an answer, too", 20),
        Wrong(scoring(lambda r, t, k, n: surprise(r[:-k], t[2 : n - k + 2]) / n, right_scale),
              "each depth is asked for depth 1's tokens; each looks one token further"),
        Wrong(scoring(lambda r, t, k, n: surprise(r[k:], t[k + 1 :]) / n, right_scale),
              "the first k rows are left out; the last k are those without an answer"),
        Wrong(scoring(right_score, lambda depths, weight: weight),
              "the depths are added up; equation 25 takes their mean"),
        Wrong(scoring(right_score, lambda depths, weight: 1 / depths),
              "the weight is missing; equation 25 multiplies by it"),
        Wrong(scoring(lambda r, t, k, n: right_score(r, t, k, n) * (k == 1), right_scale),
              "one depth is scored; every depth has a loss"),
        Wrong(scoring(lambda r, t, k, n: -right_score(r, t, k, n), right_scale),
              "the sign is turned; a loss falls where the right token gets likelier"),
        Wrong(without_softmax,
              "logits are taken for log-probabilities; a softmax makes them of the logits"),
    ),
)  # fmt: skip

EXERCISES = (PAIRS, LOSS)
