"""rope: rotations against complex numbers, YaRN against its definition and V3's own numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dsv3_mini import ModelConfig
from dsv3_mini.config import RopeScaling
from dsv3_mini.rope import (
    apply_rope,
    frequencies,
    rope_table,
    rotation_matrix,
    softmax_scale,
    yarn_mscale,
    yarn_ramp,
)
from tests.reference import oracles

V3 = ModelConfig.v3()
PLAIN = V3.replace(rope_scaling=None)


def with_width(width: int, **changes: object) -> ModelConfig:
    return ModelConfig.mini().replace(qk_rope_head_dim=width, **changes)


# --------------------------------------------------------------------------------------- rotation


@pytest.mark.parametrize("width", [2, 6, 16, 64])
def test_adjacent_pairs_are_complex_numbers(width: int) -> None:
    """The rotation of report eqs 3 and 8, by complex multiplication."""
    config = with_width(width)
    x = torch.randn(3, 2, 9, width, dtype=torch.float64)
    out = apply_rope(x, *rope_table(config, 0, 9, "cpu"))
    for t in range(9):
        for i in range(width // 2):
            turn = np.exp(1j * t * 10000.0 ** (-2 * i / width))
            pair = (x[..., t, 2 * i] + 1j * x[..., t, 2 * i + 1]).numpy() * turn
            np.testing.assert_allclose(out[..., t, 2 * i], pair.real, atol=1e-5)
            np.testing.assert_allclose(out[..., t, 2 * i + 1], pair.imag, atol=1e-5)


def test_a_quarter_turn_by_hand() -> None:
    """(1, 0) goes to (0, 1): counter-clockwise, pair by pair, position 0 untouched."""
    cos, sin = torch.tensor([[1.0, 1.0], [0.0, 1.0]]), torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]])
    expected = torch.tensor([[1.0, 2.0, 3.0, 4.0], [-2.0, 1.0, 3.0, 4.0]])
    assert torch.equal(apply_rope(x, cos, sin), expected)


@pytest.mark.parametrize("start", [0, 5])
def test_matrix_form(start: int) -> None:
    config = with_width(8)
    cos, sin = rope_table(config, start, 6, "cpu")
    x = torch.randn(2, 6, 8)
    matrices = rotation_matrix(cos, sin)
    assert matrices.shape == (6, 8, 8)
    by_matrix = np.einsum("trk,btk->btr", matrices.numpy(), x.numpy())
    np.testing.assert_allclose(apply_rope(x, cos, sin), by_matrix, atol=1e-6)
    # Rotations: orthogonal, and position 1 applied twice is position 2.
    np.testing.assert_allclose(matrices @ matrices.mT, np.eye(8)[None].repeat(6, 0), atol=1e-6)
    one, two = (rotation_matrix(*rope_table(config, at, 1, "cpu"))[0] for at in (1, 2))
    np.testing.assert_allclose(one @ one, two, atol=1e-6)
    # Nothing outside the 2 x 2 blocks.
    blocks = np.kron(np.eye(4), np.ones((2, 2)))
    assert not (matrices.numpy() * (1 - blocks)).any()


@pytest.mark.parametrize("config", [with_width(16), V3], ids=["plain", "yarn"])
def test_a_dot_product_sees_the_distance_only(config: ModelConfig) -> None:
    width = config.rotary_dim
    q, k = torch.randn(2, width, dtype=torch.float64)

    def dot(m: int, n: int) -> float:
        turned = (
            apply_rope(v[None], *rope_table(config, at, 1, "cpu")) for v, at in ((q, m), (k, n))
        )
        a, b = turned
        return float(a[0] @ b[0])

    for distance in (0, 1, 17):
        near = dot(distance, 0)
        for shift in (1, 40, 300):
            assert dot(distance + shift, shift) == pytest.approx(near, abs=5e-4)
    assert abs(dot(1, 0) - dot(0, 0)) > 0.05
    assert abs(dot(1, 0) - dot(0, 1)) > 0.05  # before is not after


def test_lengths_are_kept_pair_by_pair() -> None:
    x = torch.randn(5, 30, 64)
    out = apply_rope(x, *rope_table(V3, 7, 30, "cpu"))
    before, after = (v.unflatten(-1, (-1, 2)).norm(dim=-1) for v in (x, out))
    np.testing.assert_allclose(after, before, rtol=1e-5)


def test_the_other_layout_gives_the_same_dot_products() -> None:
    """Half-split code pairs i with i + R/2: permute the dimensions, never just call it."""
    config, width = with_width(8), 8
    cos, sin = rope_table(config, 0, 5, "cpu")

    def half_split(x: np.ndarray) -> np.ndarray:
        c, s = (np.concatenate((t.numpy(), t.numpy()), axis=-1) for t in (cos, sin))
        swapped = np.concatenate((-x[:, width // 2 :], x[:, : width // 2]), axis=-1)
        return x * c + swapped * s

    q, k = torch.randn(2, 5, width)
    ours_q, ours_k = (apply_rope(x, cos, sin).numpy() for x in (q, k))
    halves = [0, 2, 4, 6, 1, 3, 5, 7]
    theirs_q, theirs_k = (half_split(x.numpy()[:, halves]) for x in (q, k))
    np.testing.assert_allclose(ours_q[:, halves], theirs_q, atol=1e-6)
    np.testing.assert_allclose(ours_q @ ours_k.T, theirs_q @ theirs_k.T, atol=1e-5)
    mixed_q, mixed_k = half_split(q.numpy()), half_split(k.numpy())
    assert np.abs(mixed_q - ours_q).max() > 0.1
    assert np.abs(mixed_q @ mixed_k.T - ours_q @ ours_k.T).max() > 0.1


def test_dtype_is_kept_and_bf16_is_turned_in_fp32() -> None:
    cos, sin = rope_table(with_width(8), 0, 50, "cpu")
    x = torch.randn(50, 8)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        assert apply_rope(x.to(dtype), cos, sin).dtype == dtype
    low = x.bfloat16()
    exact = apply_rope(low.double(), cos, sin)
    assert torch.equal(apply_rope(low, cos, sin), exact.float().bfloat16())


def test_memory_may_lie_in_any_order() -> None:
    cos, sin = rope_table(with_width(8), 0, 5, "cpu")
    x = torch.randn(8, 5).T
    assert torch.equal(apply_rope(x, cos, sin), apply_rope(x.contiguous(), cos, sin))


# ----------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("scaling", [None, RopeScaling()], ids=["plain", "yarn"])
@pytest.mark.parametrize("start", [0, 1, 100, 4000])
def test_tables_start_where_the_cache_ends(start: int, scaling: RopeScaling | None) -> None:
    config = with_width(16, rope_scaling=scaling)
    cos, sin = rope_table(config, start, 7, "cpu")
    assert cos.shape == sin.shape == (7, 8)
    for row in range(7):
        angles = (start + row) * oracles.frequencies(config)
        np.testing.assert_allclose(cos[row], np.cos(angles), atol=4e-4)
        np.testing.assert_allclose(sin[row], np.sin(angles), atol=4e-4)
    whole = rope_table(config, 0, start + 7, "cpu")
    assert torch.equal(cos, whole[0][start:])
    assert torch.equal(sin, whole[1][start:])


def test_tables_are_made_where_they_are_needed() -> None:
    """On the device asked for: nothing is left behind on the CPU, and nothing is copied from it."""
    for made in (*rope_table(V3, 3, 2, "meta"), yarn_ramp(64, 1e4, RopeScaling(), "meta")):
        assert made.device.type == "meta"
    for made in (
        frequencies(64),
        frequencies(64, scaling=RopeScaling()),
        *rope_table(V3, 3, 2, "cpu"),
    ):
        assert (made.device.type, made.dtype) == ("cpu", torch.float32)


def test_the_yardstick_turns_its_whole_head() -> None:
    config = ModelConfig.mini().replace(attention="gqa", v_head_dim=24)
    assert rope_table(config, 0, 3, "cpu")[0].shape == (3, 12)


# ------------------------------------------------------------------------------------------- YaRN


def test_v3_pairs() -> None:
    """0 to 10 untouched, 23 to 31 divided by 40, and a straight line between (report 4.3)."""
    plain = np.array([10000.0 ** (-i / 32) for i in range(32)])
    stretched = frequencies(64, 10000.0, RopeScaling()).numpy()
    np.testing.assert_allclose(stretched[:11], plain[:11], rtol=1e-6)
    np.testing.assert_allclose(stretched[23:], plain[23:] / 40, rtol=1e-6)
    for pair in range(11, 23):
        part = (pair - 10) / 13
        expected = plain[pair] * (1 - part) + plain[pair] / 40 * part
        assert stretched[pair] == pytest.approx(expected, rel=1e-5)
    ramp = yarn_ramp(64, 10000.0, RopeScaling()).numpy()
    np.testing.assert_allclose(ramp[10:24], np.arange(14) / 13, atol=1e-6)
    np.testing.assert_allclose(frequencies(64).numpy(), plain, rtol=1e-6)


def test_v3_temperature() -> None:
    assert yarn_mscale(40.0, 1.0) == pytest.approx(1.36889, abs=5e-6)
    assert softmax_scale(V3) == pytest.approx(0.135234, abs=5e-7)
    assert softmax_scale(PLAIN) == pytest.approx(0.0721688, abs=5e-8)
    assert softmax_scale(PLAIN) == pytest.approx(1 / math.sqrt(192))
    assert yarn_mscale(1.5, 1.0) == pytest.approx(1 + 0.1 * math.log(1.5))
    assert yarn_mscale(1.0, 1.0) == yarn_mscale(0.5, 1.0) == 1.0  # nothing is stretched
    # All of V3's temperature is in the softmax scale, none in the rotation.
    cos, sin = rope_table(V3, 3, 5, "cpu")
    np.testing.assert_allclose(cos**2 + sin**2, np.ones((5, 32)), atol=1e-6)


def test_temperature_of_other_settings() -> None:
    """Where the two mscale fields differ, their ratio is in the rotation (DeepSeek-V2 style)."""
    ln = math.log(40)
    for mscale, all_dim, in_softmax, in_table in [
        (0.707, 0.707, 1 + 0.0707 * ln, 1.0),
        (1.0, 0.707, 1 + 0.0707 * ln, (1 + 0.1 * ln) / (1 + 0.0707 * ln)),
        (1.0, 0.0, 1.0, 1 + 0.1 * ln),
        (0.0, 0.707, 1 + 0.0707 * ln, 1 + 0.1 * ln),
    ]:
        config = V3.replace(rope_scaling=RopeScaling(mscale=mscale, mscale_all_dim=all_dim))
        assert softmax_scale(config) == pytest.approx(in_softmax**2 / math.sqrt(192))
        cos, sin = rope_table(config, 9, 1, "cpu")
        np.testing.assert_allclose(cos**2 + sin**2, np.full((1, 32), in_table**2), rtol=1e-5)


def test_the_yardstick_scales_by_its_own_width() -> None:
    config = ModelConfig.mini().replace(attention="gqa", v_head_dim=24)
    assert softmax_scale(config) == pytest.approx(24**-0.5)


def test_the_ramp_ends_before_the_width() -> None:
    """As in every implementation: pair 10.4 of one turn becomes 7, the width without one."""
    scaling = RopeScaling(original_max_position_embeddings=163840, beta_fast=6000, beta_slow=1)
    ramp = yarn_ramp(8, 50.0, scaling)
    np.testing.assert_allclose(ramp, [0, 0, 1 / 6, 2 / 6], rtol=1e-6)


@pytest.mark.parametrize("seed", range(40))
def test_yarn_by_its_definition(seed: int) -> None:
    """Random settings; the reference finds by bisection which pair makes beta turns."""
    draw = np.random.default_rng(seed)
    scaling = RopeScaling(
        factor=float(draw.uniform(1, 60)),
        original_max_position_embeddings=int(draw.integers(128, 8192)),
        beta_fast=float(draw.uniform(4, 64)),
        beta_slow=float(draw.uniform(0.2, 3)),
    )
    theta = float(draw.choice([500.0, 10000.0, 1e6]))
    config = with_width(2 * int(draw.integers(1, 40)), rope_theta=theta, rope_scaling=scaling)
    got = frequencies(config.qk_rope_head_dim, theta, scaling)
    np.testing.assert_allclose(got, oracles.frequencies(config), rtol=2e-5)
    # Ends: the fastest pair keeps its speed, a pair slower than one turn is fully divided.
    assert got[0] == pytest.approx(1.0, rel=1e-6)


def test_a_ramp_of_no_width() -> None:
    """Both bounds on pair 0: it stays, every other is divided, and nothing is nan."""
    scaling = RopeScaling(factor=8, original_max_position_embeddings=6, beta_fast=4, beta_slow=1)
    got = frequencies(8, 10000.0, scaling).numpy()
    plain = 10000.0 ** (-np.arange(4) / 4)
    np.testing.assert_allclose(got, plain / np.array([1, 8, 8, 8]), rtol=1e-6)
