"""Keeping experts evenly used: the bias step, the sequence-wise loss, and how to measure it.

Why: a router that is left alone sends more and more tokens to the experts that happen to be ahead,
and the rest never learn. The classic cure, an auxiliary loss, pushes on the same weights as the
language loss and costs quality. DeepSeek-V3 instead lowers the bias of an overloaded expert by a
fixed step and raises that of an underloaded one, once per optimizer step, with no gradient
(report 2.1.2, text after eq 16). A very small loss (alpha = 1e-4) remains against sequences that
are lopsided in themselves (eqs 17-20).

Pure functions on tensors: nothing here knows what a model is.

Legend: B sequences, T tokens, E experts, K chosen a token.
"""

from __future__ import annotations

import torch
from torch import Tensor


def update_bias(bias: Tensor, counts: Tensor, gamma: float) -> Tensor:
    """The bias after one training step: bias + gamma x sign(mean load - load), shape (..., E).

    ``counts`` is the load of the *whole* batch of that step. An expert at exactly the mean stays.
    Source: report 2.1.2; gamma is its 'bias update speed' (0.001, then 0 at the end of training).
    Raises ValueError on shapes that differ or a negative gamma.
    """
    if counts.shape != bias.shape:
        raise ValueError(
            f"counts {tuple(counts.shape)} and bias {tuple(bias.shape)} differ; expected one count "
            "per expert of this layer"
        )
    if not gamma >= 0:
        raise ValueError(f"gamma is {gamma}; expected >= 0: a negative step would unbalance")
    load = counts.to(torch.float64)
    # Compared in exact integers' range, so that equality is equality.
    step = torch.sign(load.mean(dim=-1, keepdim=True) - load)
    return bias + gamma * step.to(bias.dtype)


def update_bias_in_proportion(bias: Tensor, counts: Tensor, rate: float) -> Tensor:
    """The variant that V3 does not use: bias + rate x (mean load - load) / mean load.

    Source: Loss-Free Balancing, Table 3, which kept the sign for its better perplexity. The paper
    does not say whether its error is a raw count; here it is relative, as MaxVio is.
    """
    load = counts.to(torch.float64)
    mean = load.mean(dim=-1, keepdim=True)
    return bias + (rate * (mean - load) / mean.clamp(min=1)).to(bias.dtype)


def max_violation(counts: Tensor) -> Tensor:
    """MaxVio = (max load - mean load) / mean load over the last dimension; 0 is perfect balance.

    Source: Loss-Free Balancing eq 4. An expert with twice its share gives 1. Shape (...).
    Raises ValueError where nothing was counted.
    """
    load = counts.to(torch.float64)
    mean = load.mean(dim=-1)
    if not bool((mean > 0).all()):
        raise ValueError("counts are all zero in a layer; expected the load of at least one token")
    return (load.amax(dim=-1) - mean) / mean


def sequence_balance_loss(scores: Tensor, indices: Tensor, alpha: float = 1.0) -> Tensor:
    """alpha x mean over sequences of sum_i f_i P_i, a scalar; perfect balance gives alpha.

    ``scores`` (B, T, E) are raw affinities, ``indices`` (B, T, K) the chosen experts. f (how often
    an expert was chosen, carries no gradient) and P (its mean normalised affinity, carries it) are
    multiplied per sequence, before the mean over the batch. Source: report eqs 17-20. Eq 18 counts
    the K best *raw* scores, although routing itself uses biased ones; pass whichever you mean.
    """
    _check_routing(scores, indices)
    experts, chosen = scores.shape[-1], indices.shape[-1]
    picked_BTE = torch.zeros_like(scores).scatter(-1, indices, 1.0)
    f_BE = picked_BTE.mean(dim=1) * (experts / chosen)
    p_BE = (scores / scores.sum(dim=-1, keepdim=True)).mean(dim=1)
    return alpha * (f_BE * p_BE).sum(dim=-1).mean()


def batch_balance_loss(scores: Tensor, indices: Tensor, alpha: float = 1.0) -> Tensor:
    """The same over the whole batch as if it were one sequence (report 4.5.3, 'batch-wise')."""
    _check_routing(scores, indices)
    return sequence_balance_loss(scores.flatten(0, 1)[None], indices.flatten(0, 1)[None], alpha)


def _check_routing(scores: Tensor, indices: Tensor) -> None:
    shaped = scores.dim() == indices.dim() == 3 and scores.shape[:2] == indices.shape[:2]
    if not shaped or scores.shape[-1] < indices.shape[-1] or indices.dtype != torch.int64:
        raise ValueError(
            f"scores {tuple(scores.shape)} and {indices.dtype} indices {tuple(indices.shape)} "
            "given; expected (batch, seq, experts) and int64 (batch, seq, chosen)"
        )
