"""Times are not tested, only what is timed: the right attention, on the right number of tokens."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dsv3_mini.config import ModelConfig
from dsv3_mini.measure import (
    DecodeLayer,
    SpeculationCosts,
    best_seconds,
    kinds,
    measure_ceilings,
    speculation_costs,
)
from dsv3_mini.model import Transformer
from dsv3_mini.rope import rope_table

MINI = ModelConfig.mini()
# Numbers per token that Table 1 of DeepSeek-V2 gives for 4 heads of 32, latent 32, rotary 16.
NUMBERS = {
    "MHA": 2 * 4 * 32,
    "GQA": 2 * 2 * 32,
    "MQA": 2 * 32,
    "MLA, expanded": 4 * (48 + 32),
    "MLA, naive": 48,
    "MLA, absorbed": 48,
}


def test_every_kind_is_measured() -> None:
    assert kinds(MINI, 2).keys() == NUMBERS.keys()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", NUMBERS)
def test_live_bytes_equal_the_formula(name: str, batch: int) -> None:
    layer = DecodeLayer(kinds(MINI, 2)[name], 40, batch)
    for context in (1, 17, 40):
        step = layer.measure(context, repeats=1)
        assert step.nbytes == step.formula == NUMBERS[name] * 4 * context * batch
        assert step.seconds > 0
        assert layer.cache.length == context


def test_naive_and_absorbed_decode_the_same_token() -> None:
    naive = DecodeLayer(kinds(MINI, 2)["MLA, naive"], 9)
    absorbed = DecodeLayer(kinds(MINI, 2)["MLA, absorbed"], 9, like=naive)
    absorbed.x = naive.x
    absorbed.cache.stores = [store.clone() for store in naive.cache.stores]
    torch.testing.assert_close(naive.step(9), absorbed.step(9), atol=1e-5, rtol=1e-5)


def test_a_step_sees_all_of_its_context_and_nothing_behind_it() -> None:
    layer = DecodeLayer(kinds(MINI, 2)["GQA"], 9)
    before = layer.step(6).clone()
    for store in layer.cache.stores:
        store[..., 7:, :] = float("nan")
    assert torch.equal(layer.step(6), before)
    layer.cache.stores[1][..., 0, :] += 1
    assert not torch.equal(layer.step(6), before)


@pytest.mark.parametrize("name", NUMBERS)
def test_operations_and_bytes_read(name: str) -> None:
    """Operations as torch counts them, one call at a time, when nothing is fused."""
    layer = DecodeLayer(kinds(MINI, 2)[name], 40)
    layer.cache.length = 31
    tables = rope_table(layer.config, 31, 1, "cpu")
    with FlopCounterMode(display=False) as counter:
        layer.layer(layer.x, *tables, layer.cache, 0, layer.kind.absorb, fused=False)
    step = layer.measure(31, repeats=1)
    assert step.flops == counter.get_total_flops()
    weights = sum(parameter.numel() for parameter in layer.layer.parameters())
    assert step.read == 4 * (weights + 31 * NUMBERS[name])


def test_ceilings_and_best_time() -> None:
    ceilings = measure_ceilings(megabytes=8)
    assert ceilings.ridge == ceilings.flops / ceilings.bandwidth > 0
    calls: list[int] = []
    assert best_seconds(lambda: calls.append(1), repeats=3) >= 0
    assert len(calls) == 4


def test_speculation_costs() -> None:
    assert SpeculationCosts(0.001, 1.2, 0.2).ceiling(0.75) == pytest.approx(1.25)
    model, text = Transformer(ModelConfig.tiny()), torch.arange(12)
    costs = speculation_costs(model, text, 9, steps=2, repeats=1)
    assert min(costs.seconds, costs.verify, costs.draft) > 0
    for context, steps in ((0, 2), (10, 2)):
        with pytest.raises(ValueError, match="this one has 12"):
            speculation_costs(model, text, context, steps)
