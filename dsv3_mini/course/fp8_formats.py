"""Which formats a model's matrices are multiplied in, read off the model itself.

Why: "trained in FP8" leaves out what was not cast. A list of every parameter says it all: how it is
stored, and how the operands of its three products (output, input's and weight's gradient) are cast.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from dsv3_mini.fp8 import NAMES, Block, Fp8Linear, Recipe


class Format(NamedTuple):
    """How one matrix of a model takes part in its three products."""

    name: str
    stored: str
    input: str
    weight: str
    gradient: str


def formats(model: nn.Module) -> list[Format]:
    """Of every parameter, in the model's order: its dtype, and the formats of its products.

    A parameter that takes part in no cast product has its own dtype everywhere.
    """
    recipes: dict[str, Recipe] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        hook = getattr(module, "linear", None)
        if isinstance(module, Fp8Linear):
            recipes[name] = module.recipe
        elif isinstance(hook, partial):
            recipes[name] = hook.keywords["recipe"]
    rows = []
    for name, parameter in model.named_parameters():
        own = str(parameter.dtype).removeprefix("torch.")
        recipe = recipes.get(name.rpartition(".")[0])
        if recipe is None:
            rows.append(Format(name, own, own, own, own))
            continue
        cast = [
            (recipe.forward, recipe.input_block),
            (recipe.forward, recipe.weight_block),
            (recipe.gradient, recipe.gradient_block),
        ]
        rows.append(Format(name, own, *(_describe(*each) for each in cast)))
    return rows


def _describe(dtype: torch.dtype, block: Block) -> str:
    if dtype not in NAMES:
        return str(dtype).removeprefix("torch.")
    return f"{NAMES[dtype]} {'x'.join('all' if n is None else str(n) for n in block)}"
