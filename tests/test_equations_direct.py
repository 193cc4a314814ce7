"""Equations that no other test states directly, against slow statements of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dsv3_mini.block import DecoderLayer
from dsv3_mini.rope import rope_table
from tests.reference import oracles


@pytest.mark.parametrize("seed", range(6))
def test_a_layer_adds_its_feed_forward_to_the_stream(seed: int) -> None:
    """Report eq 12 with its residual, and the norms that it leaves out; dense layers likewise."""
    config = oracles.small_config(seed).replace(num_hidden_layers=2, first_k_dense_replace=1)
    x = torch.randn(1, 7, config.hidden_size)
    for index, routed in ((0, False), (1, True)):
        layer = DecoderLayer(config, index).requires_grad_(False)
        oracles.shake(layer, seed)
        out, routing = layer(x, *rope_table(config, 0, 7, "cpu"), None, 0)
        expected = oracles.layer(layer, config, oracles.numbers(x[0]))
        np.testing.assert_allclose(out[0], expected, atol=2e-5)
        assert (routing is not None) == routed
