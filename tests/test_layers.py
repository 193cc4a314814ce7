"""layers: products, RMSNorm and SwiGLU against numpy, attention against a loop over queries."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_mini.layers import FEW_ROWS, Linear, RMSNorm, SwiGLU, attend, causal_mask, linear
from tests.reference import oracles

# ----------------------------------------------------------------------------------------- products


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the batches that ``linear`` makes where torch has three threads to give."""
    calls: list[tuple[int, ...]] = []
    bmm = torch.bmm

    def noted(x: Tensor, weights: Tensor) -> Tensor:
        calls.append(tuple(weights.shape))
        return bmm(x, weights)

    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(torch, "bmm", noted)
    return calls


@torch.no_grad()
@pytest.mark.parametrize("leading", [(), (1, 1), (0,), (2, 3), (FEW_ROWS,)])
def test_few_rows_are_shared_out_and_the_same(
    leading: tuple[int, ...], shared: list[tuple[int, ...]]
) -> None:
    x, weight = torch.randn(*leading, 256), torch.randn(258, 256)
    out = linear(x, weight)
    assert shared == [(3, 256, 86)]
    expected = np.einsum("...i,oi->...o", x.double().numpy(), weight.double().numpy())
    assert out.shape == expected.shape
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("rows", "outputs", "dtype", "learns"),
    [
        (FEW_ROWS + 1, 258, torch.float32, False),
        (1, 255, torch.float32, False),  # 65,280 weights
        (1, 257, torch.float32, False),  # not a third each
        (1, 258, torch.bfloat16, False),
        (1, 258, torch.float32, True),
    ],
)
def test_all_else_is_one_product(
    rows: int, outputs: int, dtype: torch.dtype, learns: bool, shared: list[tuple[int, ...]]
) -> None:
    x, weight = torch.randn(rows, 256, dtype=dtype), torch.randn(outputs, 256, dtype=dtype)
    with torch.set_grad_enabled(learns):
        out = linear(x, weight)
    assert torch.equal(out, F.linear(x, weight))
    assert not shared


def test_one_thread_gets_one_product(
    monkeypatch: pytest.MonkeyPatch, shared: list[tuple[int, ...]]
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    with torch.no_grad():
        linear(torch.ones(1, 256), torch.ones(258, 256))
    assert not shared


def test_linear_takes_no_bias() -> None:
    assert Linear(3, 2).bias is None
    with pytest.raises(TypeError, match="bias"):
        Linear(3, 2, bias=True)  # type: ignore[call-arg]


# ---------------------------------------------------------------------------------------- RMSNorm


def norm_with_weight(width: int, eps: float = 1e-6) -> RMSNorm:
    norm = RMSNorm(width, eps)
    oracles.shake(norm)
    return norm.requires_grad_(False)


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_rms_norm(eps: float, size: float) -> None:
    norm = norm_with_weight(24, eps)
    x = torch.randn(2, 5, 24) * size
    expected = oracles.rms_norm(oracles.numbers(x), oracles.numbers(norm.weight), eps)
    np.testing.assert_allclose(norm(x), expected, rtol=2e-6, atol=1e-7)


def test_rms_norm_does_not_centre() -> None:
    x = torch.full((1, 8), 3.0)
    np.testing.assert_allclose(RMSNorm(8)(x).detach(), np.ones((1, 8)), rtol=1e-6)


def test_rms_norm_starts_with_weight_one_and_v3s_eps() -> None:
    norm = RMSNorm(5)
    assert norm.eps == 1e-6
    assert torch.equal(norm.weight, torch.ones(5))


def test_rms_norm_in_bf16() -> None:
    """Normalised in fp32, rounded, then weighed: two roundings of 2^-8 each."""
    norm = norm_with_weight(64).bfloat16()
    x = torch.randn(7, 64).bfloat16()
    out = norm(x)
    assert out.dtype == torch.bfloat16
    exact = oracles.rms_norm(oracles.numbers(x), np.ones(64), 1e-6)
    rounded = torch.from_numpy(exact).float().bfloat16() * norm.weight
    assert (out == rounded).float().mean() > 0.99
    expected = exact * oracles.numbers(norm.weight)
    np.testing.assert_allclose(out.float(), expected, rtol=2**-7)


def test_rms_norm_squares_in_a_wider_type() -> None:
    """300^2 does not fit into fp16; squared there, the output would be zero."""
    x = torch.full((1, 16), 300.0).half()
    assert torch.equal(RMSNorm(16).half()(x), torch.ones(1, 16).half())


def test_rms_norm_in_double() -> None:
    norm = norm_with_weight(24).double()
    x = torch.randn(3, 24, dtype=torch.float64)
    expected = oracles.rms_norm(x.numpy(), norm.weight.numpy(), 1e-6)
    np.testing.assert_allclose(norm(x), expected, rtol=1e-13)


# ----------------------------------------------------------------------------------------- SwiGLU


def test_swiglu() -> None:
    layer = SwiGLU(10, 14)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "gate_proj.weight": (14, 10), "up_proj.weight": (14, 10), "down_proj.weight": (10, 14),
    }  # fmt: skip
    oracles.shake(layer)
    x = torch.randn(3, 4, 10)
    gate, up, down = (
        oracles.numbers(p.weight) for p in (layer.gate_proj, layer.up_proj, layer.down_proj)
    )
    expected = oracles.swiglu(oracles.numbers(x), gate, up, down)
    np.testing.assert_allclose(layer(x).detach(), expected, atol=1e-5)
    # Gate and up are not interchangeable: the non-linearity is on the gate.
    assert np.abs(oracles.swiglu(oracles.numbers(x), up, gate, down) - expected).max() > 0.05


