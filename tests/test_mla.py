"""mla: equations 1 to 11 done slowly, and every faster path equal to them and to each other."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dsv3_mini import ModelConfig
from dsv3_mini.cache import Cache, KVCache, LatentCache
from dsv3_mini.mla import MultiHeadLatentAttention, cheaper_to_absorb
from dsv3_mini.rope import rope_table
from tests.reference import oracles

SEEDS = pytest.mark.parametrize("seed", range(8))  # odd seeds have YaRN
PATHS = [(False, False), (False, True), (True, True)]  # absorb, fused: absorbed has one form


def some_config(seed: int) -> ModelConfig:
    """Half of the seeds compress the queries, in all four combinations with YaRN."""
    return oracles.small_config(seed, q_lora_rank=None if seed // 2 % 2 else 9)


def some_attention(config: ModelConfig, seed: int) -> MultiHeadLatentAttention:
    attention = MultiHeadLatentAttention(config).requires_grad_(False)
    oracles.shake(attention, seed)
    return attention


def run(
    attention: MultiHeadLatentAttention, x: Tensor, lengths: list[int], cache: Cache | None,
    absorb: bool | None = None, fused: bool = True, start: int = 0,
) -> Tensor:  # fmt: skip
    """The module on consecutive pieces of x, (B, T, D), at positions from ``start``."""
    out = []
    for piece in x.split(lengths, dim=1):
        table = rope_table(attention.config, start, piece.shape[1], "cpu")
        out.append(attention(piece, *table, cache, absorb=absorb, fused=fused))
        start += piece.shape[1]
        if cache is not None:
            cache.advance(piece.shape[1])
    return torch.cat(out, dim=1)


# ----------------------------------------------------------------------------- against the report


@pytest.mark.parametrize(("absorb", "fused"), PATHS)
@SEEDS
def test_equations_1_to_11(seed: int, absorb: bool, fused: bool) -> None:
    """Report eqs 1-11, one head and one position at a time, against every path."""
    config = some_config(seed)
    attention = some_attention(config, seed)
    x = torch.randn(2, 10, config.hidden_size)
    out = run(attention, x, [10], None, absorb, fused)
    for b in range(2):
        expected = oracles.mla(attention, config, oracles.numbers(x[b]))
        np.testing.assert_allclose(out[b], expected, atol=1e-5)


@SEEDS
def test_equations_at_an_offset(seed: int) -> None:
    """Positions 30 to 37, chunked through a cache, still say what the equations say."""
    config = some_config(seed)
    attention = some_attention(config, seed)
    x = torch.randn(1, 8, config.hidden_size)
    expected = oracles.mla(attention, config, oracles.numbers(x[0]), start=30)
    for absorb in (False, True):
        cache = LatentCache(config, 1, 1, 8)
        out = run(attention, x, [3, 1, 4], cache, absorb, start=30)
        np.testing.assert_allclose(out[0], expected, atol=2e-5)


def test_shapes_of_v3() -> None:
    """The checkpoint's matrices: one rotary key of 64, whatever the number of heads."""
    with torch.device("meta"):
        attention = MultiHeadLatentAttention(ModelConfig.v3())
    shapes = {name: tuple(p.shape) for name, p in attention.named_parameters()}
    assert shapes == {
        "q_a_proj.weight": (1536, 7168),
        "q_a_layernorm.weight": (1536,),
        "q_b_proj.weight": (24576, 1536),
        "kv_a_proj_with_mqa.weight": (576, 7168),
        "kv_a_layernorm.weight": (512,),
        "kv_b_proj.weight": (32768, 512),
        "o_proj.weight": (7168, 16384),
    }


# ------------------------------------------------------------------------- paths, one against all


@pytest.mark.parametrize("kind", [LatentCache, KVCache])
@SEEDS
def test_every_chunking_equals_one_pass(seed: int, kind: type[Cache]) -> None:
    """Token by token, in random chunks, naive or absorbed, latent or expanded cache."""
    config = some_config(seed)
    attention = some_attention(config, seed)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
        attention = attention.to(dtype)
        x = torch.randn(2, 12, config.hidden_size, dtype=dtype)
        whole = run(attention, x, [12], None, absorb=False, fused=False)
        for lengths in ([12], [1] * 12, oracles.chunks(12, seed), oracles.chunks(12, seed + 50)):
            for absorb, fused in [*PATHS, (None, True)]:
                cache = kind(config, 1, 2, 12, dtype)
                out = run(attention, x, lengths, cache, absorb, fused)
                torch.testing.assert_close(out, whole, rtol=0, atol=tolerance)


