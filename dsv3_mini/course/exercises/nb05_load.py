"""Exercises of notebooks 05 and 05b on measuring: MaxVio (05.2), the sequence-wise loss (05.3).

Legend: B batches or sequences, T tokens, E experts, K chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dsv3_mini.course.checking import Draw, Drawing, Exercise, Function, Wrong

# --------------------------------------------------------------- 05.2 MaxVio, pooled and in a batch


def violation_case(draw: Draw) -> dict[str, Any]:
    batches, experts = draw.randint(3, 5), draw.randint(4, 8)
    counts = [[draw.randint(5, 60) for _ in range(experts)] for _ in range(batches)]
    counts = [[(n + 1) * count for count in row] for n, row in enumerate(counts)]
    counts[-1][-1] = 0
    return {"counts_BE": torch.tensor(counts)}


def violation_by_sorting(counts_BE: Tensor) -> Tensor:
    """In fractions of whole numbers, batch by batch."""

    def one(loads: list[int]) -> float:
        return (sorted(loads)[-1] * len(loads) - sum(loads)) / sum(loads)

    rows = counts_BE.tolist()
    pooled = [sum(column) for column in zip(*rows, strict=True)]
    return torch.tensor([one(pooled), sum(map(one, rows)) / len(rows)])


def measuring(
    one: Callable[[Tensor, Tensor], Tensor] = lambda load, mean: (load.amax(-1) - mean) / mean,
    together: Callable[[Tensor], Tensor] = lambda counts: counts.sum(0),
    over: Callable[[Tensor], Tensor] = lambda each: each.mean(),
) -> Function:
    """The answer of somebody who measures loads so, pools counts so, and joins batches so."""

    def answer(counts_BE: Tensor) -> Tensor:
        load_BE = counts_BE.double()
        pooled, each = (one(x, x.mean(-1)) for x in (together(load_BE), load_BE))
        return torch.stack((pooled, over(each))).float()

    return answer


def violation_picture(answer: Function) -> Drawing:
    tokens = [2**n for n in range(5, 13)]
    curves: dict[str, list[float]] = {"in a batch": [], "20 batches pooled": []}
    for n in tokens:
        top_BTK = Draw(n).normal(20, n, 16).topk(4, dim=2).indices
        counts_BE = torch.stack([torch.bincount(b.flatten(), minlength=16) for b in top_BTK])
        pooled, mean = answer(counts_BE).tolist()
        curves["in a batch"].append(mean)
        curves["20 batches pooled"].append(pooled)
    return Drawing("lines", {
        "x": tokens, "curves": curves, "xlabel": "tokens in a batch", "ylabel": "MaxVio",
        "logx": True,
    })  # fmt: skip


VIOLATION = Exercise(
    identifier="05.2", title="MaxVio, pooled and in a batch",
    difficulty=2, importance=3, minutes=10, lines=6,
    case=violation_case, oracle=violation_by_sorting, picture=violation_picture,
    alt="a router that is perfectly fair, 4 of 16 experts at random. Measured in each batch, "
    "MaxVio falls from 0.58 for 32 tokens to 0.05 for 4,096; pooled over 20 batches it is less "
    "than half of that at every size. Nothing is wrong with the router: this is noise of counting.",
    wrong=(
        Wrong(measuring(lambda load, mean: load.amax(-1) / mean),
              "the largest load over the mean; perfect balance should give 0"),
        Wrong(measuring(lambda load, mean: (load.amax(-1) - load.amin(-1)) / mean),
              "the range from the least to the most; MaxVio compares the most with the mean"),
        Wrong(measuring(lambda load, mean: (load - mean[..., None]).abs().mean(-1) / mean),
              "the mean deviation; one expert that holds up all others would hardly be seen"),
        Wrong(measuring(lambda load, mean: load.std(-1, unbiased=False) / mean),
              "the standard deviation over the mean; MaxVio asks for the worst expert"),
        Wrong(measuring(lambda load, mean: (load.amax(-1) - mean) / load.sum(-1)),
              "divided by all tokens instead of the mean load"),
        Wrong(measuring(together=lambda counts: (counts / counts.sum(1, keepdim=True)).sum(0)),
              "shares are pooled, so that a small batch counts as much as a large one; pool "
              "counts"),
        Wrong(measuring(over=lambda each: each.amax()),
              "the worst batch instead of the mean over batches"),
        Wrong(lambda counts: violation_by_sorting(counts).flip(0),
              "the two are exchanged: pooled comes first"),
    ),
)  # fmt: skip

# ----------------------------------------------------------- 05.3 the sequence-wise loss, eqs 17-20


def loss_case(draw: Draw) -> dict[str, Any]:
    batch, tokens, experts = draw.randint(2, 3), draw.randint(5, 8), draw.randint(6, 9)
    lopsided_B1E = 1.5 * draw.normal(batch, 1, experts)
    return {
        "s_BTE": (draw.normal(batch, tokens, experts) + lopsided_B1E).sigmoid(),
        "chosen": draw.randint(2, 3),
        "alpha": draw.choice([0.5, 1.0, 2.0]),
    }


def loss_one_by_one(s_BTE: Tensor, chosen: int, alpha: float) -> Tensor:
    """Sequence by sequence, expert by expert; chosen is who has fewer than K ahead."""
    batch, tokens, experts = s_BTE.shape
    losses = []
    for s_TE in s_BTE:
        totals = [sum(s) for s in s_TE]
        for i in range(experts):
            often = sum(int((s > s[i]).sum()) < chosen for s in s_TE)
            share = sum(s[i] / total for s, total in zip(s_TE, totals, strict=True)) / tokens
            losses.append(experts * often / (chosen * tokens) * share)
    return alpha * torch.stack(losses).sum() / batch


def with_gradient(function: Function, s_BTE: Tensor, chosen: int, alpha: float) -> Any:
    """The loss, and its gradient with respect to the affinities."""
    s_BTE = s_BTE.clone().requires_grad_()
    loss = function(s_BTE, chosen, alpha)
    gradient = torch.zeros_like(s_BTE)
    if isinstance(loss, Tensor) and loss.requires_grad:
        (gradient,) = torch.autograd.grad(loss.sum(), s_BTE)
    return {"loss": loss, "gradient": gradient}


def losing(
    join: Callable[[Tensor, Tensor], Tensor] = lambda f, p: (f * p).sum(1).mean(),
    share: Callable[[Tensor, Tensor], Tensor] = lambda s, picked: s / s.sum(2, keepdim=True),
    factor: Callable[[int, int, int], float] = lambda experts, chosen, tokens: experts / chosen,
) -> Function:
    """The answer of somebody who makes P and f of affinities so, and joins (B, E) of both so."""

    def answer(s_BTE: Tensor, chosen: int, alpha: float) -> Tensor:
        top_BTK = s_BTE.topk(chosen, dim=2).indices
        picked_BTE = torch.zeros_like(s_BTE).scatter(2, top_BTK, 1.0)
        f_BE = picked_BTE.mean(1) * factor(s_BTE.shape[2], chosen, s_BTE.shape[1])
        return alpha * join(f_BE, share(s_BTE, picked_BTE).mean(1))

    return answer


def loss_picture(answer: Function) -> Drawing:
    def turns(used: int) -> Tensor:
        """32 tokens take turns at the first experts; the rest of 16 suit none of them."""
        far_TE = (torch.arange(used) - torch.arange(32)[:, None]) % used
        return torch.cat((0.9 - 0.05 * far_TE, torch.full((32, 16 - used), 0.1)), dim=1)

    batches = {
        "each sequence\nuses all evenly": (turns(16), turns(16)),
        "each sequence uses\nits own half": (turns(8), turns(8).roll(8, 1)),
        "both use the\nsame half": (turns(8), turns(8)),
        "both use the\nsame four": (turns(4), turns(4)),
    }
    groups = {name: answer(torch.stack(b), 4, 1.0).item() for name, b in batches.items()}
    return Drawing("bars", {"groups": groups, "ylabel": "sum of f P, alpha = 1"})


LOSS = Exercise(
    identifier="05.3", title="The sequence-wise loss",
    difficulty=3, importance=4, minutes=20, lines=6,
    case=loss_case, oracle=loss_one_by_one, picture=loss_picture, run=with_gradient,
    alt="two sequences of 32 tokens, 4 of 16 experts chosen. Where each sequence uses all experts "
    "evenly, the sum is 1. Where each uses one half, it is 1.76, whether both use the same half "
    "or opposite ones, which balance each other in the batch. Where both use the same four, it "
    "is 2.93.",
    wrong=(
        Wrong(losing(lambda f, p: (f * p.detach()).sum(1).mean()),
              "the right number without a gradient: P is detached, so that nothing is learned", 16),
        Wrong(losing(lambda f, p: (f.mean(0) * p.mean(0)).sum()),
              "f and P are averaged over the batch before their product; then sequences that are "
              "lopsided in opposite ways cancel", 16),
        Wrong(losing(share=lambda s, picked: s * picked / (s * picked).sum(2, keepdim=True)),
              "P is made of the gates of the chosen; over which experts does equation 19 sum?", 16),
        Wrong(losing(share=lambda s, picked: s),
              "P is made of raw affinities; equation 19 normalises them", 16),
        Wrong(losing(share=lambda s, picked: s.softmax(2)),
              "affinities go through a softmax; equation 19 divides them by their sum", 16),
        Wrong(losing(factor=lambda experts, chosen, tokens: 1.0),
              "the factor N_r / K_r is missing from f; what should perfect balance give?", 16),
        Wrong(losing(factor=lambda experts, chosen, tokens: tokens),
              "f is a plain count; what should perfect balance give?", 16),
        Wrong(losing(factor=lambda experts, chosen, tokens: experts / chosen * tokens),
              "f is not divided by the tokens, so long sequences weigh more", 16),
        Wrong(losing(lambda f, p: (f * p).sum()),
              "losses of the sequences are added up; the mean does not grow with the batch"),
        Wrong(losing(lambda f, p: (f * p).mean(1).mean()),
              "the mean over experts; equation 17 has a sum"),
    ),
)  # fmt: skip

EXERCISES = (VIOLATION, LOSS)
