"""attention: the yardstick (MHA, GQA, MQA) against one head and one position at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dsv3_mini import ModelConfig, Transformer
from dsv3_mini.attention import GroupedQueryAttention
from dsv3_mini.config import RopeScaling
from dsv3_mini.rope import rope_table
from tests.reference import oracles

BASE = ModelConfig.tiny().replace(
    attention="gqa", hidden_size=20, num_attention_heads=6, num_key_value_heads=6, v_head_dim=8
)
YARN = RopeScaling(factor=8, original_max_position_embeddings=64, beta_fast=8)
KEY_HEADS = pytest.mark.parametrize("key_heads", [6, 3, 2, 1], ids=["mha", "gqa3", "gqa2", "mqa"])


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("yarn", [None, YARN], ids=["plain", "yarn"])
@KEY_HEADS
def test_against_a_loop(key_heads: int, yarn: RopeScaling | None, fused: bool) -> None:
    config = BASE.replace(num_key_value_heads=key_heads, rope_scaling=yarn)
    attention = GroupedQueryAttention(config).requires_grad_(False)
    oracles.shake(attention, seed=key_heads)
    assert attention.k_proj.weight.shape == attention.v_proj.weight.shape == (key_heads * 8, 20)
    x = torch.randn(2, 9, 20)
    out = attention(x, *rope_table(config, 0, 9, "cpu"), fused=fused)
    for b in range(2):
        expected = oracles.grouped(attention, config, oracles.numbers(x[b]))
        np.testing.assert_allclose(out[b], expected, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
@KEY_HEADS
def test_cached_equals_uncached(key_heads: int, seed: int) -> None:
    """Whole models, in fp32 and far tighter in fp64, for random chunks of 15 tokens."""
    model = oracles.shaken(BASE.replace(num_key_value_heads=key_heads), seed)
    tokens = torch.randint(0, BASE.vocab_size, (2, 15))
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float64, 1e-12)):
        model = model.to(dtype)
        whole = model(tokens).logits
        for fused in (True, False):
            cache = model.new_cache(2, 15)
            pieces = tokens.split(oracles.chunks(15, seed), dim=1)
            got = torch.cat([model(piece, cache, fused=fused).logits for piece in pieces], dim=1)
            torch.testing.assert_close(got, whole, rtol=0, atol=tolerance)


def test_repeated_key_heads_are_multi_head_attention() -> None:
    """GQA with its key heads copied out is MHA: the definition of grouping."""
    few = GroupedQueryAttention(BASE.replace(num_key_value_heads=2)).requires_grad_(False)
    many = GroupedQueryAttention(BASE).requires_grad_(False)
    oracles.shake(few)
    state = few.state_dict()
    for name in ("k_proj.weight", "v_proj.weight"):
        first, second = state[name].split(8)
        state[name] = torch.cat([first] * 3 + [second] * 3)
    many.load_state_dict(state)
    x = torch.randn(1, 7, 20)
    table = rope_table(BASE, 0, 7, "cpu")
    torch.testing.assert_close(few(x, *table), many(x, *table), rtol=0, atol=1e-6)


def test_a_model_without_mla_has_the_same_everything_else() -> None:
    mla = Transformer(BASE.replace(attention="mla", num_key_value_heads=6))
    yardstick = Transformer(BASE)

    def rest(model: Transformer) -> dict[str, torch.Size]:
        state = model.state_dict()
        return {name: state[name].shape for name in state if "self_attn" not in name}

    assert rest(mla) == rest(yardstick)
