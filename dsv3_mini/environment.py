"""The one place that reads environment variables: ``DSV3_SCALE`` and ``DSV3_DEVICE``.

Why: a notebook runs unchanged on a laptop, on one card, and at V3's full width. The reader sets
two variables before starting Jupyter, and every notebook asks here: which config, which device,
and a part of that config on that device.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from dsv3_mini.config import ConfigError, ModelConfig

M = TypeVar("M", bound=nn.Module)


def scale() -> tuple[str, ModelConfig]:
    """``DSV3_SCALE`` and its preset: mini (default), gpu, or full (V3). Raises ConfigError."""
    name = os.environ.get("DSV3_SCALE", "mini")
    presets = {"mini": ModelConfig.mini, "gpu": ModelConfig.gpu, "full": ModelConfig.v3}
    if name not in presets:
        raise ConfigError(f"DSV3_SCALE is {name!r}; expected one of {', '.join(presets)}")
    return name, presets[name]()


def device() -> str:
    """``DSV3_DEVICE``, cpu by default. Raises ConfigError where torch does not see that device."""
    name = os.environ.get("DSV3_DEVICE", "cpu")
    if name == "cpu" or (name.split(":")[0] == "cuda" and torch.cuda.is_available()):
        return name
    raise ConfigError(f"DSV3_DEVICE is {name!r}; expected 'cpu', or 'cuda' where torch sees a card")


def build_on(
    device: str, kind: Callable[..., M], *arguments: object, dtype: torch.dtype = torch.bfloat16
) -> M:
    """``kind(*arguments)`` on ``device``, ready for a forward pass: no gradients, random matrices.

    Parameters are made in ``dtype`` at once: the experts of one V3 layer are 23 GB in bf16 and
    would not fit beside a copy in fp32. Matrices have a standard deviation of 0.006 (report 4.2),
    norms are ones. Buffers (the routers' biases) are zeros and keep their own dtype.
    """
    with torch.device("meta"):
        made = kind(*arguments)
    for module in made.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            new = torch.ones(weight.shape, dtype=dtype, device=device)
            new = new.normal_(std=0.006) if weight.dim() > 1 else new
            setattr(module, name, nn.Parameter(new, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.zeros_like(buffer, device=device))
    return made
