"""The recall task: its targets by a loop, and that position decides it."""

from __future__ import annotations

import pytest
import torch

from dsv3_mini.course.recall import (
    BACK,
    practise,
    practised,
    recall_accuracy,
    recall_batch,
    recall_config,
    recall_loss,
    swap_attention,
)
from dsv3_mini.mla import MultiHeadLatentAttention
from dsv3_mini.model import Transformer


class Oracle(torch.nn.Module):
    """Answers with the token that stood ``back`` places earlier."""

    def __init__(self, back: int) -> None:
        super().__init__()
        self.back, self.config = back, recall_config()
        self.lm_head = torch.nn.Linear(1, 1)

    def forward(self, tokens: torch.Tensor, absorb: bool | None = None) -> object:
        logits = torch.zeros(*tokens.shape, self.config.vocab_size)
        for row in range(tokens.shape[0]):
            for place in range(self.back, tokens.shape[1]):
                logits[row, place, tokens[row, place - self.back]] = 9.0
        return type("Output", (), {"logits": logits})


def test_targets_stand_five_places_back() -> None:
    tokens, targets = recall_batch(Transformer(recall_config()), 3, 12, seed=1)
    for row in range(3):
        for place in range(12):
            wanted = tokens[row, place - 5].item() if place >= 5 else -100
            assert targets[row, place] == wanted
    assert BACK == 5


@pytest.mark.parametrize(("back", "share"), [(5, 1.0), (4, 1 / 32), (6, 1 / 32)])
def test_only_the_right_distance_scores(back: int, share: float) -> None:
    accuracy = recall_accuracy(Oracle(back), batch=64)  # type: ignore[arg-type]
    assert accuracy.shape == (27,)
    assert accuracy.mean().item() == pytest.approx(share, abs=0.015)


def test_models_of_any_rank_and_heads_have_the_same_size() -> None:
    sizes = [
        sum(p.numel() for p in Transformer(recall_config(rank, heads)).parameters())
        for heads in (1, 4)
        for rank in (1, 4, 32)
    ]
    assert 41_800 < min(sizes) <= max(sizes) <= 42_000


def test_it_is_learned_in_a_second() -> None:
    torch.manual_seed(0)
    model = Transformer(recall_config())
    assert recall_loss(model).mean().item() == pytest.approx(3.466, abs=0.05)  # ln 32
    practise(model)
    for absorb in (None, False, True):
        assert recall_accuracy(model, absorb=absorb).mean() > 0.95


def test_practising_by_name_is_the_same_as_by_hand() -> None:
    torch.manual_seed(3)
    model = practise(Transformer(recall_config(2, 1)), 3, steps=4)
    loss, size = practised((2, 1), seed=3, steps=4)
    assert loss == recall_loss(model).mean().item() != practised((2, 1), seed=4, steps=4)[0]
    assert size == sum(parameter.numel() for parameter in model.parameters())


def test_swapping_keeps_the_weights() -> None:
    class Silent(MultiHeadLatentAttention):
        def forward(self, x: torch.Tensor, *rest: object) -> torch.Tensor:  # type: ignore[override]
            return torch.zeros_like(x)

    model = Transformer(recall_config())
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    swap_attention(model, Silent)
    assert isinstance(model.model.layers[0].self_attn, Silent)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_a_length_that_asks_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="expected more than 5"):
        recall_batch(Transformer(recall_config()), 2, 5, seed=0)
