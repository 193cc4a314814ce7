"""FP8 numbers: eight-bit floats with a scale for each small block, and how products are added.

Why blocks: E4M3 has four exponent bits, so a tensor's largest number pushes small ones below the
smallest code. A scale of its own for every 1x128 tile of activations and every 128x128 block of
weights confines an outlier to its block (report 3.3.2). Scales come from the block's own largest
number, at every call: nothing is remembered from earlier steps.

Why promotion: the report's tensor cores add with about 14 bits. Every 128 products the partial sum
moves to an fp32 register, where the scales are multiplied anyway (report 3.3.2).

The machine modelled by ``accumulate_bits`` (14: a leading one and 13 fraction bits, as in FP22;
Insights paper 3.1.1): 32 products at a time are aligned to the largest of them and cut off, summed
exactly, added to the accumulator, and the sum is cut off, too. Both papers leave details open.

On a Hopper card fp8 operands go to torch's own block-scaled product, which has not yet been run;
elsewhere the same is emulated in fp32. ``backend`` decides.

Legend: M, N rows and columns of a product, K the dimension summed over, k a piece of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
NAMES = {E4M3: "E4M3", E5M2: "E5M2"}

Block = tuple[int | None, int | None]
"""Rows and columns that share a scale; None takes all."""
SIDE = 128
TILE: Block = (1, SIDE)
SQUARE: Block = (SIDE, SIDE)
TENSOR: Block = (None, None)
ALIGNED = 32
"""Products that a tensor core aligns and adds at once (Insights paper 3.1.1)."""


def quantize(
    x: Tensor, block: Block = TILE, dtype: torch.dtype = E4M3, power_of_two: bool = False,
    name: str = "x",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """FP8 codes, shaped like x (..., R, C), and the fp32 scale of each block: x is code x scale.

    A block's largest number becomes the largest code (448, or 57,344 in E5M2); blocks at the edge
    may be smaller. ``power_of_two`` rounds scales up to one, so that scaling is exact. Raises
    ValueError for infinities and NaN, naming ``name``. Source: report 3.3.2.
    """
    if dtype not in LARGEST:
        raise ValueError(f"dtype is {dtype}; expected one of {', '.join(map(str, LARGEST))}")
    blocks = _split(x, block, name)
    largest = blocks.abs().amax(dim=(-3, -1), keepdim=True)
    require_finite(largest, name)
    # Below the smallest normal number a quotient would overflow; an empty block needs any scale.
    scale = (largest / LARGEST[dtype]).clamp(min=torch.finfo(torch.float32).tiny)
    if power_of_two:
        fraction, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.ones_like(scale), exponent - (fraction == 0.5).int())
    # Explicitly: casts beyond the largest code differ between releases and formats.
    codes = (blocks / scale).clamp(-LARGEST[dtype], LARGEST[dtype])
    return _join(codes, x.shape).to(dtype), scale.squeeze(-3).squeeze(-1)


def require_finite(x: Tensor, name: str) -> None:
    """Raises ValueError, naming ``name``, if anything in x is infinite or NaN."""
    if not bool(x.isfinite().all()):
        raise ValueError(
            f"{name} has infinite or NaN values, which no scale can hold; look for the step that "
            "made them (a learning rate too high, a division by zero)"
        )


def dequantize(
    q: Tensor, scale: Tensor, block: Block = TILE, dtype: torch.dtype = torch.float32
) -> Tensor:
    """code x scale, shaped like q (..., R, C). Raises ValueError if the scales do not fit."""
    blocks = _split(q, block, "q")
    expected = (*blocks.shape[:-3], blocks.shape[-2])
    if scale.shape != expected:
        raise ValueError(
            f"scale has shape {tuple(scale.shape)}; expected {tuple(expected)} for codes "
            f"{tuple(q.shape)} in blocks of {block}"
        )
    # A scale that was rounded up can carry a rounded-up code past the end of fp32.
    limit = torch.finfo(torch.float32).max
    wide = (blocks * scale[..., :, None, :, None]).clamp(-limit, limit)
    return _join(wide, q.shape).to(dtype)


_VALUES = torch.arange(256, dtype=torch.uint8).view(E4M3).float()


def values(q: Tensor) -> Tensor:
    """Codes of any shape as the fp32 numbers they stand for."""
    if q.dtype != E4M3 or q.device.type != "cpu":
        return q.float()
    # Four times as fast as the cast, which a CPU does one number at a time.
    codes = q.reshape(-1).view(torch.uint8).int()
    return _VALUES.index_select(0, codes).view(q.shape)


def _split(x: Tensor, block: Block, name: str) -> Tensor:
    """(..., R, C) in fp32 as (..., R / r, r, C / c, c), padded with zeros at the edges."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2 or not x.numel():
        what = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} is {what}; expected floats of shape (..., rows, columns)")
    pair = isinstance(block, tuple) and len(block) == 2
    if not pair or any(n is not None and (type(n) is not int or n < 1) for n in block):
        raise ValueError(f"block is {block!r}; expected two counts, or None for all, as (1, 128)")
    sizes = x.shape[-2:]
    r, c = (size if n is None else min(n, size) for n, size in zip(block, sizes, strict=True))
    wide = values(x).contiguous()
    if sizes[0] % r or sizes[1] % c:
        wide = F.pad(wide, (0, -sizes[1] % c, 0, -sizes[0] % r))
    return wide.unflatten(-1, (-1, c)).unflatten(-3, (-1, r))


