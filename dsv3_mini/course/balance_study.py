"""Ways to balance experts, each trained from several seeds, side by side.

Why a study and not a run: at this size the spread between seeds is larger than most differences,
and a single run shows whatever one likes.

Legend: D domains, n windows, L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3_mini.balance import max_violation, update_bias, update_bias_in_proportion
from dsv3_mini.course.experts import small_moe
from dsv3_mini.course.runs import run_all
from dsv3_mini.data import load_corpus
from dsv3_mini.model import Transformer
from dsv3_mini.train import TrainConfig, evaluate, train

SEQ_LEN = 64
LAST = 20


@dataclass(frozen=True)
class Way:
    """How to balance: bias speed, weight of the sequence-wise and of the batch-wise loss."""

    gamma: float = 0.0
    alpha: float = 0.0
    alpha_batch: float = 0.0
    proportional: bool = False
    """Move the bias in proportion to the error instead of by its sign."""


@dataclass(frozen=True)
class Outcome:
    """What one trained model did."""

    batch_violation: tuple[float, ...]
    """MaxVio of each layer in a training batch, mean of the last 20 steps."""
    pooled_violation: tuple[float, ...]
    """MaxVio of each layer over the last 20 steps' tokens together: no sampling noise."""
    held_out_violation: tuple[float, ...]
    """MaxVio of each layer on held-out text of all domains, the biases as they ended."""
    loss: float
    """Held-out, nats per token."""
    load_DnLE: Tensor
    """Tokens per expert in each held-out window."""


def run(way: Way, seed: int, steps: int = 80) -> Outcome:
    """Train the small model one way from one seed, and measure."""
    corpus = load_corpus()
    torch.manual_seed(seed)
    model = Transformer(small_moe())
    settings = TrainConfig(
        steps=steps, batch_size=8, seq_len=SEQ_LEN, learning_rate=5e-3, gamma=way.gamma,
        alpha=way.alpha, alpha_batch=way.alpha_batch, seed=seed,
    )  # fmt: skip
    rule = update_bias_in_proportion if way.proportional else update_bias
    records = list(train(model, corpus, settings, rule=rule))[-LAST:]
    windows_DnT = torch.stack([corpus.windows(d, SEQ_LEN, 24) for d in corpus.domains])
    load_DnLE = torch.stack([_load(model, windows_nT) for windows_nT in windows_DnT])
    each = torch.tensor([record.max_violation for record in records])
    pooled_LE = torch.stack([record.counts_LE for record in records]).sum(0)
    return Outcome(
        tuple(each.mean(0).tolist()),
        tuple(max_violation(pooled_LE).tolist()),
        tuple(max_violation(load_DnLE.sum((0, 1))).tolist()),
        evaluate(model, windows_DnT.flatten(0, 1)),
        load_DnLE,
    )


@torch.no_grad()
def _load(model: Transformer, windows_nT: Tensor) -> Tensor:
    experts = model.config.n_routed_experts
    chosen_LnK = [routing.indices_BTK.flatten(1) for routing in model(windows_nT[:, :-1]).routing]
    counts = [[torch.bincount(each, minlength=experts) for each in layer] for layer in chosen_LnK]
    return torch.stack([torch.stack(layer) for layer in counts], dim=1)


def study(
    ways: Mapping[str, Way], seeds: int = 5, workers: int | None = None, steps: int = 80
) -> dict[str, list[Outcome]]:
    """Every way from every seed 0 .. seeds - 1, on ``workers`` processes (default: all cores)."""
    return run_all(run, ways, seeds, steps, workers)


def domain_spread(load_DnLE: Tensor) -> float:
    """How much expert loads differ between domains: 0 if every domain uses all experts alike.

    The mean over layers and experts of the standard deviation, over domains, of load divided by
    the balanced load: the quantity that the report's Fig 9 shows as a heatmap.
    """
    load_DLE = load_DnLE.double().sum(1)
    relative_DLE = load_DLE / load_DLE.mean(-1, keepdim=True)
    return relative_DLE.std(0, correction=0).mean().item()


def spread_by_chance(load_DnLE: Tensor, draws: int = 200, seed: int = 0) -> Tensor:
    """The same, (draws,), after the windows were dealt to the domains at random: no domains."""
    generator = torch.Generator().manual_seed(seed)
    flat = load_DnLE.flatten(0, 1)
    dealt = [flat[torch.randperm(len(flat), generator=generator)] for _ in range(draws)]
    return torch.tensor([domain_spread(each.view_as(load_DnLE)) for each in dealt])
