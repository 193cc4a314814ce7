"""What notebooks compare with V3's rule: each does what it says, and V3's own stays the default."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dsv3_mini.balance import update_bias, update_bias_in_proportion
from dsv3_mini.config import ConfigError, ModelConfig
from dsv3_mini.model import Transformer
from dsv3_mini.train import TrainConfig, new_state, train_step

PLAN = TrainConfig(steps=3, batch_size=4, seq_len=16, gamma=0.01)


def step(config: TrainConfig, **more: object) -> tuple[Transformer, torch.Tensor]:
    torch.manual_seed(0)
    model = Transformer(ModelConfig.tiny())
    tokens = torch.randint(128, (4, 17))
    record = train_step(model, new_state(model, config), config, [tokens], **more)  # type: ignore[arg-type]
    return model, record.counts_LE


def test_proportional_by_hand() -> None:
    bias, counts = torch.tensor([0.5, 0.0, -0.5, 0.0]), torch.tensor([8, 4, 0, 4])
    moved = update_bias_in_proportion(bias, counts, 0.1)
    torch.testing.assert_close(moved, torch.tensor([0.4, 0.0, -0.4, 0.0]))
    assert torch.equal(update_bias_in_proportion(bias, torch.zeros(4), 0.1), bias)
    # Each layer by its own mean, also where that is a single token.
    busy = torch.tensor([[8, 4, 0, 4], [2, 1, 0, 1]])
    moved = update_bias_in_proportion(torch.zeros(2, 4), busy, 0.1)
    torch.testing.assert_close(moved, torch.tensor([[-0.1, 0.0, 0.1, 0.0]]).expand(2, 4))


def test_the_rule_is_a_choice_and_the_sign_its_default() -> None:
    for rule in (update_bias, update_bias_in_proportion):
        model, counts_LE = step(PLAN, rule=rule)
        for gate, load_E in zip(model.gates, counts_LE, strict=True):
            expected = rule(torch.zeros(8), load_E, 0.01)
            assert torch.equal(gate.e_score_correction_bias, expected)
    default, counts_LE = step(PLAN)
    expected = update_bias(torch.zeros(8), counts_LE[0], 0.01)
    assert torch.equal(default.gates[0].e_score_correction_bias, expected)


def test_the_batch_wise_loss_is_off_unless_asked_for() -> None:
    assert TrainConfig().alpha_batch == 0
    without, _ = step(PLAN)
    zero, _ = step(dataclasses.replace(PLAN, alpha_batch=0.0))
    some, _ = step(dataclasses.replace(PLAN, alpha_batch=1.0))
    weights = [model.gates[0].weight for model in (without, zero, some)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_models_batch_loss_has_the_gradient_of_its_definition() -> None:
    """By a loop over experts, for the whole batch as one sequence."""
    model = Transformer(ModelConfig.tiny())
    out = model(torch.randint(128, (3, 9)))
    total = torch.zeros(())
    for routing in out.routing:
        s_NE = routing.scores_BTE.flatten(0, 1)
        best = s_NE.topk(3, dim=-1).indices
        for i in range(8):
            f = 8 / (3 * len(s_NE)) * (best == i).sum()
            total = total + f * (s_NE[:, i] / s_NE.sum(-1)).mean()
    torch.testing.assert_close(out.batch_balance_loss, total)
    weights = [gate.weight for gate in model.gates if gate.weight.requires_grad][:1]
    (slow,) = torch.autograd.grad(total, weights, retain_graph=True)
    (fast,) = torch.autograd.grad(out.batch_balance_loss, weights)
    torch.testing.assert_close(fast, slow, atol=1e-6, rtol=1e-4)


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(ConfigError, match="alpha_batch"):
        TrainConfig(alpha_batch=-1.0)
