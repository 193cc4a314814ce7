"""A few states of each explorer, drawn in advance, for pages that no kernel stands behind.

Why: a reader without Python should still be able to move something and see what follows. One
control of an explorer takes a handful of values, the others stay where the notebook has them, and
picture and numbers come from the same plain functions. So a page can show them with nothing more
than a slider over images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from dsv3_mini.config import ModelConfig
from dsv3_mini.course.experts import small_moe
from dsv3_mini.course.trained import load_trained
from dsv3_mini.data import load_corpus, load_tokenizer
from dsv3_mini.fp8 import E4M3
from dsv3_mini.model import Transformer
from dsv3_mini.train import TrainConfig, new_state, train
from dsv3_mini.viz import explorer as parameters
from dsv3_mini.viz import fp8_explorer as fp8
from dsv3_mini.viz import load_picture as load
from dsv3_mini.viz import mla_explorer as mla
from dsv3_mini.viz import rope_explorer as rope
from dsv3_mini.viz import routing_explorer as routing
from dsv3_mini.viz import yarn_explorer as yarn
from dsv3_mini.viz.style import png

BALANCE_STEPS, SWITCH = 240, 120


@dataclass(frozen=True)
class State:
    """One position of the slider."""

    value: str
    """What the slider says there."""
    picture: bytes
    """PNG."""
    numbers: dict[str, str]
    """Texts by label; empty where the picture says it all."""


@dataclass(frozen=True)
class States:
    """One explorer with one control left."""

    control: str
    """The control's label, with its unit."""
    note: str
    """What the pictures were made with, a sentence."""
    alt: str
    """What every picture shows."""
    start: int
    """The state to begin with."""
    states: list[State]


def _drawn(
    draw: Callable[..., Any], numbers: Callable[..., dict[str, str]], name: str,
    values: Mapping[str, Any],
) -> list[State]:  # fmt: skip
    return [
        State(text, png(draw(**{name: value})), numbers(**{name: value}))
        for text, value in values.items()
    ]


def mla_states() -> States:
    """The cache of V3's attention, over the context."""
    contexts = {f"{2**power}K": 1024 * 2**power for power in range(8)}
    states = _drawn(mla.cache_figure, mla.cache_numbers, "context", contexts)
    note = "V3's sizes, one sequence, BF16, grouped-query attention with 8 key heads."
    return States("context (tokens)", note, mla.ALT, len(states) - 1, states)


def rope_states() -> States:
    """One pair turned, over the key's position."""
    keys = [0, 2, 5, 8, 12, 20, 32, 50, 100, 200]
    states = _drawn(
        rope.rope_figure, rope.rope_numbers, "key", {str(position): position for position in keys}
    )
    note = "The query stays at position 12, the pair shown is pair 4, theta is 10,000."
    return States("position n of the key", note, rope.ALT, keys.index(5), states)


def yarn_states() -> States:
    """V3's rotary frequencies, over the factor by which the context is stretched."""
    factors = [1, 2, 4, 8, 16, 32, 40, 64]
    states = _drawn(
        yarn.yarn_figure, yarn.yarn_numbers, "factor", {str(factor): factor for factor in factors}
    )
    note = "Trained on 4,096 tokens, beta_fast 32, beta_slow 1, as V3."
    return States("factor s", note, yarn.ALT, factors.index(40), states)


def config_states() -> States:
    """V3's parameters, over the number of routed experts."""
    counts = [16, 32, 64, 128, 256, 512]
    configs = {str(n): ModelConfig.v3().replace(n_routed_experts=n) for n in counts}

    def numbers(config: ModelConfig) -> dict[str, str]:
        found = parameters.summary(config)
        return {name: f"{value:,} ({parameters.human(value)})" for name, value in found.items()}

    states = _drawn(parameters.breakdown, numbers, "config", configs)
    note = "Every other field is V3's."
    alt = (
        "Two bars for each part of the model, on a log scale: all its parameters, and those that "
        "one token uses. They differ for the routed experts only."
    )
    return States("n_routed_experts", note, alt, counts.index(256), states)


def fp8_states() -> States:
    """What E4M3 makes of a number, from too small to too large."""
    numbers = [0.0005, 0.002, 0.01, 0.1, 0.3, 1.0, 3.3, 5.5, 17.0, 100.0, 300.0, 500.0]
    states = []
    for number in numbers:
        what = {"code": fp8.encode(number).code, "dtype": E4M3, "number": number}
        states.append(
            State(f"{number:g}", png(fp8.code_figure(**what)), fp8.code_numbers(**what))  # type: ignore[arg-type]
        )
    note = "E4M3 with a scale of 1."
    return States("number", note, fp8.ALT, numbers.index(5.5), states)


def routing_states() -> States:
    """One sentence through a trained router, over its tokens."""
    routed = routing.token_routing(load_trained(), load_tokenizer(), routing.SENTENCE, layer=2)
    states = _drawn(
        lambda token: routing.routing_figure(routed, token),
        lambda token: routing.routing_numbers(routed, token),
        "token",
        {f"{number}: {text}": number for number, text in enumerate(routed.tokens)},
    )
    note = "Layer 2 of the trained model that comes with the package, not the one trained above."
    return States("token", note, routing.ALT, 0, states)


def balance_states() -> States:
    """A run in which nothing balances at first, over its steps."""
    settings = TrainConfig(
        steps=BALANCE_STEPS, batch_size=8, seq_len=64, learning_rate=5e-3, final_ratio=1.0,
        gamma=0.0, alpha=0.0,
    )  # fmt: skip
    torch.manual_seed(1)
    model, corpus = Transformer(small_moe()), load_corpus()
    state, records = new_state(model, settings), []
    for record in train(model, corpus, settings, state):
        records.append(record)
        if record.step == SWITCH:
            break
    records += train(model, corpus, replace(settings, gamma=0.01, alpha=0.0001), state)
    changes = [(SWITCH + 1, "bias")]
    states = [
        State(
            f"{step}, {'nothing balances' if step <= SWITCH else 'bias rule'}",
            png(load.load_figure(records[:step], changes if step > SWITCH else ())),
            {"in words": load.summary(records[step - 1])},
        )
        for step in (1, *range(30, BALANCE_STEPS + 1, 30))
    ]
    note = f"Recorded: nothing balances for {SWITCH} steps, then the bias rule with gamma = 0.01."
    alt = (
        "For each MoE layer a bar an expert, its load over the mean load; below them MaxVio and "
        "loss over the steps so far."
    )
    return States("step", note, alt, SWITCH // 30, states)


# By the name of the explorer's class, which a notebook's output begins with.
MAKERS: dict[str, Callable[[], States]] = {
    "ConfigExplorer": config_states,
    "MLAExplorer": mla_states,
    "RopeExplorer": rope_states,
    "YarnExplorer": yarn_states,
    "RoutingExplorer": routing_states,
    "LiveBalance": balance_states,
    "Fp8Explorer": fp8_states,
}
