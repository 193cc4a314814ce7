"""FP8 and its sums from their definitions: numpy, and Python's exact fractions. No torch.

Formats: "FP8 Formats for Deep Learning" (Micikevicius et al. 2022), Table 1. A number is found by
looking for its neighbours among all numbers that the format has.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

Single = npt.NDArray[np.float32]
Double = npt.NDArray[np.float64]
Codes = npt.NDArray[np.uint8]
Block = tuple[int | None, int | None]

SMALLEST_NORMAL = np.float32(2.0**-126)


@dataclass(frozen=True)
class Format:
    """One sign bit, then exponent and mantissa. ``finite`` counts the positive finite codes."""

    mantissa: int
    bias: int
    finite: int

    def decode(self, code: int) -> float:
        """The number that one of 256 codes stands for."""
        sign = -1.0 if code >= 128 else 1.0
        code %= 128
        if code >= self.finite:  # E5M2 has an infinity, E4M3 has not
            return sign * np.inf if self == E5M2 and code == self.finite else np.nan
        exponent, fraction = divmod(code, 2**self.mantissa)
        if exponent == 0:
            return sign * fraction * 2.0 ** (1 - self.bias - self.mantissa)
        return sign * (1 + fraction / 2**self.mantissa) * 2.0 ** (exponent - self.bias)

    @property
    def numbers(self) -> Double:
        """The finite numbers from zero on, so that a number's place is its code."""
        return np.array([self.decode(code) for code in range(self.finite)])

    @property
    def largest(self) -> float:
        return self.decode(self.finite - 1)

    def encode(self, x: npt.ArrayLike) -> Codes:
        """The nearest code, the even one of two as near; the last one for all that is beyond."""
        wide = np.asarray(x, dtype=np.float64)
        numbers, size = self.numbers, np.abs(wide)
        above = np.searchsorted(numbers, size).clip(1, self.finite - 1)
        middle = (numbers[above - 1] + numbers[above]) / 2
        up = (size > middle) | ((size == middle) & (above % 2 == 0))
        codes = np.where(up, above, above - 1) + np.where(np.signbit(wide), 128, 0)
        return codes.astype(np.uint8)

    def decode_all(self, codes: Codes) -> Single:
        return np.array([self.decode(code) for code in range(256)], dtype=np.float32)[codes]


E4M3 = Format(mantissa=3, bias=7, finite=127)
E5M2 = Format(mantissa=2, bias=15, finite=124)


# ----------------------------------------------------------------------------- a scale for a block


