"""moe: the router against a per-token loop, and every dispatch against every other."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_mini import ModelConfig
from dsv3_mini.moe import Experts, Gate, MoE, Routing
from tests.allocations import held
from tests.reference import oracles

SEEDS = pytest.mark.parametrize("seed", range(8))


def some_gate(config: ModelConfig, seed: int) -> Gate:
    gate = Gate(config).requires_grad_(False)
    oracles.shake(gate, seed)
    gate.weight *= 3
    return gate


def some_moe(config: ModelConfig, seed: int = 0) -> MoE:
    moe = MoE(config)
    oracles.shake(moe, seed)
    return moe


def hand_made(scores: list[float], bias: list[float], **changes: object) -> tuple[Gate, Routing]:
    """A gate that gives one token exactly these affinities, and what it decided."""
    config = ModelConfig.tiny().replace(n_routed_experts=len(scores), hidden_size=1, **changes)
    gate = Gate(config).requires_grad_(False).double()
    gate.weight.copy_(oracles.logit(torch.tensor(scores, dtype=torch.float64))[:, None])
    gate.e_score_correction_bias.copy_(torch.tensor(bias))
    return gate, gate(torch.ones(1, 1, 1, dtype=torch.float64))


def chosen(routing: Routing) -> list[int]:
    return sorted(routing.indices_BTK[0, 0].tolist())


def weight_of(routing: Routing, b: int = 0, t: int = 0) -> dict[int, float]:
    indices, weights = routing.indices_BTK[b, t].tolist(), routing.weights_BTK[b, t].tolist()
    return dict(zip(indices, weights, strict=True))


# ----------------------------------------------------------------------------------------- router


@SEEDS
def test_router_against_a_loop(seed: int) -> None:
    """Report eqs 13-16: sigmoid, biased choice, top-two group sums, raw gates, normalised."""
    config = oracles.small_config(seed)
    gate = some_gate(config, seed)
    x = torch.randn(2, 40, config.hidden_size)
    routing = gate(x)
    weight = oracles.numbers(gate.weight)
    bias = oracles.numbers(gate.e_score_correction_bias)
    for b in range(2):
        for t in range(40):
            scores = oracles.sigmoid(weight @ oracles.numbers(x[b, t]))
            np.testing.assert_allclose(routing.scores_BTE[b, t], scores, atol=1e-6)
            expected = oracles.gates(scores, oracles.route(scores, bias, config), config)
            assert weight_of(routing, b, t) == pytest.approx(expected, rel=1e-5)


def test_the_bias_matters_in_the_test_above() -> None:
    """Without it other experts are chosen, and all of it is negative: else little could show."""
    moved = []
    for seed in range(8):
        config = oracles.small_config(seed)
        gate = some_gate(config, seed)
        x = torch.randn(2, 40, config.hidden_size)
        with_bias = gate(x).indices_BTK.sort().values
        assert (gate.e_score_correction_bias < -0.3).all()
        gate.e_score_correction_bias.zero_()
        changed = (gate(x).indices_BTK.sort().values != with_bias).any(dim=-1)
        moved.append(float(changed.float().mean()))
    # Of two experts with nearly the same bias, as seed 2 has, none can be moved.
    assert sum(share > 0.1 for share in moved) >= 7


def test_the_bias_chooses_and_does_not_count() -> None:
    """Report eq 16: 0.4 beats 0.9 with the help of its bias, and still counts as 0.4."""
    scores, bias = [0.9, 0.4, 0.3, 0.8], [-0.6, 0.2, 0.0, 0.0]
    _, routing = hand_made(scores, bias, n_group=1, topk_group=1, num_experts_per_tok=2)
    assert chosen(routing) == [1, 3]
    expected = {1: 2.5 * 0.4 / 1.2, 3: 2.5 * 0.8 / 1.2}
    assert weight_of(routing) == pytest.approx(expected, rel=1e-6)


def test_groups_are_ranked_by_their_top_two() -> None:
    """Sum of two: (0.6, 0.6). By the maximum 0.9 would win, by the whole sum 4 x 0.45."""
    scores = [0.9, 0.1, 0.05, 0.05, 0.6, 0.6, 0.05, 0.05, 0.45, 0.45, 0.45, 0.45]
    _, routing = hand_made(scores, [0] * 12, n_group=3, topk_group=1, num_experts_per_tok=2)
    assert chosen(routing) == [4, 5]


def test_groups_are_ranked_by_biased_scores() -> None:
    scores, bias = [0.7, 0.7, 0.5, 0.5], [-0.5, -0.5, 0.0, 0.0]
    _, routing = hand_made(scores, bias, n_group=2, topk_group=1, num_experts_per_tok=2)
    assert chosen(routing) == [2, 3]


def test_groups_are_contiguous() -> None:
    """Experts 0-3 are group 0; a strided view would put 0, 2, 4, 6 together."""
    scores = [0.9, 0.8, 0.1, 0.1, 0.7, 0.1, 0.7, 0.1]
    _, routing = hand_made(scores, [0] * 8, n_group=2, topk_group=1, num_experts_per_tok=3)
    assert set(chosen(routing)) < {0, 1, 2, 3}


def test_a_masked_expert_never_wins() -> None:
    """All biased scores are negative: masked by 0 instead of -inf, the dropped groups would win."""
    scores = [0.9, 0.8, 0.3, 0.2, 0.7, 0.6, 0.2, 0.1]
    _, routing = hand_made(scores, [-2.0] * 8, n_group=4, topk_group=2, num_experts_per_tok=3)
    assert chosen(routing) == [0, 1, 4]
    # A large negative bias, as an idle checkpoint may hold, is no different.
    _, routing = hand_made(scores, [-1e4] * 8, n_group=4, topk_group=2, num_experts_per_tok=3)
    assert set(chosen(routing)) < {0, 1, 4, 5}


def test_no_group_limit_is_plain_top_k() -> None:
    """Report eq 14: no bias, no limit, the K largest."""
    scores = [0.9, 0.1, 0.8, 0.1, 0.7, 0.1, 0.6, 0.1]
    _, routing = hand_made(scores, [0] * 8, n_group=4, topk_group=4, num_experts_per_tok=3)
    assert chosen(routing) == [0, 2, 4]


def test_weights_sum_to_the_routed_factor() -> None:
    """Report eq 13 by hand, and the factor that no equation has."""
    scores = [0.9, 0.6, 0.5, 0.2]
    same = {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 3}
    _, routing = hand_made(scores, [0] * 4, **same)
    assert float(routing.weights_BTK.sum()) == pytest.approx(2.5)
    _, routing = hand_made(scores, [0] * 4, **same, norm_topk_prob=False)
    assert weight_of(routing) == pytest.approx({0: 2.25, 1: 1.5, 2: 1.25})
    _, routing = hand_made(scores, [0] * 4, **same, routed_scaling_factor=1.0)
    assert weight_of(routing) == pytest.approx({0: 0.45, 1: 0.3, 2: 0.25})


def test_vanishing_affinities_do_not_divide_by_zero() -> None:
    gate = Gate(ModelConfig.tiny()).requires_grad_(False)
    gate.weight.fill_(-1000.0)
    routing = gate(torch.ones(1, 1, 32))
    assert not routing.scores_BTE.any()
    assert torch.isfinite(routing.weights_BTK).all()


def test_affinities_are_independent_sigmoids() -> None:
    """Report eq 15: raising one affinity leaves all others as they were (no softmax would)."""
    config = ModelConfig.tiny()
    gate = some_gate(config, 0)
    x = torch.randn(1, 5, 32)
    before = gate(x).scores_BTE
    gate.weight[3] += 1
    after = gate(x).scores_BTE
    others = [e for e in range(8) if e != 3]
    assert torch.equal(before[..., others], after[..., others])
    assert not torch.equal(before[..., 3], after[..., 3])


@SEEDS
def test_a_token_is_routed_alone(seed: int) -> None:
    """Company does not matter: no capacity, no expert choice, nothing of other tokens."""
    config = oracles.small_config(seed)
    gate = some_gate(config, seed)
    x = torch.randn(2, 30, config.hidden_size)
    together = gate(x)
    for b, t in ((0, 0), (0, 17), (1, 29)):
        alone = gate(x[b : b + 1, t : t + 1])
        assert torch.equal(alone.indices_BTK[0, 0], together.indices_BTK[b, t])


def test_the_router_runs_in_fp32_under_bf16() -> None:
    config = ModelConfig.tiny()
    gate = some_gate(config, 0).bfloat16()
    x = torch.randn(1, 50, 32).bfloat16()
    routing = gate(x)
    assert routing.scores_BTE.dtype == routing.weights_BTK.dtype == torch.float32
    exact = oracles.sigmoid(oracles.numbers(x) @ oracles.numbers(gate.weight).T)
    np.testing.assert_allclose(routing.scores_BTE, exact, atol=1e-6)  # bf16 would be off by 1e-3


# ------------------------------------------------------------------------------------------- bias


def test_the_bias_is_a_buffer() -> None:
    gate = MoE(ModelConfig.tiny()).gate
    assert "e_score_correction_bias" not in dict(gate.named_parameters())
    assert "e_score_correction_bias" in gate.state_dict()
    assert not gate.e_score_correction_bias.requires_grad
    assert gate.e_score_correction_bias.dtype == torch.float32
    assert not gate.e_score_correction_bias.any()
    with torch.device("meta"):  # the official code has one at width 7168 only; here it is always
        assert Gate(ModelConfig.v3()).e_score_correction_bias.shape == (256,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_bias_stays_fp32(dtype: torch.dtype) -> None:
    """1.001 is not a bf16 number: a cast there and back would forget a hundred steps."""
    moe = MoE(ModelConfig.tiny())
    oracles.shake(moe)
    moe.gate.e_score_correction_bias.fill_(1.001)
    before = moe.gate.e_score_correction_bias.clone()
    for moved in (moe.to(dtype), moe.to("cpu", dtype), moe.to(torch.float32)):
        assert moved.gate.e_score_correction_bias.dtype == torch.float32
        assert torch.equal(moved.gate.e_score_correction_bias, before)
    assert moe.to(dtype).gate.weight.dtype == dtype
    moe.gate.e_score_correction_bias += 0.001  # still the registered buffer, not a stray copy
    assert torch.equal(moe.state_dict()["gate.e_score_correction_bias"], before + 0.001)


def test_the_bias_survives_the_meta_device() -> None:
    with torch.device("meta"):
        gate = Gate(ModelConfig.tiny())
    gate = gate.bfloat16().to_empty(device="cpu")
    assert gate.e_score_correction_bias.dtype == torch.float32
    assert gate.e_score_correction_bias.device.type == "cpu"


def test_no_gradient_reaches_the_bias_and_no_forward_moves_it() -> None:
    moe = some_moe(ModelConfig.tiny()).train()
    before = moe.gate.e_score_correction_bias.clone()
    x = torch.randn(2, 30, 32, requires_grad=True)
    out, routing = moe(x)
    (out.square().sum() + routing.scores_BTE.sum()).backward()
    assert moe.gate.e_score_correction_bias.grad is None
    assert moe.gate.weight.grad is not None
    assert moe.gate.weight.grad.abs().max() > 0
    moe.eval()(x)
    assert torch.equal(moe.gate.e_score_correction_bias, before)


# --------------------------------------------------------------------------------------- dispatch


def loop(moe: MoE, x: Tensor) -> Tensor:
    """Token by token, differentiable, from the router's decision: equation 12."""
    routing: Routing = moe.gate(x)
    rows = []
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            u, total = x[b, t], torch.zeros_like(x[b, t])
            if moe.shared_experts is not None:
                total = total + moe.shared_experts.down_proj.weight @ (
                    F.silu(moe.shared_experts.gate_proj.weight @ u)
                    * (moe.shared_experts.up_proj.weight @ u)
                )
            for e, gate in zip(routing.indices_BTK[b, t], routing.weights_BTK[b, t], strict=True):
                inner = F.silu(moe.experts.gate_proj[e] @ u) * (moe.experts.up_proj[e] @ u)
                total = total + gate * (moe.experts.down_proj[e] @ inner)
            rows.append(total)
    return torch.stack(rows).view_as(x)


