"""nodes: counts against loops, the slow rule against the router, the closed form by enumeration."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from dsv3_mini.config import ModelConfig
from dsv3_mini.course.nodes import Traffic, expected_nodes, nodes_touched, route, traffic
from dsv3_mini.moe import Gate, Routing
from tests.reference import oracles

SIZES = pytest.mark.parametrize(
    ("experts", "groups", "kept", "chosen"), [(16, 4, 2, 4), (256, 8, 4, 8), (8, 1, 1, 3)]
)


def some_indices(tokens: int, experts: int, chosen: int) -> torch.Tensor:
    return torch.rand(tokens, experts).argsort(dim=1)[:, :chosen]


def gated(scores: torch.Tensor, bias: torch.Tensor, groups: int, kept: int, k: int) -> Routing:
    """What the package's router makes of these affinities: its input is their inverse sigmoid."""
    experts = scores.shape[-1]
    config = ModelConfig.tiny().replace(
        hidden_size=experts, n_routed_experts=experts, n_group=groups, topk_group=kept,
        num_experts_per_tok=k,
    )  # fmt: skip
    gate = Gate(config).requires_grad_(False).double()
    gate.weight.copy_(torch.eye(experts))
    gate.e_score_correction_bias = bias
    routing: Routing = gate(oracles.logit(scores)[None])
    return routing


@SIZES
@pytest.mark.parametrize("shift", [0.0, -2.0, 0.5])
def test_the_slow_rule_is_the_router(
    experts: int, groups: int, kept: int, chosen: int, shift: float
) -> None:
    """Also where every s + bias is negative, and a mask of 0 would win."""
    scores = torch.rand(60, experts, dtype=torch.float64)
    bias = shift + 0.3 * torch.randn(experts, dtype=torch.float64)
    slow = route(scores, bias, chosen, groups, kept)
    routing = gated(scores, bias, groups, kept, chosen)
    assert torch.equal(slow, routing.indices_BTK[0])
    assert int(nodes_touched(slow, experts, groups).max()) <= kept


def test_two_good_experts_outrank_one_excellent() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.6, 0.6]])
    assert route(scores, torch.zeros(4), 2, 2, 1).tolist() == [[2, 3]]
    assert route(scores, torch.zeros(4), 2, 2, 2)[0, 0] == 0
    assert route(scores, torch.tensor([-0.1, 0.5, -0.1, -0.1]), 2, 2, 1).tolist() == [[0, 1]]
    assert route(scores[:0], torch.zeros(4), 2, 2, 1).shape == (0, 2)


@SIZES
def test_counts_are_those_of_a_loop(experts: int, groups: int, kept: int, chosen: int) -> None:
    indices = some_indices(70, experts, chosen)
    size, per_node, per_expert = experts // groups, 0, 0
    touched = nodes_touched(indices, experts, groups)
    for token, picks in enumerate(indices.tolist()):
        visited = [pick // size for pick in picks]
        assert touched[token] == len(set(visited))
        per_node += len(set(visited) - {token % groups})
        per_expert += sum(node != token % groups for node in visited)
    expected = Traffic(per_node * 7 * 2, per_expert * 7 * 2)
    assert traffic(indices, experts, groups, hidden=7, bytes_per_number=2) == expected
    assert traffic(indices[:0], experts, groups, 7) == Traffic(0, 0)


def test_traffic_by_hand() -> None:
    """Tokens at home on nodes 0, 1, 0: the first stays, the second moves as one, the third once."""
    indices = torch.tensor([[0, 1], [0, 1], [1, 2]])
    assert nodes_touched(indices, 4, 2).tolist() == [1, 1, 2]
    assert traffic(indices, 4, 2, hidden=10) == Traffic(per_node=20, per_expert=30)


@pytest.mark.parametrize(("experts", "nodes", "chosen"), [(8, 4, 3), (6, 2, 1), (6, 3, 6)])
def test_closed_form_is_the_mean_over_all_choices(experts: int, nodes: int, chosen: int) -> None:
    every = torch.tensor(list(itertools.combinations(range(experts), chosen)))
    mean = nodes_touched(every, experts, nodes).double().mean().item()
    assert expected_nodes(experts, nodes, chosen) == pytest.approx(mean, rel=1e-12)


def test_v3_without_its_limit() -> None:
    assert expected_nodes(256, 8, 8) == pytest.approx(5.29465, abs=1e-5)
    measured = nodes_touched(some_indices(4000, 256, 8), 256, 8).double().mean().item()
    assert measured == pytest.approx(expected_nodes(256, 8, 8), abs=0.05)


@pytest.mark.parametrize(
    ("function", "values", "message"),
    [
        (nodes_touched, (torch.zeros(2, 3, dtype=torch.int64), 6, 4), "6 experts do not divide"),
        (nodes_touched, (torch.zeros(2, 3, dtype=torch.int64), 6, 0), "among 0 nodes"),
        (nodes_touched, (torch.zeros(1, 2, 3, dtype=torch.int64), 6, 2), r"flatten\(0, 1\)"),
        (nodes_touched, (torch.zeros(2, 3), 6, 2), "torch.float32"),
        (traffic, (torch.tensor([[6]]), 6, 2, 1), "outside 0 .. 5"),
        (traffic, (torch.tensor([[-1]]), 6, 2, 1), "outside 0 .. 5"),
        (route, (torch.rand(2, 6), torch.zeros(6), 4, 2, 1), "chosen is 4 and kept 1"),
        (route, (torch.rand(2, 6), torch.zeros(6), 1, 2, 3), "1 to 2 groups"),
        (expected_nodes, (6, 2, 7), "expected 1 to 6"),
    ],
)
def test_refuses_what_cannot_be(function: Any, values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(*values)
