"""The stand-in of rank r is the best one, and the model is left as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dsv3_mini.config import ModelConfig
from dsv3_mini.course.low_rank import best_of_rank, loss_at_rank
from dsv3_mini.model import Transformer
from dsv3_mini.train import evaluate


def test_the_error_is_what_the_singular_values_say() -> None:
    """Eckart and Young: the squared error is the sum of the squared values that were left out."""
    x, w = torch.randn(50, 12, dtype=torch.float64), torch.randn(20, 12, dtype=torch.float64)
    values = np.linalg.svd((x @ w.T).numpy(), compute_uv=False)
    for rank in (1, 5, 11):
        low = best_of_rank(x, w, rank)
        assert np.linalg.matrix_rank(low.numpy()) == rank
        error = ((x @ w.T - x @ low.T) ** 2).sum().item()
        assert error == pytest.approx((values[rank:] ** 2).sum())
    torch.testing.assert_close(best_of_rank(x, w, 12), w)


@pytest.mark.parametrize("key_heads", [2, 1])
def test_full_rank_changes_nothing_and_weights_come_back(key_heads: int) -> None:
    config = ModelConfig.tiny().replace(attention="gqa", num_key_value_heads=key_heads)
    model = Transformer(config.replace(initializer_range=0.3))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    windows = torch.randint(128, (4, 17))
    whole = evaluate(model, windows)
    for joint in (True, False):
        assert loss_at_rank(model, windows, 64, joint) == pytest.approx(whole, abs=1e-4)
        assert abs(loss_at_rank(model, windows, 2, joint) - whole) > 1e-3
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_half_a_number_is_refused() -> None:
    model = Transformer(ModelConfig.tiny().replace(attention="gqa"))
    with pytest.raises(ValueError, match="rank is 3"):
        loss_at_rank(model, torch.zeros(1, 9, dtype=torch.int64), 3, joint=False)
