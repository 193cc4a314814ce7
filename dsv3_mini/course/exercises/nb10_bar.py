"""Exercises of notebook 10: the bar, which a guesser sets that has only counted.

Legend: D domains, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dsv3_mini.course.checking import Draw, Drawing, Exercise, Function, Wrong

# ------------------------------------------------------------------- 10.2 two bars, from two counts


def bars_case(draw: Draw) -> dict[str, Any]:
    domains, vocabulary = draw.randint(2, 3), draw.randint(6, 9)

    def counts(least: int) -> Tensor:
        rows = [[least + int(draw.expovariate(0.1)) for _ in range(vocabulary)]
                for _ in range(domains)]  # fmt: skip
        return torch.tensor(rows)

    train_DV, held_out_DV = counts(0), counts(1)
    train_DV[0] *= 5  # one domain has much more text to count
    held_out_DV[-1] *= 3
    train_DV[:, draw.randrange(vocabulary)] = 0  # and one token is new in the held-out text
    return {"train_DV": train_DV, "held_out_DV": held_out_DV}


def bars_token_by_token(train_DV: Tensor, held_out_DV: Tensor) -> Tensor:
    """One domain and one token after the other, in lists."""
    guessers = []
    for counts in train_DV.tolist():
        total = sum(counts) + len(counts)
        guessers.append([(count + 1) / total for count in counts])
    together = [sum(each) / len(guessers) for each in zip(*guessers, strict=True)]
    losses = [0.0, 0.0]
    for own, counts in zip(guessers, held_out_DV.tolist(), strict=True):
        for place, guesser in enumerate((together, own)):
            for token, count in enumerate(counts):
                nats = -count * math.log(guesser[token])
                losses[place] += nats / sum(counts) / len(guessers)
    return torch.tensor(losses)


def shares(counts_DV: Tensor) -> Tensor:
    return counts_DV / counts_DV.sum(1, keepdim=True)


def guessing(
    mix: Callable[[Tensor, Tensor], Tensor] = lambda p_DV, train_DV: p_DV.mean(0).log(),
    add: float = 1,
    held: Callable[[Tensor], Tensor] = shares,
    unit: Callable[[Tensor], Tensor] = lambda nats: nats,
    domains: Callable[[int], int] = lambda count: count,
    swap: bool = False,
) -> Function:
    """The answer of somebody who counts, mixes and scores so."""

    def answer(train_DV: Tensor, held_out_DV: Tensor) -> Tensor:
        p_DV, held_DV = shares(train_DV.double() + add), held(held_out_DV.double())
        both_DV = mix(p_DV, train_DV.double() + add).expand_as(p_DV)
        scored = [-(held_DV * log).sum() / domains(len(p_DV)) for log in (both_DV, p_DV.log())]
        bars_2 = unit(torch.stack(scored)).float()
        return bars_2.flip(0) if swap else bars_2

    return answer


def bars_picture(answer: Function) -> Drawing:
    draw, sizes = Draw(0), [2**power for power in range(4, 17, 2)]
    often_V = torch.arange(1, 257) ** -1.3  # a few tokens are frequent, most are rare
    orders = [draw.sample(range(256), 256) for _ in range(4)]
    p_DV = shares(torch.stack([often_V + 2 * often_V[order] for order in orders]))
    texts = [torch.tensor(draw.choices(range(256), p.tolist(), k=sizes[-1])) for p in p_DV]

    def counted(tokens: int) -> Tensor:
        return torch.stack([text[:tokens].bincount(minlength=256) for text in texts])

    both = [answer(counted(tokens), (10**6 * p_DV).round().long()).tolist() for tokens in sizes]
    curves = {
        "uniform": [math.log(256)] * len(sizes),
        "one for all text": [one for one, _ in both],
        "one a domain": [own for _, own in both],
    }
    return Drawing("lines", {
        "x": sizes, "curves": curves, "xlabel": "training tokens counted in each domain",
        "ylabel": "nats per held-out token", "logx": True,
    })  # fmt: skip


BARS = Exercise(
    identifier="10.2", title="A bar that does not flatter",
    difficulty=2, importance=5, minutes=15, lines=6,
    case=bars_case, oracle=bars_token_by_token, picture=bars_picture,
    alt="both bars, and ln 256, for four made-up domains of 256 tokens that share half as much as "
    "each has for itself. After 16 tokens counted, both lie near the uniform 5.55 and would "
    "flatter any model. From about 4,000 tokens on they are flat, the one for all text at 4.4, the "
    "one a domain below it at 3.8.",
    wrong=(
        Wrong(guessing(add=0),
              "nothing is added to the counts, and a token that was never counted makes the loss "
              "infinite"),
        Wrong(lambda train, held: guessing(add=0)(held, held),
              "the guesser has counted the held-out text itself; a model has not seen it either"),
        Wrong(lambda train, held: guessing(add=0, held=lambda _: shares(train.double() + 1))(
            train + 1, held),
              "scored on the training text; a model's loss is measured on held-out text"),
        Wrong(guessing(held=lambda held_DV: shares(held_DV + 1)),
              "1 is added to the held-out counts as well; these are what happened, not a guess"),
        Wrong(guessing(mix=lambda p, train: shares(train.sum(0, keepdim=True)).log()),
              "training counts are pooled, so a domain with more text weighs more; the one guesser "
              "takes the mean of the frequencies"),
        Wrong(guessing(held=lambda held_DV: held_DV / held_DV.sum() * len(held_DV)),
              "held-out tokens are pooled, so a domain with more of them weighs more; the mean "
              "over domains is meant"),
        Wrong(guessing(mix=lambda p, train: p.log().mean(0)),
              "the mean of the logarithms; mix probabilities, then take the logarithm"),
        Wrong(guessing(unit=lambda nats: nats / math.log(2)),
              "bits; a loss is in nats"),
        Wrong(guessing(unit=torch.exp),
              "the perplexity; the loss is its logarithm"),
        Wrong(guessing(domains=lambda count: 1),
              "the domains' losses are added up; the mean is meant"),
        Wrong(guessing(swap=True),
              "the two are swapped; the one guesser for all text comes first"),
    ),
)  # fmt: skip

EXERCISES = (BARS,)