def tiles(shape: tuple[int, ...], block: Block) -> list[tuple[int, int, slice, slice]]:
    """Of every block: its place among the scales, and the rows and columns that it has."""
    rows, columns = shape[-2:]
    r, c = block[0] or rows, block[1] or columns
    places = [(i, j) for i in range(-(-rows // r)) for j in range(-(-columns // c))]
    return [(i, j, slice(i * r, (i + 1) * r), slice(j * c, (j + 1) * c)) for i, j in places]


def cast(
    x: npt.ArrayLike, block: Block, kind: Format = E4M3, power_of_two: bool = False
) -> tuple[Codes, Single]:
    """Codes, shaped like x (..., R, C), and the scales of its blocks, in float32 arithmetic."""
    single = np.asarray(x).astype(np.float32)
    every = tiles(single.shape, block)
    codes = np.zeros(single.shape, dtype=np.uint8)
    scales = np.zeros((*single.shape[:-2], every[-1][0] + 1, every[-1][1] + 1), dtype=np.float32)
    powers = 2.0 ** np.arange(-126, 128)
    for i, j, rows, columns in every:
        part = single[..., rows, columns]
        scale = np.abs(part).max(axis=(-2, -1)) / np.float32(kind.largest)
        scale = np.maximum(scale, SMALLEST_NORMAL)
        if power_of_two:
            scale = powers[np.searchsorted(powers, scale)].astype(np.float32)
        codes[..., rows, columns] = kind.encode(part / scale[..., None, None])
        scales[..., i, j] = scale
    return codes, scales


def back(codes: Codes, scales: Single, block: Block, kind: Format = E4M3) -> Single:
    """Code times scale, in float32; a product beyond the largest float32 stays at it."""
    out = kind.decode_all(codes)
    for i, j, rows, columns in tiles(codes.shape, block):
        wide = out[..., rows, columns].astype(np.float64) * scales[..., i, j][..., None, None]
        limit = float(np.finfo(np.float32).max)
        out[..., rows, columns] = wide.clip(-limit, limit)
    return out


def there_and_back(x: npt.ArrayLike, block: Block, kind: Format = E4M3) -> Single:
    return back(*cast(x, block, kind), block, kind)


def linear(
    x: Single, weight: Single, g: Single, kind: Format = E4M3, gradient_kind: Format = E4M3
) -> tuple[Double, Double, Double]:
    """y, dx and dW of a layer on tokens x (T, I), weight (O, I), gradient g (T, O): loops, float64.

    Each product has its operands' tiles along the dimension that it sums over.
    """
    (tokens, inputs), outputs = x.shape, weight.shape[0]
    x_cast = there_and_back(x, (1, 128), kind)
    w_cast = there_and_back(weight, (128, 128), kind)
    g_cast = there_and_back(g, (1, 128), gradient_kind)
    x_again = there_and_back(x_cast, (128, 1), kind)  # cast a second time, along the tokens
    g_along = there_and_back(g, (128, 1), gradient_kind)
    y, dx, dw = np.zeros((tokens, outputs)), np.zeros((tokens, inputs)), np.zeros(weight.shape)
    for t in range(tokens):
        for o in range(outputs):
            y[t, o] = np.sum(x_cast[t].astype(np.float64) * w_cast[o])
            dx[t] += np.float64(g_cast[t, o]) * w_cast[o]
            dw[o] += np.float64(g_along[t, o]) * x_again[t]
    return y, dx, dw


# --------------------------------------------------------------------------- a narrow accumulator


def leading(number: Fraction) -> int:
    """The power of two of the leading one; the denominator is a power of two."""
    return abs(number.numerator).bit_length() - number.denominator.bit_length()


def cut(number: Fraction, bits: int, largest: Fraction | None = None) -> Fraction:
    """Only ``bits`` bits from the leading one of ``largest`` (or the number) on, towards zero."""
    if not number:
        return number
    step = Fraction(2) ** (leading(largest or number) - bits + 1)
    return int(number / step) * step


def narrow_sum(products: list[Fraction], bits: int, align: bool) -> Fraction:
    """32 at a time: aligned to the largest and cut, added exactly to the sum, which is cut."""
    total = Fraction(0)
    for start in range(0, len(products), 32):
        group = products[start : start + 32]
        if align:
            largest = max(group, key=abs)
            group = [cut(product, bits, largest) for product in group]
        total = cut(total + sum(group), bits)
    return total


def narrow_matmul(
    a: Single, b: Single, bits: int, every: int | None, align: bool,
    scale_a: Single | None = None, scale_b: Single | None = None,
) -> Single:  # fmt: skip
    """a (M, K) @ b (K, N); scale_a is (M, K / 128) and scale_b (K / 128, N)."""
    (rows, inner), columns = a.shape, b.shape[1]
    step = every or inner
    out = np.zeros((rows, columns), dtype=np.float32)
    for m in range(rows):
        for n in range(columns):
            pairs = zip(a[m].tolist(), b[:, n].tolist(), strict=True)
            products = [Fraction(x) * Fraction(y) for x, y in pairs]
            for start in range(0, inner, step):
                part = np.float32(narrow_sum(products[start : start + step], bits, align))
                if scale_a is not None and scale_b is not None:
                    part = part * scale_a[m, start // 128] * scale_b[start // 128, n]
                out[m, n] += part
    return out
