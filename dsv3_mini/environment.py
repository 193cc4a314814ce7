"""The one place that reads environment variables: ``DSV3_SCALE`` and ``DSV3_DEVICE``.

Why: a notebook runs unchanged on a laptop, on one card, and at V3's full width. The reader sets
two variables before starting Jupyter, and every notebook asks here.
"""

from __future__ import annotations

import os

import torch

from dsv3_mini.config import ConfigError, ModelConfig


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
