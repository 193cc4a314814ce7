"""balance: the bias step by hand, the losses and their gradients against equations 17 to 20."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv3_mini import ModelConfig
from dsv3_mini.balance import (
    batch_balance_loss,
    max_violation,
    sequence_balance_loss,
    update_bias,
)
from tests.reference import oracles

# -------------------------------------------------------------------------------------- bias step


def test_bias_step_by_hand() -> None:
    """Mean load 4: overloaded go down, underloaded up, the one at the mean stays; one step each."""
    bias = torch.tensor([0.5, -0.5, 0.25, 0.0])
    counts = torch.tensor([9, 3, 4, 0])
    moved = update_bias(bias, counts, 0.125)
    assert moved.tolist() == [0.375, -0.375, 0.25, 0.125]
    assert bias.tolist() == [0.5, -0.5, 0.25, 0.0]  # the argument is left alone


@pytest.mark.parametrize("excess", [1, 10, 1_000_000])
def test_the_step_does_not_grow_with_the_error(excess: int) -> None:
    """Neither proportional, nor a tanh, nor a dead zone: one token too many is a whole step."""
    counts = torch.tensor([10_000_000 + excess, 10_000_000 - excess])
    moved = update_bias(torch.zeros(2, dtype=torch.float64), counts, 0.001)
    assert moved.tolist() == [-0.001, 0.001]


def test_equality_is_exact() -> None:
    """In fp32, 33,554,433 would round to the mean 33,554,432 and wrongly stand still."""
    counts = torch.tensor([33_554_433, 33_554_431, 33_554_432])
    assert update_bias(torch.zeros(3), counts, 1.0).tolist() == [-1.0, 1.0, 0.0]
    assert update_bias(torch.zeros(3), torch.tensor([7, 7, 7]), 1.0).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6)])
def test_every_layer_has_its_own_mean(shape: tuple[int, ...]) -> None:
    counts = torch.randint(0, 20, shape)
    counts.view(-1, 6)[0] += 1000  # one busy layer must not make the others look idle
    bias = torch.randn(shape)
    moved = update_bias(bias, counts, 0.01)
    assert moved.shape == shape
    assert moved.dtype == torch.float32
    rows = zip(*(x.view(-1, 6).tolist() for x in (moved, bias, counts)), strict=True)
    for new, old, load in rows:
        for e in range(6):
            above = 6 * load[e] - sum(load)
            step = -0.01 if above > 0 else 0.01 if above < 0 else 0.0
            assert new[e] == pytest.approx(old[e] + step, abs=1e-6)


def test_no_step_at_the_end_of_training() -> None:
    bias = torch.randn(8)
    assert torch.equal(update_bias(bias, torch.randint(0, 9, (8,)), 0.0), bias)


def test_the_rule_balances_a_lopsided_router() -> None:
    """The sign is right: tokens that all prefer expert 0 end up spread evenly."""
    scores = torch.rand(400, 8, generator=torch.Generator().manual_seed(0))
    scores[:, 0] += 0.5
    bias = torch.zeros(8)
    violations = []
    for _ in range(300):
        chosen = (scores + bias).topk(2, dim=-1).indices
        counts = torch.bincount(chosen.flatten(), minlength=8)
        violations.append(float(max_violation(counts)))
        bias = update_bias(bias, counts, 0.005)
    assert violations[0] > 1.5
    assert max(violations[-20:]) < 0.2
    assert bias[0] == bias.min()


# ----------------------------------------------------------------------------------------- MaxVio


def test_max_violation() -> None:
    assert float(max_violation(torch.tensor([5, 5, 5, 5]))) == 0
    assert float(max_violation(torch.tensor([20, 0, 0, 0]))) == 3  # one of four has it all
    assert float(max_violation(torch.tensor([8, 4, 4, 0]))) == 1  # twice its share
    assert float(max_violation(torch.tensor([5, 5, 5, 1]))) == 0.25  # the idle one is not counted
    layers = torch.tensor([[[8, 4, 4, 0], [1, 1, 1, 1]], [[0, 0, 0, 9], [2, 2, 2, 4]]])
    np.testing.assert_allclose(max_violation(layers), [[1, 0], [3, 0.6]], rtol=1e-12)


# ----------------------------------------------------------------------------------------- losses


def loop_loss(scores: Tensor, indices: Tensor, alpha: float) -> Tensor:
    """Equations 17 to 20 with explicit sums, differentiable, one sequence at a time."""
    batch, tokens, experts = scores.shape
    chosen = indices.shape[-1]
    per_sequence = []
    for b in range(batch):
        total = scores.new_zeros(())
        for i in range(experts):
            times = sum(i in indices[b, t].tolist() for t in range(tokens))
            f_i = experts / (chosen * tokens) * times  # 18
            p_i = scores.new_zeros(())
            for t in range(tokens):
                everyone = scores.new_zeros(())
                for j in range(experts):
                    everyone = everyone + scores[b, t, j]
                p_i = p_i + scores[b, t, i] / everyone / tokens  # 19, 20
            total = total + f_i * p_i  # 17
        per_sequence.append(alpha * total)
    return sum(per_sequence, scores.new_zeros(())) / batch


def random_routing(seed: int) -> tuple[Tensor, Tensor]:
    draw = np.random.default_rng(seed)
    batch, tokens = int(draw.integers(1, 4)), int(draw.integers(1, 8))
    experts = int(draw.integers(3, 9))
    scores = torch.from_numpy(draw.uniform(0.01, 0.99, (batch, tokens, experts)))
    biased = scores + torch.from_numpy(draw.normal(0, 0.5, experts))
    return scores, biased.topk(int(draw.integers(1, experts)), dim=-1).indices


@pytest.mark.parametrize("seed", range(10))
def test_sequence_loss_and_gradient(seed: int) -> None:
    """Report eqs 17-20 with explicit sums, and their gradient by differences."""
    scores, indices = random_routing(seed)
    scores.requires_grad_()
    ours, slow = sequence_balance_loss(scores, indices, 0.3), loop_loss(scores, indices, 0.3)
    assert ours.dim() == 0
    assert ours.requires_grad, "detached: no router would learn from it"
    assert ours.item() == pytest.approx(slow.item(), rel=1e-12)
    gradients = [torch.autograd.grad(loss, scores)[0] for loss in (ours, slow)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-13)
    # Central differences of the loop, the choice held still: the gradient goes through P alone.
    flat, step = scores.detach().flatten(), 1e-6
    for at in range(0, len(flat), 7):
        up, down = flat.clone(), flat.clone()
        up[at] += step
        down[at] -= step
        rise = loop_loss(up.view_as(scores), indices, 0.3)
        rise -= loop_loss(down.view_as(scores), indices, 0.3)
        slope = float(gradients[0].flatten()[at])
        assert float(rise) / (2 * step) == pytest.approx(slope, abs=1e-8)


def test_the_loss_has_a_gradient_that_evens_out() -> None:
    """Not detached: a small step against it lowers the loss, and pushes the busy expert down."""
    scores = torch.full((1, 4, 4), 0.4, dtype=torch.float64)
    scores[..., 0] = 0.8
    scores.requires_grad_()
    indices = scores.topk(1, dim=-1).indices
    loss = sequence_balance_loss(scores, indices)
    (slope,) = torch.autograd.grad(loss, scores)
    assert (slope[..., 0] > 0).all()
    assert (slope[..., 1:] < 0).all()
    assert float(sequence_balance_loss(scores.detach() - 0.1 * slope, indices)) < loss.item()


@pytest.mark.parametrize("alpha", [1.0, 0.0001])
def test_perfect_balance_gives_exactly_alpha(alpha: float) -> None:
    """Eight tokens, two of eight experts each, every expert twice, equal affinities."""
    scores = torch.full((3, 8, 8), 0.5, dtype=torch.float64)
    indices = torch.tensor([[[t, (t + 1) % 8] for t in range(8)]] * 3)
    assert float(sequence_balance_loss(scores, indices, alpha)) == alpha
    assert float(batch_balance_loss(scores, indices, alpha)) == alpha


def test_all_on_one_expert_by_hand() -> None:
    """f = E/K = 4 for expert 0, which has the share 0.9 / 1.2 of all affinity: 4 x 0.75."""
    scores = torch.tensor([0.9, 0.1, 0.1, 0.1]).double().expand(2, 5, 4)
    indices = torch.zeros(2, 5, 1, dtype=torch.int64)
    assert float(sequence_balance_loss(scores, indices)) == pytest.approx(3.0)


def test_where_everyone_is_chosen_nothing_is_uneven() -> None:
    """f = 1 for every expert, and the P_i sum to 1: alpha, whatever the affinities are."""
    scores = torch.rand(2, 5, 4, dtype=torch.float64) + 0.1
    indices = torch.arange(4).expand(2, 5, 4)
    assert float(sequence_balance_loss(scores, indices, 0.5)) == pytest.approx(0.5)


def test_affinities_are_normalised_over_all_experts() -> None:
    """Report eq 19: scaling a token's affinities changes nothing; so P is s', not s or the gate."""
    scores, indices = random_routing(3)
    factors = torch.rand(*scores.shape[:2], 1, dtype=torch.float64) + 0.5
    one, two = (sequence_balance_loss(s, indices) for s in (scores, scores * factors))
    assert float(one) == pytest.approx(float(two), rel=1e-12)


def test_the_product_comes_before_the_mean_over_the_batch() -> None:
    """Two sequences, each lopsided, that balance each other: sequence-wise sees it, batch not."""
    likes = torch.tensor([[0.8, 0.2], [0.2, 0.8]], dtype=torch.float64)
    scores = likes[:, None].expand(2, 6, 2)
    indices = torch.tensor([0, 1])[:, None, None].expand(2, 6, 1)
    assert float(sequence_balance_loss(scores, indices)) == pytest.approx(2 * 0.8)
    assert float(batch_balance_loss(scores, indices)) == pytest.approx(1.0)


@pytest.mark.parametrize("seed", range(5))
def test_batch_loss_is_one_long_sequence(seed: int) -> None:
    scores, indices = random_routing(seed)
    long = (scores.reshape(1, -1, scores.shape[-1]), indices.reshape(1, -1, indices.shape[-1]))
    got = batch_balance_loss(scores, indices, 0.2)
    assert float(got) == pytest.approx(float(loop_loss(*long, 0.2)), rel=1e-12)


# ------------------------------------------------------------------------------- in a whole model


def test_the_model_counts_the_best_raw_scores() -> None:
    """Report eqs 17-20 without the bias, summed over MoE layers, MTP's too, before alpha."""
    model = oracles.shaken(ModelConfig.tiny().replace(num_hidden_layers=3)).double()
    for gate in model.gates:
        gate.e_score_correction_bias[:4] = 0.5
    result = model(torch.randint(0, 128, (2, 9)), mtp=True)
    assert len(result.routing) == 3
    raw, routed = 0.0, 0.0
    for routing in result.routing:
        order = np.argsort(-routing.scores_BTE.numpy(), axis=-1)[..., :3].copy()
        raw += float(loop_loss(routing.scores_BTE, torch.from_numpy(order), 1.0))
        routed += float(loop_loss(routing.scores_BTE, routing.indices_BTK, 1.0))
    assert float(result.balance_loss) == pytest.approx(raw, rel=1e-12)
    assert abs(raw - routed) > 0.01


def test_the_models_loss_teaches_its_routers() -> None:
    model = oracles.shaken(ModelConfig.tiny()).requires_grad_()
    model(torch.randint(0, 128, (2, 9)), mtp=True).balance_loss.backward()
    assert [bool(gate.weight.grad.abs().max() > 0) for gate in model.gates] == [True, True]
    assert all(gate.e_score_correction_bias.grad is None for gate in model.gates)


def test_a_dense_model_has_none() -> None:
    model = oracles.shaken(ModelConfig.tiny().replace(first_k_dense_replace=2))
    assert float(model(torch.randint(0, 128, (1, 4))).balance_loss) == 0
