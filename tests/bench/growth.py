"""How our times grow, beside how the operations grow: exponents p of time = a x^p.

Operations are counted by ``accounting``, over the same points, so the expectation is no guess. It
is not a prophecy either: at small sizes a fixed price per operation of torch, and reading weights,
take most of the time, so the measured exponent lies below, and the last interval says more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from dsv3_mini.accounting import decode_flops, forward_flops, training_flops_per_token
from dsv3_mini.config import ModelConfig
from tests.bench.implementations import OURS
from tests.bench.plan import MLA_RACE, MOE_SIZE, Plan, mla_size, moe_config, moe_name, scaled
from tests.bench.timing import Race, slope


@dataclass(frozen=True)
class Curve:
    """Our median times at ascending points of one axis, and the operations there."""

    title: str
    axis: str
    words: str
    """How the operations should grow, part by part."""
    x: list[int]
    seconds: list[float]
    operations: list[float]

    def slopes(self) -> tuple[float, float]:
        """Over all points: of the time, of the operations."""
        x = [float(value) for value in self.x]
        return slope(x, self.seconds), slope(x, self.operations)

    def last_slopes(self) -> tuple[float, float]:
        """The same over the last interval alone."""
        x = [float(value) for value in self.x[-2:]]
        return slope(x, self.seconds[-2:]), slope(x, self.operations[-2:])


def prefill_operations(config: ModelConfig, length: int) -> float:
    """A prompt of ``length`` tokens; a token attends to half of it on average."""
    return length * forward_flops(config, (length + 1) / 2).total


def decode_operations(config: ModelConfig, context: int) -> float:
    """One new token after ``context``, on the absorbed path."""
    attention = decode_flops(config, context + 1, absorb=True)
    rest = forward_flops(config, 0)
    return config.num_hidden_layers * attention + rest.feed_forward + rest.head


def mla_operations(config: ModelConfig, context: int) -> float:
    """One new token in one attention layer, on the absorbed path."""
    return decode_flops(config, context + 1, absorb=True)


def moe_operations(tokens: int, experts: int) -> float:
    """One MoE layer: three matrices for every chosen and shared expert, and the router."""
    config = moe_config(experts)
    used = config.num_experts_per_tok + config.n_shared_experts
    expert = 3 * config.moe_intermediate_size
    return 2 * tokens * config.hidden_size * (used * expert + config.n_routed_experts)


def by_batch(config: ModelConfig, batch: int, length: int) -> float:
    """A training step on ``batch`` sequences of ``length`` tokens; the optimizer is not counted."""
    return batch * length * training_flops_per_token(config, length)


def by_width(config: ModelConfig, hidden: int, batch: int, length: int) -> float:
    """The same of a model whose every width is in proportion to ``hidden``."""
    return by_batch(scaled(config, hidden), batch, length)


def curves(races: list[Race], plan: Plan) -> list[Curve]:
    """Every curve that has two points or more, at the most threads measured."""
    most = max((race.threads for race in races), default=1)
    found = []

    def add(
        title: str, what: str, size: str, axis: str, words: str, count: Callable[[int], float]
    ) -> None:
        line = [r for r in races if (r.what, r.size, r.threads) == (what, size, most)]
        if len(line) > 1:
            line.sort(key=lambda race: race.at)
            x = [race.at for race in line]
            times = [race.median(OURS) for race in line]
            found.append(Curve(title, axis, words, x, times, [count(at) for at in x]))

    batch, length = plan.train
    for size, config in plan.sizes.items():
        add(
            f"prefill, {size}", "prefill", size, "tokens",
            "weights have slope 1 in the prompt, attention 2",
            partial(prefill_operations, config),
        )  # fmt: skip
        add(
            f"decode, {size}", "decode", size, "tokens of context",
            "attention has slope 1 in the context, everything else 0",
            partial(decode_operations, config),
        )  # fmt: skip
        add(
            f"training step by batch, {size}", "training step", f"{size}, by batch", "sequences",
            "slope 1 in the batch; the optimizer, not counted, has 0",
            partial(by_batch, config, length=length),
        )  # fmt: skip
        add(
            f"training step by width, {size}", "training step", f"{size}, by width", "hidden size",
            "weights have slope 2 where all widths grow, the head and attention's part 1",
            partial(by_width, config, batch=batch, length=length),
        )  # fmt: skip
    add(
        "decode, one MLA layer", MLA_RACE, mla_size(plan.mla), "tokens of context",
        "attention has slope 1 in the context, projections 0",
        partial(mla_operations, plan.mla),
    )  # fmt: skip
    for tokens in plan.moe_tokens:
        what = moe_name(tokens)
        add(
            f"{what}, by experts", what, MOE_SIZE, "experts",
            "slope 0 in the experts at a fixed top-k; the router alone has 1",
            partial(moe_operations, tokens),
        )  # fmt: skip
    return found