@SEEDS
def test_whole_models(seed: int) -> None:
    """The same for logits, MoE layers and all, at every position."""
    config = some_config(seed)
    model = oracles.shaken(config, seed)
    tokens = torch.randint(0, config.vocab_size, (2, 14))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        model = model.to(dtype)
        whole = model(tokens, absorb=False, fused=False).logits
        for lengths in ([1] * 14, oracles.chunks(14, seed)):
            for expanded in (False, True):
                for absorb, fused in [*PATHS, (None, True)]:
                    cache = model.new_cache(2, 14, expanded=expanded)
                    pieces = tokens.split(lengths, dim=1)
                    logits = [model(p, cache, absorb=absorb, fused=fused).logits for p in pieces]
                    got = torch.cat(logits, dim=1)
                    torch.testing.assert_close(got, whole, rtol=0, atol=tolerance)


@SEEDS
def test_gradients_of_both_paths_agree(seed: int) -> None:
    config = some_config(seed)
    attention = some_attention(config, seed).double().requires_grad_()
    x = torch.randn(1, 7, config.hidden_size, dtype=torch.float64)
    weight = torch.randn_like(x)
    gradients = [
        torch.autograd.grad(
            (run(attention, x, [7], None, absorb, fused) * weight).sum(), attention.parameters()
        )
        for absorb, fused in PATHS
    ]
    for others in gradients[1:]:
        for one, other in zip(gradients[0], others, strict=True):
            assert one.abs().max() > 0
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


# --------------------------------------------------------------------------------- the rotary key


@SEEDS
def test_position_travels_apart(seed: int) -> None:
    """Moving all tokens along moves k^R and q^R only; what comes out does not notice."""
    config = some_config(seed)
    attention = some_attention(config, seed)
    x = torch.randn(1, 6, config.hidden_size)
    near, far = (rope_table(config, start, 6, "cpu") for start in (0, 40))
    c = config.kv_lora_rank
    here, there = attention.latents(x, *near), attention.latents(x, *far)
    assert torch.equal(here[..., :c], there[..., :c])
    assert not torch.isclose(here[..., c:], there[..., c:]).all()
    (q_c, q_r), (q_c2, q_r2) = attention.queries(x, *near), attention.queries(x, *far)
    assert torch.equal(q_c, q_c2)
    assert not torch.isclose(q_r, q_r2).all()
    outs = [run(attention, x, [6], None, absorb=False, start=start) for start in (0, 3, 40)]
    torch.testing.assert_close(outs[1], outs[0], rtol=0, atol=5e-5)
    torch.testing.assert_close(outs[2], outs[0], rtol=0, atol=5e-5)
    # Not because position were ignored: tokens in another order give another last output.
    order = torch.tensor([1, 0, 2, 3, 4, 5])
    swapped = run(attention, x[:, order], [6], None, absorb=False)
    assert (swapped[:, -1] - outs[0][:, -1]).abs().max() > 1e-3


@SEEDS
def test_one_rotary_key_for_all_heads_and_none_in_values(seed: int) -> None:
    config = oracles.small_config(seed, num_attention_heads=3, num_key_value_heads=3)
    attention = some_attention(config, seed)
    x = torch.randn(1, 6, config.hidden_size)
    stores = []
    for start in (0, 40):
        cache = KVCache(config, 1, 1, 6)
        run(attention, x, [6], cache, start=start)
        stores.append([store[0, 0] for store in cache.stores])
    (keys, values), (moved_keys, moved_values) = stores
    n = config.qk_nope_head_dim
    rotary = keys[..., n:]
    assert torch.equal(rotary, rotary[:1].expand_as(rotary))
    assert not torch.isclose(keys[0, :, :n], keys[1, :, :n]).all()  # content differs by head
    assert torch.equal(keys[..., :n], moved_keys[..., :n])
    assert not torch.isclose(rotary, moved_keys[..., n:]).all()
    assert torch.equal(values, moved_values)