def test_swiglu_by_hand() -> None:
    layer = SwiGLU(1, 1).requires_grad_(False)
    for parameter, value in zip(layer.parameters(), (1.0, 2.0, 3.0), strict=True):
        parameter.fill_(value)
    expected = 3 * (0.5 / (1 + math.exp(-0.5))) * (2 * 0.5)
    assert float(layer(torch.tensor([0.5]))) == pytest.approx(expected, rel=1e-6)


# ------------------------------------------------------------------------------------ causal mask


@pytest.mark.parametrize(
    ("new", "seen", "expected"),
    [
        (1, 1, [[1]]),
        (3, 3, [[1, 0, 0], [1, 1, 0], [1, 1, 1]]),
        (1, 4, [[1, 1, 1, 1]]),
        (2, 5, [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]),
        (3, 4, [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]),
    ],
)
def test_causal_mask(new: int, seen: int, expected: list[list[int]]) -> None:
    mask = causal_mask(new, seen)
    assert mask.dtype == torch.bool
    assert mask.int().tolist() == expected


# -------------------------------------------------------------------------------------- attention

SHAPES = [(5, 5), (2, 2), (3, 7), (4, 5), (1, 6), (1, 1)]
WIDTHS = [(6, 4), (4, 6), (5, 5)]
HEADS = [(4, 4), (4, 2), (4, 1), (1, 1)]


def loop(q: Tensor, k: Tensor, v: Tensor, scale: float) -> np.ndarray:
    """One query at a time; head h reads key head h // (heads / key heads)."""
    q, k, v = (oracles.numbers(x) for x in (q, k, v))
    batch, heads, new, _ = q.shape
    per_key, old = heads // k.shape[1], k.shape[2] - new
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    for b in range(batch):
        for h in range(heads):
            for t in range(new):
                may_see = range(old + t + 1)
                logits = [scale * q[b, h, t] @ k[b, h // per_key, s] for s in may_see]
                shares = oracles.softmax(np.array(logits))
                for s in may_see:
                    out[b, h, t] += shares[s] * v[b, h // per_key, s]
    return out


def inputs(
    shape: tuple[int, int], widths: tuple[int, int], heads: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    (new, seen), (width, value), (many, few) = shape, widths, heads
    return (
        torch.randn(2, many, new, width, dtype=dtype),
        torch.randn(2, few, seen, width, dtype=dtype),
        torch.randn(2, few, seen, value, dtype=dtype),
    )


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_attention(
    shape: tuple[int, int], widths: tuple[int, int], heads: tuple[int, int], fused: bool
) -> None:
    """Report eq 10, one query at a time."""
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.float64, 1e-13)):
        q, k, v = inputs(shape, widths, heads, dtype)
        out = attend(q, k, v, 0.37, fused)
        assert out.dtype == dtype
        np.testing.assert_allclose(out, loop(q, k, v, 0.37), atol=tolerance)


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_both_paths_agree(shape: tuple[int, int], widths: tuple[int, int]) -> None:
    arguments = [x.requires_grad_() for x in inputs(shape, widths, (4, 2), torch.float64)]
    weight = torch.randn(2, 4, shape[0], widths[1], dtype=torch.float64)
    gradients = [
        torch.autograd.grad((attend(*arguments, 0.4, fused) * weight).sum(), arguments)
        for fused in (True, False)
    ]
    for fast, slow in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("shape", [(5, 5), (3, 7)])
def test_a_key_is_invisible_before_its_position(shape: tuple[int, int], fused: bool) -> None:
    new, seen = shape
    q, k, v = inputs(shape, (6, 4), (2, 2), torch.float64)
    before = attend(q, k, v, 0.5, fused)
    for at in range(seen):
        k2, v2 = k.clone(), v.clone()
        k2[:, :, at] += 1
        v2[:, :, at] -= 1
        changed = (attend(q, k2, v2, 0.5, fused) != before).flatten(3).any(-1).all(0).all(0)
        assert changed.tolist() == [seen - new + t >= at for t in range(new)]
