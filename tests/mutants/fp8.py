"""Mistakes 23 to 25: numbers of eight bits, their scales, and their sums."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

NUMBERS = ("tests/test_fp8_numbers.py",)
FP8 = ("tests/test_fp8.py",)
SCALE = "scale = (largest / LARGEST[dtype]).clamp(min=torch.finfo(torch.float32).tiny)"

MUTANTS = [
    # --------------------------------------------------------------------- 23 rounding
    Mutant(
        23, "rounding to integers", "fp8_numbers.py",
        "return _join(codes, x.shape).to(dtype), scale",
        "return _join(codes, x.shape).round().to(dtype), scale",
        NUMBERS,
    ),
    Mutant(
        23, "FP16 under the name of E4M3", "fp8.py",
        "return quantize(x, block, dtype, recipe.power_of_two, name)",
        "return x.half(), x.new_ones(1, 1, dtype=torch.float32)",
        FP8,
    ),
    Mutant(
        23, "rounding down", "fp8_numbers.py",
        "codes = (blocks / scale).clamp(-LARGEST[dtype], LARGEST[dtype])",
        "codes = (blocks / scale * 0.97).clamp(-LARGEST[dtype], LARGEST[dtype])",
        NUMBERS,
    ),
    Mutant(
        23, "no saturation: numbers past 448 become NaN", "fp8.py",
        "return x.clamp(-largest, largest).to(dtype), x.new_ones",
        "return x.to(dtype), x.new_ones",
        FP8,
    ),
    Mutant(
        23, "the largest code is taken for 512, which is NaN", "fp8_numbers.py",
        "E4M3: 448.0",
        "E4M3: 512.0",
        NUMBERS,
    ),
    Mutant(
        23, "the largest code is taken for 240", "fp8_numbers.py",
        "E4M3: 448.0",
        "E4M3: 240.0",
        NUMBERS,
    ),
    Mutant(
        23, "a block of zeros becomes NaN", "fp8_numbers.py",
        SCALE,
        "scale = largest / LARGEST[dtype]",
        NUMBERS,
    ),
    # --------------------------------------------------------------------- 24 blocks
    Mutant(
        24, "one scale for the tensor where tiles are claimed", "fp8_numbers.py",
        "    wide = values(x).contiguous()\n",
        "    r, c = sizes\n    wide = values(x).contiguous()\n",
        NUMBERS,
    ),
    Mutant(
        24, "tiles are one to a tensor by name, too", "fp8_numbers.py",
        "TILE: Block = (1, SIDE)",
        "TILE: Block = (None, None)",
        FP8,
    ),
    Mutant(
        24, "every block gets the mean of all scales", "fp8_numbers.py",
        SCALE,
        SCALE + "\n    scale = scale.mean().expand_as(scale)",
        NUMBERS,
    ),
    Mutant(
        24, "blocks run along the other side", "fp8_numbers.py",
        "TILE: Block = (1, SIDE)",
        "TILE: Block = (SIDE, 1)",
        FP8,
    ),
    Mutant(
        24, "a ragged edge is cut off", "fp8_numbers.py",
        "wide = F.pad(wide, (0, -sizes[1] % c, 0, -sizes[0] % r))",
        "wide = wide[..., : sizes[0] // r * r, : sizes[1] // c * c]",
        NUMBERS,
    ),
    Mutant(
        24, "a ragged edge is not padded and crashes", "fp8_numbers.py",
        "wide = F.pad(wide, (0, -sizes[1] % c, 0, -sizes[0] % r))",
        "pass",
        NUMBERS,
        crash="RuntimeError",
    ),
    Mutant(
        24, "a ragged block has no scale in the checkpoint", "checkpoint.py",
        "return tuple(ceil(size / SIDE) for size in shape)",
        "return tuple(max(size // SIDE, 1) for size in shape)",
        ("tests/test_fp8_checkpoint.py",),
    ),
    Mutant(
        24, "products use the first scale along K for all of it", "fp8_numbers.py",
        "at = start // SIDE",
        "at = 0",
        FP8,
    ),
    Mutant(
        24, "the gradient of the weight keeps tiles along the inputs", "fp8.py",
        "x_back.T, recipe.input_block, recipe.forward",
        "x_back.T, recipe.input_block[::-1], recipe.forward",
        FP8,
    ),
    # --------------------------------------------------------------------- 25 accumulation
    Mutant(
        25, "sums are fp32 whatever was asked for", "fp8_numbers.py",
        "    if bits is None:\n",
        "    if True:\n",
        NUMBERS,
    ),
    Mutant(
        25, "partial sums are never promoted", "fp8_numbers.py",
        "step = promote_every or inner",
        "step = inner",
        NUMBERS,
    ),
    Mutant(
        25, "the accumulator is cut after the last product only", "fp8_numbers.py",
        "        total_MN = cut(total_MN.double() + sum_MN, bits)\n    return total_MN\n",
        "        total_MN = total_MN.double() + sum_MN\n    return cut(total_MN, bits)\n",
        NUMBERS,
    ),
    Mutant(
        25, "dropped bits are rounded", "fp8_numbers.py",
        "torch.trunc(x.double() / step)",
        "torch.round(x.double() / step)",
        NUMBERS,
    ),
    Mutant(
        25, "a recipe's narrow sums do not reach the products", "fp8.py",
        "sums = (recipe.accumulate_bits, recipe.promote_every)",
        "sums = (None, None)",
        FP8,
    ),
]  # fmt: skip
