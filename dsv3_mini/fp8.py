"""FP8 training: linear layers whose three products are made of eight-bit operands.

Why so few: matrix products are nearly all of the work, and errors in them average out; a router's
choice, a norm's divisor or the head's softmax would pass an error on. So (report 3.3, Fig 6)

| product          | operands                               | shares a scale                     |
|------------------|----------------------------------------|------------------------------------|
| y = x W^T        | input, weight                          | 1x128 along I; 128x128             |
| dx = g W         | gradient of the output, the same codes | 1x128 along O; 128x128             |
| dW = g^T x       | gradient, input                        | both 1x128 along T (128x1 as kept) |

all in E4M3, while embedding, head, router, norms and attention itself stay as they were. Weights
stay fp32 and are cast when used; the input is kept for the backward pass as codes, and re-tiled
there. It is put into a finished model from outside: no layer knows of it.

Legend: T tokens, I input width, O output width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_mini.fp8_numbers import (  # isort: skip
    E4M3, E5M2, LARGEST, NAMES, SQUARE, TENSOR, TILE, Block, backend, dequantize, matmul,
    quantize, require_finite, values,
)  # fmt: skip

__all__ = [
    "E4M3", "E5M2", "KEPT", "LARGEST", "NAMES", "SQUARE", "TENSOR", "TILE", "Block",
    "Fp8Linear", "Recipe", "backend", "convert_to_fp8", "dequantize", "linear", "matmul",
    "quantize", "values",
]  # fmt: skip

KEPT = ("lm_head", "eh_proj", "gate")
"""Last names of the parts that stay in high precision; norms and embeddings always do."""


@dataclass(frozen=True)
class Recipe:
    """What is cast to what. The defaults are V3's, except that sums are fp32 (report 3.3.2)."""

    forward: torch.dtype = E4M3
    """Of inputs and weights; bfloat16 rounds without a scale."""
    gradient: torch.dtype = E4M3
    """Of the gradients of outputs."""
    input_block: Block = TILE
    weight_block: Block = SQUARE
    gradient_block: Block = TILE
    power_of_two: bool = False
    scaled: bool = True
    """False casts as it is, which loses whatever is small: an example not to follow."""
    accumulate_bits: int | None = None
    """14 is the report's hardware, with ``promote_every`` its remedy; see ``matmul``."""
    promote_every: int | None = None
    align: bool = False


def _cast(x: Tensor, block: Block, dtype: torch.dtype, recipe: Recipe, name: str) -> Any:
    if dtype in LARGEST and recipe.scaled:
        return quantize(x, block, dtype, recipe.power_of_two, name)
    require_finite(x, name)
    largest = LARGEST.get(dtype, torch.finfo(dtype).max)
    return x.clamp(-largest, largest).to(dtype), x.new_ones(1, 1, dtype=torch.float32)


def _back(q: Tensor, scale: Tensor, block: Block, recipe: Recipe) -> Tensor:
    scaled = q.dtype in LARGEST and recipe.scaled
    return dequantize(q, scale, block) if scaled else values(q)


class _Product(torch.autograd.Function):
    """x (T, I) and weight (O, I) to y (T, O); the backward pass makes the other two products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, recipe: Recipe, name: str) -> Tensor:
        x_q, x_scale = _cast(x, recipe.input_block, recipe.forward, recipe, f"{name}: input")
        w_q, w_scale = _cast(weight, recipe.weight_block, recipe.forward, recipe, f"{name}: weight")
        ctx.save_for_backward(x_q, x_scale, w_q, w_scale)
        ctx.recipe, ctx.name = recipe, name
        return _multiply(recipe, x_q, w_q.T, x_scale, w_scale.T).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (g,) = gradients
        recipe, name = ctx.recipe, f"{ctx.name}: gradient of the output"
        x_q, x_scale, w_q, w_scale = ctx.saved_tensors
        g_q, g_scale = _cast(g, recipe.gradient_block, recipe.gradient, recipe, name)
        dx = _multiply(recipe, g_q, w_q, g_scale, w_scale)
        # Summed over tokens: tiles must lie along them, so both operands are cast anew.
        gt_q, gt_scale = _cast(g.T, recipe.gradient_block, recipe.gradient, recipe, name)
        x_back = _back(x_q, x_scale, recipe.input_block, recipe)
        xt_q, xt_scale = _cast(
            x_back.T, recipe.input_block, recipe.forward, recipe, f"{ctx.name}: input"
        )
        dw = _multiply(recipe, gt_q, xt_q.T, gt_scale, xt_scale.T)
        return dx.to(g.dtype), dw, None, None


def _multiply(recipe: Recipe, a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor) -> Tensor:
    sums = (recipe.accumulate_bits, recipe.promote_every)
    return matmul(a, b, *sums, scale_a, scale_b, recipe.align)


def linear(x: Tensor, weight: Tensor, recipe: Recipe = Recipe(), name: str = "linear") -> Tensor:
    """x (..., I) times weight (O, I) transposed, (..., O), all three products cast as ``recipe``.

    Raises ValueError for infinite or NaN operands, naming the tensor. Source: report 3.3, Fig 6.
    """
    if not x.numel():  # an expert that no token chose: there is nothing to cast
        return F.linear(x, weight)
    out: Tensor = _Product.apply(x.reshape(-1, x.shape[-1]), weight, recipe, name)  # type: ignore[no-untyped-call]
    return out.view(*x.shape[:-1], -1)


class Fp8Linear(nn.Linear):
    """An ``nn.Linear`` without bias, whose weight stays as it is and is cast when it is used."""

    recipe: Recipe
    name: str

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return linear(input, self.weight, self.recipe, self.name)


def convert_to_fp8(
    model: nn.Module, recipe: Recipe = Recipe(), keep: Iterable[str] = KEPT
) -> list[str]:
    """Change the linear layers, experts and routers of ``model`` in place; gives their names.

    Parameters, their names and what else shares them stay. Modules whose last name is in ``keep``
    are left alone; ``keep=()`` casts head and router, too. Raises ValueError.
    """
    keep = set(keep)
    found = {name: module for name, module in model.named_modules() if _has_product(module)}
    missing = keep - set(KEPT) - {name.rpartition(".")[2] for name in found}
    if missing:
        raise ValueError(f"nothing to keep is called {', '.join(sorted(missing))}; names are the "
                         "last parts of module names, as 'kv_b_proj' or 'experts'")  # fmt: skip
    chosen = {name: m for name, m in found.items() if name.rpartition(".")[2] not in keep}
    if not chosen:
        raise ValueError(
            "no linear layer to convert: is this a whole model, and keep not too long?"
        )
    for name, module in chosen.items():  # all of them before the first is changed
        if getattr(module, "bias", None) is not None:
            raise ValueError(f"{name} has a bias; only layers without one can be converted")
    for name, module in chosen.items():
        if isinstance(module, nn.Linear):
            module.__class__ = Fp8Linear  # the same object: what is shared stays shared
            module.recipe, module.name = recipe, name  # type: ignore[assignment]
        else:
            module.linear = partial(linear, recipe=recipe, name=name)
    return list(chosen)


def _has_product(module: nn.Module) -> bool:
    """An ``nn.Linear``, or a module that multiplies by its ``linear`` (experts, router)."""
    return isinstance(module, nn.Linear) or callable(getattr(module, "linear", None))
