"""cache: what a token costs, read off live tensors, and that rolled-back tokens leave no trace."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv3_mini import ModelConfig, Transformer
from dsv3_mini.accounting import cache_bytes, cache_numbers_per_token
from dsv3_mini.cache import Cache, CacheError, KVCache, LatentCache
from tests.reference import oracles

TINY = ModelConfig.tiny().replace(num_attention_heads=4, num_key_value_heads=4)
LAYERS, BATCH = 2, 3

# kind: the configuration, whether MLA's keys and values are stored expanded, and the numbers that
# one token keeps in one layer. tiny has 4 heads, a latent of 16, keys of 8 + 4, values of 12.
KINDS: dict[str, tuple[ModelConfig, bool, int]] = {
    "latent": (TINY, False, 16 + 4),
    "expanded": (TINY, True, 4 * (8 + 4) + 4 * 12),
    "mha": (TINY.replace(attention="gqa"), False, 2 * 4 * 12),
    "gqa": (TINY.replace(attention="gqa", num_key_value_heads=2), False, 2 * 2 * 12),
    "mqa": (TINY.replace(attention="gqa", num_key_value_heads=1), False, 2 * 1 * 12),
}


def model_and_cache(
    kind: str, max_len: int = 20, dtype: torch.dtype = torch.float32, mtp: bool = False
) -> tuple[Transformer, Cache]:
    config, expanded, _ = KINDS[kind]
    model = oracles.shaken(config).to(dtype)
    return model, model.new_cache(BATCH, max_len, mtp=mtp, expanded=expanded)


def random_tokens(length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, TINY.vocab_size, (BATCH, length), generator=generator)


def live_numbers(cache: Cache, length: int) -> int:
    """Numbers that are not zero, after making sure that they lie in the first ``length`` rows."""
    for store in cache.stores:
        assert not store[..., length:, :].any()
        assert (store[..., :length, :] != 0).all()
    return sum(int(store.count_nonzero()) for store in cache.stores)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_as_tokens_are_added(kind: str, dtype: torch.dtype, size: int) -> None:
    """layers x batch x tokens x numbers x bytes, for each kind run through a real model."""
    config, expanded, per_token = KINDS[kind]
    model, cache = model_and_cache(kind, dtype=dtype)
    assert (cache.length, cache.nbytes) == (0, 0)
    reserved = LAYERS * BATCH * 20 * per_token * size
    assert cache.reserved_nbytes == reserved
    assert sum(store.untyped_storage().nbytes() for store in cache.stores) == reserved
    length = 0
    for step in (5, 1, 1, 4):
        model(random_tokens(step, seed=length), cache)
        length += step
        assert cache.length == length
        assert cache.nbytes == LAYERS * BATCH * length * per_token * size
        assert live_numbers(cache, length) * size == cache.nbytes
        assert cache_bytes(config, length, BATCH, size, expanded) == cache.nbytes
        assert cache.reserved_nbytes == reserved
    cache.truncate(3)
    assert cache.nbytes == LAYERS * BATCH * 3 * per_token * size


def test_mla_keeps_the_latent_by_default() -> None:
    """The point of MLA: no tensor of the cache has a head dimension."""
    model, cache = model_and_cache("latent")
    assert type(cache) is LatentCache
    assert [tuple(store.shape) for store in cache.stores] == [(LAYERS, BATCH, 20, 20)]
    many = TINY.replace(num_attention_heads=8, num_key_value_heads=8)
    assert Transformer(many).new_cache(BATCH, 20).reserved_nbytes == cache.reserved_nbytes
    assert type(model.new_cache(1, 2, expanded=True)) is KVCache


def test_v3_widths() -> None:
    """FACTS that follow from widths: 576 numbers, 70,272 bytes, and what others would cost."""
    v3 = ModelConfig.v3()
    with torch.device("meta"):
        cache = LatentCache(v3, 61, 1, 1, torch.bfloat16, "meta")
        expanded = KVCache(v3, 61, 1, 1, torch.bfloat16, "meta")
        mha = KVCache(v3.replace(attention="gqa"), 61, 1, 1, torch.bfloat16, "meta")
    assert cache.stores[0].shape[-1] == cache_numbers_per_token(v3) == 576
    assert cache.reserved_nbytes == cache_bytes(v3, 1) == 70_272
    assert mha.reserved_nbytes == cache_bytes(v3.replace(attention="gqa"), 1) == 3_997_696
    assert expanded.reserved_nbytes == cache_bytes(v3, 1, expanded=True) == 4_997_120
    assert mha.reserved_nbytes / cache.reserved_nbytes == pytest.approx(56.9, abs=0.05)
    assert expanded.reserved_nbytes / cache.reserved_nbytes == pytest.approx(71.1, abs=0.05)
    assert cache_bytes(v3, 131_072) / 2**30 == pytest.approx(8.58, abs=0.005)  # not 7.6 GB


def test_the_cached_latent_is_normalised_and_its_key_rotated() -> None:
    config = KINDS["latent"][0]
    model, cache = model_and_cache("latent")
    tokens = random_tokens(6)
    model(tokens[:, :4], cache)
    model(tokens[:, 4:], cache)
    first = model.model.layers[0]
    for b in range(BATCH):
        x = oracles.numbers(model.model.embed_tokens.weight)[tokens[b].tolist()]
        x = oracles.rms_norm(x, oracles.numbers(first.input_layernorm.weight), 1e-6)
        down = x @ oracles.numbers(first.self_attn.kv_a_proj_with_mqa.weight).T
        norm = oracles.numbers(first.self_attn.kv_a_layernorm.weight)
        c_kv = oracles.rms_norm(down[:, :16], norm, 1e-6)
        k_rope = [oracles.rotate(down[t, 16:], t, config) for t in range(6)]
        expected = np.concatenate((c_kv, np.array(k_rope)), axis=-1)
        np.testing.assert_allclose(cache.stores[0][0, b, :6], expected, atol=1e-5)
        assert np.abs(down[:, :16] - c_kv).max() > 0.1  # so the raw latent would be noticed


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", KINDS)
def test_truncated_tokens_were_never_seen(kind: str, seed: int) -> None:
    """Feed, roll back, go on: every logit equals that of a cache that never saw the rest."""
    model, cache = model_and_cache(kind)
    draw = np.random.default_rng(seed)
    kept = int(draw.integers(1, 8))
    prompt, rejected, more = random_tokens(kept, 1), random_tokens(6, 2), random_tokens(5, 3)
    model(prompt, cache)
    model(rejected, cache)
    cache.truncate(kept)
    assert cache.length == kept
    clean = model.new_cache(BATCH, 20, expanded=KINDS[kind][1])
    model(prompt, clean)
    for piece in more.split([2, 1, 2], dim=1):
        assert torch.equal(model(piece, cache).logits, model(piece, clean).logits)
    assert cache.nbytes == clean.nbytes
    uncached = model(torch.cat((prompt, more), dim=1)).logits[:, kept:]
    clean.truncate(kept)
    torch.testing.assert_close(model(more, clean).logits, uncached, rtol=0, atol=1e-4)


@pytest.mark.parametrize("first", [1, 2, 5])
@pytest.mark.parametrize("kept", [0, 1, 3])
@pytest.mark.parametrize("depths", [1, 2])
def test_truncation_is_never_silently_wrong_for_mtp(depths: int, kept: int, first: int) -> None:
    """A state left over from forgotten tokens must not join new ones: right, or refused."""
    model = oracles.shaken(TINY.replace(num_nextn_predict_layers=depths))
    cache = model.new_cache(BATCH, 20, mtp=True)
    prompt, other = random_tokens(first, 1), random_tokens(4, 2)
    kept = min(kept, first)
    model(prompt, cache, mtp=True)
    cache.truncate(kept)
    clean = model.new_cache(BATCH, 20, mtp=True)
    if kept:
        model(prompt[:, :kept], clean, mtp=True)
    right = model(other, clean, mtp=True)
    try:
        got = model(other, cache, mtp=True)
    except CacheError:
        got = None
    if got is None:
        assert 0 < kept < first, "refused without need"
        return
    for ours, expected in zip(got.mtp_logits, right.mtp_logits, strict=True):
        assert ours.shape == expected.shape
        torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(got.logits, right.logits)


def test_mtp_bytes_are_its_own() -> None:
    model, cache = model_and_cache("latent", mtp=True)
    model(random_tokens(7), cache, mtp=True)
    assert cache.nbytes == LAYERS * BATCH * 7 * 20 * 4
    assert [(inner.length, inner.nbytes) for inner in cache.mtp] == [(6, BATCH * 6 * 20 * 4)]


def test_a_cache_is_appended_to_not_replaced() -> None:
    """Views of the one reservation: no step copies what was there."""
    model, cache = model_and_cache("latent")
    where = cache.stores[0].data_ptr()
    model(random_tokens(4), cache)
    before = cache.stores[0][..., :4, :].clone()
    model(random_tokens(3, 1), cache)
    assert cache.stores[0].data_ptr() == where
    assert torch.equal(cache.stores[0][..., :4, :], before)


def test_layers_do_not_share_rows() -> None:
    cache = LatentCache(TINY, 2, 1, 5)
    one, two = torch.full((1, 3, 20), 1.0), torch.full((1, 3, 20), 2.0)
    (seen,) = cache.append(1, two)
    cache.append(0, one)
    assert torch.equal(seen, two)
    cache.advance(3)
    (seen,) = cache.append(1, two[:, :1] * 2)
    assert seen[0, :, 0].tolist() == [2, 2, 2, 4]
    assert cache.stores[0][0, 0, :, 0].tolist() == [1, 1, 1, 0, 0]
