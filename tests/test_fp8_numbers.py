"""fp8_numbers: casts bit for bit against the formats' definition, narrow sums against fractions."""

from __future__ import annotations

from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv3_mini.fp8_numbers import E4M3, E5M2, Block, cut, dequantize, matmul, quantize, values
from tests.reference import fp8 as reference

KINDS = {E4M3: reference.E4M3, E5M2: reference.E5M2}
BLOCKS: list[Block] = [(1, 128), (128, 128), (128, 1), (None, None), (1, None), (None, 1), (3, 5)]
SHAPES = [(128, 256), (1, 1), (7, 131), (130, 5), (257, 127), (2, 5, 130), (2, 1, 3, 6)]
MOST = torch.finfo(torch.float32).max

each_dtype = pytest.mark.parametrize("dtype", KINDS, ids=["E4M3", "E5M2"])
each_block = pytest.mark.parametrize("block", BLOCKS, ids=str)


def from_codes(codes: reference.Codes, dtype: torch.dtype = E4M3) -> Tensor:
    return torch.from_numpy(codes.astype(np.uint8)).view(dtype)


def same(ours: Tensor, wanted: np.ndarray[Any, Any]) -> None:
    """Equal to the last bit, the sign of zero included."""
    kinds = {torch.float32: torch.int32, E4M3: torch.uint8, E5M2: torch.uint8}
    bits = ours.contiguous().view(kinds[ours.dtype]).numpy()
    np.testing.assert_array_equal(bits, wanted.view(bits.dtype))


def check(x: Tensor, block: Block, dtype: torch.dtype = E4M3, power_of_two: bool = False) -> None:
    """Both ways equal the reference; what comes out is finite and near; scales are as told."""
    kind = KINDS[dtype]
    codes, scale = quantize(x, block, dtype, power_of_two)
    single = (x.float() if x.dtype == torch.bfloat16 else x).numpy().astype(np.float32)
    wanted, wanted_scale = reference.cast(single, block, kind, power_of_two)
    same(codes, wanted)
    same(scale, wanted_scale)
    out = dequantize(codes, scale, block)
    same(out, reference.back(wanted, wanted_scale, block, kind))
    assert out.isfinite().all()
    if power_of_two:
        assert (np.frexp(scale.numpy())[0] == 0.5).all()
        exact = reference.cast(single, block, kind)[1]
        assert (exact <= scale.numpy()).all()
        assert (scale.numpy() < 2 * exact).all()
    # Half a step: relative for normal codes, a share of the scale for those below.
    step, smallest = 2.0**-kind.mantissa, kind.numbers[1]
    every = reference.back(np.full_like(wanted, 1), scale.numpy(), block, kind) / smallest
    error = np.abs(out.numpy().astype(np.float64) - single)
    allowed = np.maximum(np.abs(single.astype(np.float64)) * step, every * smallest) / 2
    assert (error <= allowed * (1 + 1e-6)).all()


# ------------------------------------------------------------------------------------------- codes


@each_dtype
def test_all_256_codes(dtype: torch.dtype) -> None:
    codes = np.arange(256, dtype=np.uint8)
    wanted = KINDS[dtype].decode_all(codes)
    ours = values(from_codes(codes, dtype)).numpy()
    np.testing.assert_array_equal(ours, wanted)
    np.testing.assert_array_equal(np.signbit(ours), codes >= 128)
    assert KINDS[dtype].largest == {E4M3: 448, E5M2: 57344}[dtype]
    assert KINDS[dtype].numbers[1] == {E4M3: 2**-9, E5M2: 2**-16}[dtype]


@each_dtype
def test_values_of_any_layout(dtype: torch.dtype) -> None:
    q = from_codes(np.arange(256, dtype=np.uint8), dtype).view(4, 8, 8)
    for view in (q, q.transpose(0, 2), q[::2, 1:, ::3], q[1, 2, 3], q[:0], q.expand(2, 4, 8, 8)):
        assert values(view).shape == view.shape
        torch.testing.assert_close(values(view), view.float(), rtol=0, atol=0, equal_nan=True)


