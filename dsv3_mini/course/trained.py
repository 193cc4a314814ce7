"""The trained model that comes with the package, in the official checkpoint's layout.

Why ship one: acceptance and speed of speculative decoding, and everything that needs text worth
reading, cannot be shown on a minute of training. Its model card beside the weights says how it was
made; the same command makes it anew.
"""

from __future__ import annotations

from pathlib import Path

import torch

from dsv3_mini.checkpoint import load_pretrained
from dsv3_mini.model import Transformer

FOLDER = Path(__file__).resolve().parent.parent / "assets" / "trained"


def load_trained(device: str = "cpu") -> Transformer:
    """The shipped model in fp32, ready to decode. Raises ValueError where its folder is missing."""
    if not FOLDER.is_dir():
        raise ValueError(f"{FOLDER} is missing; its model card says how to make it anew")
    return load_pretrained(FOLDER, dtype=torch.float32, device=device).eval()