def _join(blocks: Tensor, shape: torch.Size) -> Tensor:
    return blocks.flatten(-2).flatten(-3, -2)[..., : shape[-2], : shape[-1]]


def matmul(
    a: Tensor, b: Tensor, accumulate_bits: int | None = None, promote_every: int | None = None,
    scale_a: Tensor | None = None, scale_b: Tensor | None = None, align: bool = True,
) -> Tensor:  # fmt: skip
    """a (M, K) @ b (K, N) in fp32, or as a narrow accumulator would add it.

    ``accumulate_bits``: significant bits that the accumulator keeps (see above); None is fp32.
    ``promote_every``: products after which the partial sum is scaled and added in fp32; None never.
    Scales are per row (or 128 rows) of a, per column (or 128) of b, and per 128 of K or all of it.
    ``align=False`` adds each 32 products exactly: as fast as fp32, but kinder than the hardware.
    Raises ValueError. Source: report 3.3.2, Fig 7.
    """
    _check(a, b, accumulate_bits, promote_every)
    if accumulate_bits is None and backend(a, b, scale_a, scale_b) == "scaled_mm":
        return _scaled_mm(a, b, scale_a, scale_b)  # type: ignore[arg-type]
    (rows, inner), columns = a.shape, b.shape[1]
    a, b = values(a), values(b)
    one = a.new_ones(1, 1)
    rows_scale = _spread(one if scale_a is None else scale_a, rows, inner, "scale_a")
    columns_scale = _spread(one if scale_b is None else scale_b.T, columns, inner, "scale_b").T
    many = max(rows_scale.shape[1], columns_scale.shape[0]) > 1
    if many and promote_every is None and accumulate_bits is None:
        promote_every = SIDE
    if many and (promote_every is None or SIDE % promote_every):
        raise ValueError(
            f"promote_every is {promote_every!r}, but scales change every {SIDE} products and can "
            f"only be applied to a promoted sum; expected a divisor of {SIDE}"
        )
    step = promote_every or inner
    total = a.new_zeros(rows, columns)
    for start in range(0, inner, step):
        piece = slice(start, start + step)
        part = _add_up(a[:, piece], b[piece], accumulate_bits, align)
        at = start // SIDE
        scale_M1 = rows_scale[:, min(at, rows_scale.shape[1] - 1), None]
        total += part * scale_M1 * columns_scale[min(at, columns_scale.shape[0] - 1)]
    return total


def _check(a: Tensor, b: Tensor, bits: int | None, every: int | None) -> None:
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(
            f"cannot multiply {tuple(a.shape)} by {tuple(b.shape)}; expected (M, K) and (K, N)"
        )
    if bits is not None and (type(bits) is not int or not 2 <= bits <= 24):
        raise ValueError(f"accumulate_bits is {bits!r}; expected 2 to 24, or None for fp32")
    if every is not None and (type(every) is not int or every < 1):
        raise ValueError(f"promote_every is {every!r}; expected 1 or more, or None for never")