@each_dtype
def test_rounding_between_all_neighbours(dtype: torch.dtype) -> None:
    """Midpoints go to the even code, one step of fp32 to either side to the nearer one."""
    numbers = KINDS[dtype].numbers.astype(np.float32)
    low = np.arange(len(numbers) - 1)
    middle = (numbers[:-1] + numbers[1:]) / 2
    pairs = [
        (numbers[:-1], low),
        (np.nextafter(middle, np.float32(0)), low),
        (middle, low + low % 2),
        (np.nextafter(middle, np.float32(MOST)), low + 1),
    ]
    for x, code in pairs:
        row = np.concatenate([x, -x, numbers[-1:]])  # the last one makes the scale 1
        wanted = np.concatenate([code, code + 128, [len(low)]])
        ours, scale = quantize(torch.from_numpy(row)[None], (1, None), dtype)
        assert scale.tolist() == [[1.0]]
        same(ours[0], wanted.astype(np.uint8))


@each_dtype
def test_a_blocks_largest_number_becomes_the_largest_code(dtype: torch.dtype) -> None:
    """Also where the quotient is a bit above it: neither NaN, nor infinite, nor one code less."""
    x = torch.randn(4000, 3) * 10 ** torch.empty(4000, 1).uniform_(-28, 37)
    x[:, 0] = x.abs().amax(dim=1) * torch.rand(4000).sub(0.5).sign()
    codes, scale = quantize(x, (1, None), dtype)
    assert (values(codes).abs().amax(dim=1) == KINDS[dtype].largest).all()
    assert (x[:, 0].abs() / scale[:, 0] > KINDS[dtype].largest).any()


# ------------------------------------------------------------------------------------------- casts