@SEEDS
def test_dispatch_against_equation_12(seed: int) -> None:
    """Report eq 12 without its residual, token by token, against both dispatches."""
    config = oracles.small_config(seed)
    moe = some_moe(config, seed).requires_grad_(False)
    x = torch.randn(2, 11, config.hidden_size)
    for dense in (False, True):
        out, _ = moe(x, dense=dense)
        for b in range(2):
            expected = oracles.moe(moe, config, oracles.numbers(x[b]))
            np.testing.assert_allclose(out[b], expected, atol=1e-5)


@SEEDS
def test_sorted_dense_and_loop_agree_with_gradients(seed: int) -> None:
    config = oracles.small_config(seed)
    moe = some_moe(config, seed).double()
    x = torch.randn(2, 9, config.hidden_size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)
    wanted = [x, *moe.parameters()]
    outs = [moe(x)[0], moe(x, dense=True)[0], loop(moe, x)]
    for out in outs:
        torch.testing.assert_close(out, outs[2], rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad((out * weight).sum(), wanted) for out in outs]
    for ours in gradients[:2]:
        for got, expected in zip(ours, gradients[2], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    # One expert alone and unscaled: the router learns nothing from the task, its gate is 1.
    learns = config.num_experts_per_tok > 1 or not config.norm_topk_prob
    assert (gradients[2][1].abs().max() > 1e-9) == learns


@SEEDS
def test_counts(seed: int) -> None:
    config = oracles.small_config(seed)
    moe = some_moe(config, seed).requires_grad_(False)
    _, routing = moe(torch.randn(3, 21, config.hidden_size))
    expected = [0] * config.n_routed_experts
    for e in routing.indices_BTK.flatten().tolist():
        expected[e] += 1
    assert routing.counts().tolist() == expected
    assert sum(expected) == 3 * 21 * config.num_experts_per_tok
    for row in routing.indices_BTK.flatten(0, 1).tolist():
        assert len(set(row)) == config.num_experts_per_tok  # nobody twice


def test_experts_without_tokens() -> None:
    """First, last and a middle expert idle: counted as 0, gradient zero, results unharmed."""
    moe = some_moe(ModelConfig.tiny().replace(n_group=1, topk_group=1)).double()
    idle = [0, 3, 7]
    moe.gate.e_score_correction_bias[idle] = -50
    x = torch.randn(1, 6, 32, dtype=torch.float64)
    out, routing = moe(x)
    assert routing.counts()[idle].tolist() == [0, 0, 0]
    assert len(routing.counts()) == 8
    torch.testing.assert_close(out, loop(moe, x), rtol=0, atol=1e-12)
    out.sum().backward()
    for parameter in moe.experts.parameters():
        assert parameter.grad is not None
        used = parameter.grad.flatten(1).abs().amax(dim=1) > 0
        assert used.tolist() == (routing.counts() > 0).tolist()


def test_no_token_is_dropped() -> None:
    """All 200 tokens want the same three experts of 16: each still gets all three."""
    config = ModelConfig.mini().replace(num_experts_per_tok=3, n_shared_experts=0)
    moe = some_moe(config).requires_grad_(False)
    moe.gate.e_score_correction_bias[:] = -2.0
    moe.gate.e_score_correction_bias[[1, 2, 6]] = 2.0
    x = torch.randn(2, 100, 128)
    out, routing = moe(x)
    assert routing.counts()[[1, 2, 6]].tolist() == [200, 200, 200]
    assert (out.abs().sum(dim=-1) > 0).all()
    torch.testing.assert_close(out, loop(moe, x), rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------- shared expert


@pytest.mark.parametrize("shared", [1, 2])
def test_the_shared_expert_runs_for_every_token(shared: int) -> None:
    """With silent routed experts, what is left is the shared one: un-gated, unscaled, for all."""
    config = ModelConfig.tiny().replace(n_shared_experts=shared)
    moe = some_moe(config).requires_grad_(False)
    moe.experts.down_proj.zero_()
    x = torch.randn(2, 15, 32)
    parts = (part.weight for part in moe.shared_experts.children())
    gate, up, down = (oracles.numbers(p) for p in parts)
    assert gate.shape == (16 * shared, 32)
    expected = oracles.swiglu(oracles.numbers(x), gate, up, down)
    assert np.abs(expected).sum(axis=-1).min() > 0.01
    for dense in (False, True):
        np.testing.assert_allclose(moe(x, dense=dense)[0], expected, atol=1e-6)


def test_the_shared_expert_is_added_to_the_routed_ones() -> None:
    moe = some_moe(ModelConfig.tiny()).requires_grad_(False)
    without = copy.deepcopy(moe)
    without.shared_experts = None
    x = torch.randn(1, 15, 32)
    shared = moe.shared_experts(x)
    torch.testing.assert_close(moe(x)[0], without(x)[0] + shared, rtol=0, atol=1e-6)
    assert moe(x)[1].scores_BTE.shape[-1] == 8  # it is not one of the routed


def test_no_shared_expert() -> None:
    moe = MoE(ModelConfig.tiny().replace(n_shared_experts=0))
    assert moe.shared_experts is None
    assert not [name for name in moe.state_dict() if "shared" in name]


# ------------------------------------------------------------------------------ one expert's sums


def test_one_expert_by_hand() -> None:
    config = ModelConfig.tiny().replace(hidden_size=3, moe_intermediate_size=2)
    experts = Experts(config).requires_grad_(False)
    oracles.shake(experts)
    x = torch.randn(4, 3)
    for e in range(8):
        parts = (experts.gate_proj[e], experts.up_proj[e], experts.down_proj[e])
        expected = oracles.swiglu(oracles.numbers(x), *(oracles.numbers(p) for p in parts))
        np.testing.assert_allclose(experts.one(e, x), expected, atol=1e-5)


# --------------------------------------------------------------------- two ways to run the experts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[3, 0, 1, 5, 0, 0, 2, 1], [0] * 7 + [4], [2] * 8])
def test_grouped_and_in_turn_agree_with_gradients(counts: list[int], dtype: torch.dtype) -> None:
    experts = some_moe(ModelConfig.tiny()).experts.to(dtype)
    x_ND, wanted = torch.randn(3, 32, dtype=dtype), torch.tensor(counts)
    token = torch.randint(3, (sum(counts),))
    gates = torch.rand(sum(counts), 1, dtype=dtype)
    results = []
    for run in (experts.in_turn, experts.grouped):
        x, g = x_ND.clone().requires_grad_(), gates.clone().requires_grad_()
        out = run(x, token, g, wanted)
        grads = torch.autograd.grad(out.float().square().sum(), (x, g, *experts.parameters()))
        results.append([out.detach(), *grads])
        with torch.no_grad():
            assert torch.equal(run(x, token, g, wanted), out)
    for ours, others in zip(*results, strict=True):
        scale = float(others.abs().max())
        tolerance = 1e-5 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(ours, others, rtol=0, atol=tolerance * scale)


def test_experts_are_grouped_where_torch_can() -> None:
    experts, calls = some_moe(ModelConfig.tiny()).experts, []
    for name in ("grouped", "in_turn"):
        way = getattr(experts, name)
        setattr(experts, name, lambda *a, way=way, name=name: calls.append(name) or way(*a))
    for tokens, dtype in ((4, torch.float32), (3, torch.float32), (4, torch.float64)):
        x = torch.randn(tokens, 32, dtype=dtype)
        indices = torch.arange(2).expand(tokens, -1)
        experts.to(dtype)(x, indices, torch.ones(tokens, 2, dtype=dtype))
    assert calls == ["grouped", "in_turn", "in_turn"], "8 rows for 8 experts; fewer; fp64"


@pytest.mark.parametrize("block_rows", [1, 5, 1024])
@pytest.mark.parametrize("tokens", [0, 1, 2, 13])
def test_what_runs_without_a_gradient_equals_what_learns(
    tokens: int, block_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One token's way, and blocks of one, two or all experts: each against all rows at once."""
    monkeypatch.setattr("dsv3_mini.moe.BLOCK_ROWS", block_rows)
    moe = some_moe(ModelConfig.tiny(), seed=tokens)
    x = torch.randn(tokens, 32)
    routing = moe.gate(x[None])
    choice = (routing.indices_BTK[0], routing.weights_BTK[0].detach())
    learnt = moe.experts(x, *choice)
    with torch.no_grad():
        plain, dense = moe.experts(x, *choice), moe.experts.dense(x, *choice)
    assert learnt.requires_grad == (tokens > 0)
    assert not plain.requires_grad
    torch.testing.assert_close(plain, learnt.detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(plain, dense, rtol=0, atol=1e-6)


def test_a_step_keeps_three_products_operands_and_nothing_as_wide_as_x() -> None:
    """For each row training holds gate, up and what the last product reads.

    Neither the rows themselves nor an expert's result, both K times as large as x.
    """
    moe = some_moe(ModelConfig.tiny())
    x = torch.randn(400, 32, requires_grad=True)
    routing = moe.gate(x[None])
    indices, weights = routing.indices_BTK[0], routing.weights_BTK[0].detach()
    rows, inner = indices.numel(), moe.experts.gate_proj.shape[1]
    live = held(lambda: moe.experts(x, indices, weights))[-1]
    # And 28 bytes a row of places and gates, less than a fourth tensor as wide would be.
    assert 0 < live - x.nbytes - 3 * rows * inner * 4 < rows * inner * 4


def test_two_backward_passes_give_what_one_does() -> None:
    """What is made again for the first pass is made again for the second."""
    moe = some_moe(ModelConfig.tiny())
    x = torch.randn(1, 40, 32, requires_grad=True)
    out, _ = moe(x)
    targets = (x, *moe.experts.parameters())
    first, second = (
        torch.autograd.grad(out.square().sum(), targets, retain_graph=True) for _ in range(2)
    )
    for ours, others in zip(first, second, strict=True):
        assert torch.equal(ours, others)


def test_brute_force_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    moe, x = some_moe(ModelConfig.tiny()), torch.randn(1, 3, 32)
    calls: list[str] = []
    monkeypatch.setattr(moe.experts, "dense", lambda x, *_: calls.append("dense") or x)
    moe(x)
    assert not calls
    moe(x, dense=True)
    assert calls == ["dense"]


def test_blocks_only_where_nothing_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    moe, x = some_moe(ModelConfig.tiny()), torch.randn(1, 9, 32)
    calls: list[str] = []
    monkeypatch.setattr(moe.experts, "in_blocks", lambda _, x, *__: calls.append("blocks") or x)
    moe(x)
    assert not calls
    with torch.no_grad():
        moe(x)
    assert calls == ["blocks"]