def test_the_rotary_key_comes_from_the_hidden_state() -> None:
    """It bypasses the latent and its norm: scaling h scales k^R, and leaves c^KV as it was."""
    config = oracles.small_config(0, rms_norm_eps=1e-12)
    attention = some_attention(config, 0).double()
    x = torch.randn(1, 5, config.hidden_size, dtype=torch.float64)
    table = rope_table(config, 0, 5, "cpu")
    one, ten = attention.latents(x, *table), attention.latents(10 * x, *table)
    c = config.kv_lora_rank
    torch.testing.assert_close(ten[..., c:], 10 * one[..., c:])
    torch.testing.assert_close(ten[..., :c], one[..., :c])
    attention.kv_a_proj_with_mqa.weight[:c] = 0
    silent = attention.latents(x, *table)
    assert torch.equal(silent[..., c:], one[..., c:])
    assert not silent[..., :c].any()


# --------------------------------------------------------------------------------- when to absorb


def multiplications(config: ModelConfig, new: int, seen: int) -> tuple[int, int]:
    """Of one head, naive and absorbed, counted one by one."""
    naive = absorbed = 0
    for _latent in range(config.kv_lora_rank):
        for _row in range(config.qk_nope_head_dim + config.v_head_dim):
            naive += seen  # every seen latent is expanded
            absorbed += new  # W^UK meets each new query, W^UV each new output
    for _query in range(new):
        for _key in range(seen):
            naive += config.qk_nope_head_dim + config.qk_rope_head_dim  # q . k
            naive += config.v_head_dim  # share x v
            absorbed += config.kv_lora_rank + config.qk_rope_head_dim
            absorbed += config.kv_lora_rank
    return naive, absorbed


def test_cheaper_to_absorb() -> None:
    draw = random.Random(0)
    answers = set()
    for seed in range(200):
        config = oracles.small_config(seed)
        new = draw.randint(1, 12)
        seen = new + draw.choice([0, draw.randint(0, 30)])
        naive, absorbed = multiplications(config, new, seen)
        assert cheaper_to_absorb(config, new, seen) == (absorbed < naive)
        answers.add(absorbed < naive)
    assert answers == {True, False}


def test_cheaper_to_absorb_at_v3() -> None:
    """Decoding absorbs, one token or a few drafts at a time; a whole prompt does not."""
    v3 = ModelConfig.v3()
    for seen in (2, 100, 4096, 131_072):
        assert cheaper_to_absorb(v3, 1, seen)
        assert cheaper_to_absorb(v3, 4, seen + 4)
    for length in (1, 100, 4096):
        assert not cheaper_to_absorb(v3, length, length)


@SEEDS
def test_the_count_is_what_torch_executes(seed: int) -> None:
    """The two paths differ in multiplications by what the count says, heads x 2 operations each."""
    config = some_config(seed)
    attention = some_attention(config, seed)
    x = torch.randn(1, 9, config.hidden_size)
    flops = []
    for absorb in (False, True):
        cache = LatentCache(config, 1, 1, 9)
        run(attention, x[:, :6], [6], cache)
        with FlopCounterMode(display=False) as counter:
            run(attention, x[:, 6:], [3], cache, absorb, fused=False, start=6)
        flops.append(counter.get_total_flops())
    naive, absorbed = multiplications(config, 3, 9)
    assert flops[0] - flops[1] == 2 * config.num_attention_heads * (naive - absorbed)


def test_the_cheaper_path_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig.tiny()
    attention = some_attention(config, 0)
    taken: list[str] = []
    for name in ("absorbed", "expand"):
        original = getattr(MultiHeadLatentAttention, name)

        def noted(self: MultiHeadLatentAttention, *args: Tensor, name: str = name, f=original):
            taken.append(name)
            return f(self, *args)

        monkeypatch.setattr(MultiHeadLatentAttention, name, noted)
    x = torch.randn(1, 31, config.hidden_size)
    run(attention, x, [30, 1], LatentCache(config, 1, 1, 31))
    assert taken == ["expand", "absorbed"]
    run(attention, x, [30, 1], LatentCache(config, 1, 1, 31), absorb=True)
    run(attention, x, [30, 1], LatentCache(config, 1, 1, 31), absorb=False)
    assert taken[2:] == ["absorbed"] * 2 + ["expand"] * 2