@each_dtype
@each_block
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_casts_of_every_shape(shape: tuple[int, ...], block: Block, dtype: torch.dtype) -> None:
    x = torch.randn(shape) * 3
    x[..., :, -3:] *= 1e4  # outliers
    x[..., :2, : shape[-1] // 2] = 0  # blocks of zeros, and of both zeros
    x[..., 0, 0] = -0.0
    check(x, block, dtype)
    check(x, block, dtype, power_of_two=True)


@each_block
def test_layouts_and_dtypes(block: Block) -> None:
    x = torch.randn(2, 130, 260)
    for view in (x.mT, x[:, ::3, 1::2], x[1], x[0].T, x[:1].expand(3, -1, -1), x.transpose(0, 1)):
        check(view, block)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        check((x[1] * 1e-3).to(dtype), block)
    codes, scale = quantize(x, block)
    for wanted in (torch.float64, torch.bfloat16):
        out = dequantize(codes, scale, block, wanted)
        assert torch.equal(out, dequantize(codes, scale, block).to(wanted))


@pytest.mark.parametrize("seed", range(10))
def test_random_casts(seed: int) -> None:
    """Magnitudes from below the smallest subnormal number to the largest fp32, mixed or alike."""
    draw = np.random.default_rng(seed)
    for _ in range(40):
        shape = (*draw.integers(1, 3, draw.integers(0, 3)), *draw.integers(1, 40, 2))
        block = tuple(None if n == 0 else int(n) for n in draw.integers(0, 12, 2))
        kind = draw.integers(4)
        spread = draw.uniform(-46, 38.5, shape if kind == 0 else ())
        x = (draw.normal(size=shape) * 10.0**spread).clip(-MOST, MOST).astype(np.float32)
        if kind == 1:
            x[draw.random(shape) < 0.5] = 0
        if kind == 2:
            some = draw.choice([MOST, -MOST, 2.0**-149, -(2.0**-149), 2.0**-126], shape)
            x = np.where(draw.random(shape) < 0.2, some.astype(np.float32), x)
        dtype = (E4M3, E5M2)[draw.integers(2)]
        check(torch.from_numpy(x), (block[0], block[1]), dtype, bool(draw.integers(2)))


@pytest.mark.parametrize("power_of_two", [False, True])
@each_dtype
def test_the_ends_of_fp32(dtype: torch.dtype, power_of_two: bool) -> None:
    """Scales that are too small for a quotient, and codes that were rounded up past the end."""
    tiny = 2.0**-149
    for row in ([MOST], [-MOST, 1.0], [MOST, tiny], [tiny], [2.0**-126, -tiny], [0.0, -0.0]):
        check(torch.tensor([row]), (1, 128), dtype, power_of_two)


# --------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@each_dtype
def test_infinite_and_nan_are_refused_by_name(bad: float, dtype: torch.dtype) -> None:
    x = torch.randn(3, 200)
    x[1, 150] = bad
    with pytest.raises(ValueError, match=r"^experts\.3: input has infinite or NaN"):
        quantize(x, dtype=dtype, name="experts.3: input")
    with pytest.raises(ValueError, match="beyond has infinite"):
        quantize(torch.full((2, 2), 1e39, dtype=torch.float64), name="beyond")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": torch.float16}, "dtype is torch.float16; expected one of torch.float8_e4m3fn"),
        ({"block": (0, 128)}, r"block is \(0, 128\); expected two counts, or None"),
        ({"block": (1,)}, r"block is \(1,\); expected two counts"),
        ({"block": (1, 2, 3)}, "expected two counts"),
        ({"block": (1, 2.0)}, "expected two counts"),
        ({"block": (True, 2)}, "expected two counts"),
        ({"x": torch.ones(3, 4).int()}, r"x is \(3, 4\) torch.int32; expected floats of shape"),
        ({"x": torch.ones(4)}, r"x is \(4,\) torch.float32; expected floats of shape \(..., rows"),
        ({"x": torch.ones(0, 4)}, r"x is \(0, 4\) .*expected floats of shape"),
        ({"x": [[1.0]], "name": "input"}, "input is list; expected floats of shape"),
    ],
)
def test_wrong_arguments_of_quantize(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(**{"x": torch.ones(2, 2), **changes})


@pytest.mark.parametrize("shape", [(3, 1), (2, 2), (1, 3, 2), (6,), ()], ids=str)
def test_scales_that_do_not_fit(shape: tuple[int, ...]) -> None:
    codes, _ = quantize(torch.ones(3, 130))
    with pytest.raises(ValueError, match=r"scale has shape .*; expected \(3, 2\) for codes \(3, "):
        dequantize(codes, torch.ones(shape))


# -------------------------------------------------------------------------- the accumulator's bits


@pytest.mark.parametrize("bits", [2, 8, 14, 24])
def test_cut(bits: int) -> None:
    """Towards zero, from subnormal numbers to the largest; in fp64 all that the sum has counts."""
    draw = np.random.default_rng(bits)
    x = draw.normal(size=400) * 2.0 ** draw.integers(-100, 120, 400)
    x[:80] = np.float32(draw.normal(size=80) * 2.0 ** draw.integers(-149, -120, 80))
    x[80:90] = [0, -0.0, 1, -1, 2.0**-149, MOST, -MOST, 255.99, -255.99, 4095.9]
    largest = np.abs(x) * 2.0 ** draw.integers(0, 30, 400)
    for tensor in (torch.from_numpy(x), torch.from_numpy(x[:90].astype(np.float32))):
        rows = [Fraction(v) for v in tensor.tolist()]
        assert cut(tensor, bits).tolist() == [float(reference.cut(v, bits)) for v in rows]
        over = torch.from_numpy(largest[: len(rows)])
        pairs = zip(rows, map(Fraction, over.tolist()), strict=True)
        wanted = [float(np.float32(reference.cut(v, bits, top))) for v, top in pairs]
        assert cut(tensor, bits, over).tolist() == wanted


def operands(kind: str, inner: int) -> tuple[Tensor, Tensor]:
    """Any E4M3 codes; or whole numbers whose sums of 32 products are exact in fp32."""
    if kind == "codes":
        drawn = np.random.default_rng(inner).integers(0, 256, 6 * inner)
        codes = np.where(drawn % 128 == 127, 0, drawn)
        return from_codes(codes[: 3 * inner]).view(3, -1), from_codes(codes[3 * inner :]).view(
            -1, 3
        )
    most = 15 if kind == "small" else 300
    a, b = (torch.randint(-most, most + 1, s).float() for s in ((3, inner), (inner, 3)))
    return (a.to(E4M3), b.to(E4M3)) if kind == "small" else (a, b)


@pytest.mark.parametrize("bits", [8, 14, 20, 24])
@pytest.mark.parametrize("every", [None, 32, 64, 128, 40])
def test_narrow_sums(bits: int, every: int | None) -> None:
    for kind, inner in product(("codes", "small", "whole"), (1, 70, 300)):
        a, b = operands(kind, inner)
        arrays = values(a).numpy(), values(b).numpy()
        for align in (True, False)[: 1 if kind == "codes" else 2]:
            wanted = reference.narrow_matmul(*arrays, bits, every, align)
            same(matmul(a, b, bits, every, align=align), wanted)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("align", [True, False])
def test_narrow_sums_by_hand(align: bool, sign: int) -> None:
    """With 8 bits, what follows 2^14 counts in steps of 128: 32 ones are less, 128 are a step."""
    ones = torch.ones(256, 1)
    a = ones.T.clone() * sign
    a[0, 0] *= 2**14
    lost = [(None, 0), (128, 128), (64, 3 * 64), (32, 7 * 32)]
    for every, kept in lost:
        assert matmul(a, ones, 8, every, align=align).item() == sign * (2**14 + kept)
    assert matmul(a, ones).item() == sign * (2**14 + 255)
    a[0, 32] *= -(2**14)  # of the first ones nothing is left, of the next 31 only if not aligned
    assert matmul(a[:, :64], ones[:64], 8, align=align).item() == (0 if align else sign * 31)
    for x, wanted in ((257, 256), (511, 510), (255, 255)):  # towards zero
        row = torch.tensor([[float(sign * x)]])
        assert matmul(row, ones[:1], 8, align=align).item() == sign * wanted
    assert matmul(0 * a, ones, 8, 32, align=align).tolist() == [[0.0]]


@pytest.mark.parametrize("every", [32, 64, 128])
def test_scales_of_narrow_sums(every: int) -> None:
    a, b = operands("codes", 300)
    scale_a, scale_b = torch.rand(3, 3), torch.rand(3, 3)
    arrays, scales = ([x.numpy() for x in pair] for pair in ((values(a), values(b)),
                                                             (scale_a, scale_b)))  # fmt: skip
    wanted = reference.narrow_matmul(arrays[0], arrays[1], 14, every, True, *scales)
    same(matmul(a, b, 14, every, scale_a, scale_b), wanted)


@pytest.mark.parametrize("seed", range(5))
def test_what_promotion_is_for(seed: int) -> None:
    """Report 3.3.2: about 2 % at K = 4096 with 14 bits, largest error over root mean square."""
    torch.manual_seed(seed)
    (a, scale_a), (b, scale_b) = (quantize(torch.randn(32, 4096), (None, None)) for _ in range(2))
    scales = {"scale_a": scale_a, "scale_b": scale_b}
    exact = (values(a).double() @ values(b).double().T) * scale_a.double() * scale_b.double()
    for align in (True, False):
        errors = [
            float((matmul(a, b.T, 14, every, align=align, **scales) - exact).abs().max())
            for every in (None, 128)
        ]
        assert 0.005 < errors[0] / exact.square().mean().sqrt() < 0.03
        assert errors[1] < errors[0] / 5
