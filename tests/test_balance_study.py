"""The study's measurements: repeatable, independent of the workers, and right on made-up loads."""

from __future__ import annotations

import torch

from dsv3_mini.course.balance_study import Way, domain_spread, run, spread_by_chance, study
from dsv3_mini.course.experts import small_moe, without_shared_expert
from dsv3_mini.model import Transformer


def test_a_run_repeats_and_workers_do_not_change_it() -> None:
    ways = {"bias": Way(gamma=0.01)}
    found = study(ways, seeds=1, workers=1, steps=3)["bias"][0]
    again = run(ways["bias"], 0, steps=3)
    assert found.loss == again.loss
    assert found.pooled_violation == again.pooled_violation
    assert torch.equal(found.load_DnLE, again.load_DnLE)
    # 4 domains, 24 windows, 2 layers: 64 tokens choose 4 of 16 experts each.
    assert found.load_DnLE.shape == (4, 24, 2, 16)
    assert bool((found.load_DnLE.sum(-1) == 64 * 4).all())


def test_spread_between_domains() -> None:
    same = torch.ones(4, 6, 1, 2)
    assert domain_spread(same) == 0
    apart = torch.zeros(2, 6, 1, 2)  # each domain has an expert of its own
    apart[0, :, 0, 0] = apart[1, :, 0, 1] = 8
    assert domain_spread(apart) == 1.0
    by_chance = spread_by_chance(apart)
    assert by_chance.shape == (200,)
    assert by_chance.mean() < 0.5


def test_switching_the_shared_expert_off() -> None:
    model = Transformer(small_moe())
    tokens = torch.randint(2048, (1, 10))
    other = without_shared_expert(model)
    assert other.config.num_experts_per_tok == model.config.num_experts_per_tok + 1
    assert model.model.layers[0].mlp.shared_experts is not None
    assert other.model.layers[0].mlp.shared_experts is None
    for name, value in other.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    chosen = [
        out.routing[0].indices_BTK[0].sort(-1).values for out in (model(tokens), other(tokens))
    ]
    assert [each.shape[-1] for each in chosen] == [4, 5]
