"""Measure on this machine: how long a decode step takes, what a cache holds, what the ceilings are.

Why: most numbers that are quoted about attention come from a card that the reader does not have.
A decode step reads every weight and every cached number once and does little with each, so its
time follows from two ceilings, bytes and operations per second, which anybody can measure. Times
are the best of several runs: noise only ever adds.

One attention layer is timed, with a cache filled with random numbers: neither the time nor the
bytes depend on their values, and nothing has to be prefilled. Five ways to remember are compared:
MHA, GQA and MQA with the heads' keys and values, and MLA naive and absorbed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from dsv3_mini.accounting import cache_bytes, decode_flops
from dsv3_mini.attention import GroupedQueryAttention
from dsv3_mini.cache import KVCache, LatentCache
from dsv3_mini.config import ModelConfig
from dsv3_mini.generate import choose
from dsv3_mini.mla import MultiHeadLatentAttention
from dsv3_mini.model import Transformer
from dsv3_mini.rope import rope_table
from dsv3_mini.speculative import verify


@dataclass(frozen=True)
class Kind:
    """One way to remember: an attention, what its cache stores, and which MLA path decodes."""

    config: ModelConfig
    expanded: bool = False
    """MLA with a KVCache: every head's key and value is stored."""
    absorb: bool = False


def kinds(config: ModelConfig, key_heads: int) -> dict[str, Kind]:
    """The ways to remember by name, at the head count of ``config`` (an MLA one).

    ``key_heads`` is GQA's. 'MLA, expanded' stores what 'MLA, naive' makes anew at every step.
    """
    heads = {"MHA": config.num_attention_heads, "GQA": key_heads, "MQA": 1}
    named = {
        name: Kind(config.replace(attention="gqa", num_key_value_heads=count))
        for name, count in heads.items()
    }
    return named | {
        "MLA, expanded": Kind(config, expanded=True),
        "MLA, naive": Kind(config),
        "MLA, absorbed": Kind(config, absorb=True),
    }


def best_seconds(run: Callable[[], object], repeats: int = 5) -> float:
    """The shortest of ``repeats`` times of ``run()``, after one that does not count."""
    run()
    return min(_seconds(run) for _ in range(repeats))


def _seconds(run: Callable[[], object]) -> float:
    _wait()
    began = time.perf_counter()
    run()
    _wait()
    return time.perf_counter() - began


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Ceilings:
    """What this machine can do at best, as measured."""

    flops: float
    """fp32 operations per second, in a large matrix product (a multiply-add is two)."""
    bandwidth: float
    """Bytes read per second by a matrix-vector product whose matrix no cache holds."""

    @property
    def ridge(self) -> float:
        """Operations per byte at which both ceilings meet; below it, bytes decide."""
        return self.flops / self.bandwidth