def _spread(scale: Tensor, rows: int, inner: int, name: str) -> Tensor:
    """(rows or blocks of them, blocks of K or 1) as (rows, blocks of K or 1)."""
    blocks = -(-inner // SIDE)
    if scale.dim() != 2 or scale.shape[0] not in (1, rows, -(-rows // SIDE)) or (
        scale.shape[1] not in (1, blocks)
    ):  # fmt: skip
        raise ValueError(
            f"{name} has shape {tuple(scale.shape)}; expected a scale for each of {rows} or for "
            f"each {SIDE} of them, and 1 or {blocks} along K = {inner}"
        )
    if scale.shape[0] in (1, rows):
        return scale.expand(rows, -1)
    return scale.repeat_interleave(SIDE, dim=0)[:rows]


def _add_up(a_MK: Tensor, b_KN: Tensor, bits: int | None, align: bool) -> Tensor:
    if bits is None:
        return a_MK @ b_KN
    total_MN = a_MK.new_zeros(a_MK.shape[0], b_KN.shape[1])
    for a_Mk, b_kN in zip(a_MK.split(ALIGNED, 1), b_KN.split(ALIGNED), strict=True):
        if align:
            products_MkN = a_Mk[:, :, None] * b_kN
            largest_M1N = products_MkN.abs().amax(dim=1, keepdim=True)
            sum_MN = cut(products_MkN, bits, largest_M1N).sum(dim=1, dtype=torch.float64)
        else:
            sum_MN = a_Mk @ b_kN
        total_MN = cut(total_MN.double() + sum_MN, bits)
    return total_MN


def cut(x: Tensor, bits: int, largest: Tensor | None = None) -> Tensor:
    """x without the bits that lie ``bits`` or more below the leading one of ``largest`` (or x).

    Towards zero, as dropped bits are; fp32 or fp64 in, fp32 out.
    """
    exponent = torch.frexp(x if largest is None else largest).exponent
    # In double: the step of a number near the smallest one would be zero in fp32.
    step = torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent - bits)
    return (torch.trunc(x.double() / step) * step).float()


def backend(a: Tensor, b: Tensor, scale_a: Tensor | None, scale_b: Tensor | None) -> str:
    """'scaled_mm' where torch multiplies these operands on the card itself, else 'emulated'."""
    if a.dtype != E4M3 or b.dtype != E4M3 or scale_a is None or scale_b is None or not a.is_cuda:
        return "emulated"
    hopper = torch.cuda.get_device_capability(a.device) == (9, 0)
    even = all(size % SIDE == 0 for size in (a.shape[1], b.shape[1]))
    fine = scale_a.shape == (a.shape[0], a.shape[1] // SIDE)
    blocks = a.shape[1] // SIDE
    fits = scale_b.shape in ((blocks, b.shape[1]), (blocks, b.shape[1] // SIDE))
    known = hasattr(F, "scaled_mm")  # older releases of torch lack it
    return "scaled_mm" if known and hopper and even and fine and fits else "emulated"


def _scaled_mm(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor) -> Tensor:
    # Not yet run on a GPU; shapes and strides are checked on the meta device by a test.
    kinds = F.ScalingType
    if scale_b.shape[1] == b.shape[1]:
        recipe_b, layout_b = kinds.BlockWise1x128, scale_b.contiguous().T
    else:
        padded = F.pad(scale_b.T, (0, -scale_b.shape[0] % 4))
        recipe_b, layout_b = kinds.BlockWise128x128, padded.contiguous().T
    # Not contiguous(): with a single row it would leave strides that torch refuses.
    layout_a = scale_a.T.clone(memory_format=torch.contiguous_format).T
    out: Tensor = F.scaled_mm(
        a.contiguous(), b.T.contiguous().T, layout_a, kinds.BlockWise1x128,
        layout_b, recipe_b, output_dtype=torch.float32,
    )  # fmt: skip
    return out