def measure_ceilings(device: str = "cpu", megabytes: int = 256) -> Ceilings:
    """Both ceilings, measured in about a second."""
    side = 1024
    square = torch.ones(side, side, device=device)
    product = best_seconds(lambda: square @ square)
    matrix = torch.ones(megabytes * 2**20 // (4 * 4096), 4096, device=device)
    vector = torch.ones(4096, device=device)
    reading = best_seconds(lambda: matrix @ vector)
    return Ceilings(2 * side**3 / product, matrix.numel() * 4 / reading)


@dataclass(frozen=True)
class DecodeStep:
    """One new token through one attention layer that remembers ``context`` earlier ones."""

    context: int
    seconds: float
    nbytes: int
    """What the cache's live tensors hold for ``context`` tokens."""
    formula: int
    """The same by ``accounting``; equal, or a test fails."""
    read: int
    """Bytes that the step reads: every weight once, and the cache."""
    flops: int
    """Operations of the step, by ``accounting``."""


class DecodeLayer:
    """One attention layer of a ``Kind`` and a cache, ready to be timed at any context.

    Weights are random, or those of the layer ``like`` (same parameters): 748 MB are not held twice.
    """

    def __init__(
        self, kind: Kind, max_context: int, batch: int = 1, device: str = "cpu",
        like: DecodeLayer | None = None,
    ) -> None:  # fmt: skip
        config = kind.config.replace(num_hidden_layers=1, first_k_dense_replace=1)
        self.config, self.kind, self.batch = config, kind, batch
        grouped = config.attention == "gqa"
        made = GroupedQueryAttention if grouped else MultiHeadLatentAttention
        with torch.device(device):
            layer = made(config) if like is None else like.layer
            self.x = torch.randn(batch, 1, config.hidden_size)
        self.layer: nn.Module = layer.requires_grad_(False)
        store = KVCache if grouped or kind.expanded else LatentCache
        self.cache = store(config, 1, batch, max_context + 1, device=device)
        for tensor in self.cache.stores:
            tensor.normal_()

    def step(self, context: int) -> Tensor:
        """Decode the token after ``context`` remembered ones; the cache keeps its length."""
        self.cache.length = context
        cos, sin = rope_table(self.config, context, 1, str(self.x.device))
        return self.layer(self.x, cos, sin, self.cache, 0, self.kind.absorb)

    def measure(self, context: int, repeats: int = 5) -> DecodeStep:
        """Time and bytes at ``context``."""
        seconds = best_seconds(lambda: self.step(context), repeats)
        formula = cache_bytes(self.config, context, self.batch, 4, self.kind.expanded)
        weights = sum(p.numel() * p.element_size() for p in self.layer.parameters())
        flops = decode_flops(self.config, context + 1, self.kind.absorb, self.kind.expanded)
        nbytes = self.cache.nbytes
        return DecodeStep(context, seconds, nbytes, formula, weights + nbytes, flops)


@dataclass(frozen=True)
class SpeculationCosts:
    """What speculative decoding pays at a context, in this machine's time."""

    seconds: float
    """One token through the main model, and the choice of the next."""
    verify: float
    """Two tokens at once, and the comparison with the draft, in units of ``seconds``."""
    draft: float
    """The MTP module on two states, and the choice of a draft, in units of ``seconds``."""

    def ceiling(self, acceptance: float) -> float:
        """The best speed-up over plain decoding: (1 + p) / (verify + draft)."""
        return (1 + acceptance) / (self.verify + self.draft)


@torch.no_grad()
def speculation_costs(
    model: Transformer, text: Tensor, context: int, steps: int = 16, repeats: int = 3
) -> SpeculationCosts:
    """All three, averaged over ``steps`` positions of ``text`` (T,), the first at ``context``.

    The text is a real one because its tokens choose the experts that a step wakes. It needs
    ``context + steps + 1`` tokens. Raises ValueError.
    """
    if not 1 <= context <= text.numel() - steps - 1:
        raise ValueError(
            f"context {context} and {steps} steps need a text of {context + steps + 1} tokens or "
            f"more, and a context of 1 or more; this one has {text.numel()}"
        )
    tokens = text[None]
    cache = model.new_cache(1, text.numel(), mtp=True)
    states = model(tokens, cache).hidden
    model.draft(states[:, :-1], tokens[:, 1:], cache)

    def step(at: int) -> None:
        cache.length = at  # not truncate: it would roll the module's cache back as well
        choose(model(tokens[:, at : at + 1], cache).logits[:, -1], 0, None)

    def draft(at: int) -> Tensor:
        cache.mtp[0].length = at - 1
        q = model.draft(states[:, at - 1 : at + 1], tokens[:, at : at + 2], cache)[:, -1]
        return choose(q, 0, None)

    def both(at: int) -> None:
        cache.length = at
        logits = model(tokens[:, at : at + 2], cache).logits
        verify(logits[:, 0], logits[:, 0], tokens[:, at + 1], 0, None)
        choose(logits[:, 1], 0, None)

    sums = [0.0, 0.0, 0.0]
    for at in range(context, context + steps):
        # In turn, as speculation runs them: the same step again would find its weights at hand.
        rounds = [
            [_seconds(partial(run, at)) for run in (step, both, draft)] for _ in range(repeats + 1)
        ]
        best = [min(times) for times in zip(*rounds[1:], strict=True)]
        sums = [total + each for total, each in zip(sums, best, strict=True)]
    one, two, drafted = sums
    return SpeculationCosts(one / steps, two / one, drafted / one)
