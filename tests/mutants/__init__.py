"""Deliberate mistakes: does the test suite see what published implementations get wrong?

Each mutant puts one mistake into a copy of the package; a test that is about it must then fail.
``python -m tests.mutants`` tries all of them and says by which test each was caught.
"""

from __future__ import annotations

from tests.mutants import attention, counting, experts, fp8, prediction
from tests.mutants.mutant import Mutant

MISTAKES = {
    1: "the decompressed keys and values are cached",
    2: "the rotary key is missing, comes from the latent, or is one per head",
    3: "RoPE on a latent, on the content part, or on the values",
    4: "a latent's norm is missing, or the wrong latent is cached",
    5: "the softmax scale",
    6: "YaRN",
    7: "adjacent pairs and half-split pairs mixed up",
    8: "the causal mask with a cache",
    9: "the cache's size without its rotary part",
    10: "rejected drafts stay in the cache",
    11: "the bias leaks into the gates",
    12: "how the bias moves",
    13: "how the gates are made",
    14: "how groups are limited",
    15: "the shared expert",
    16: "the sequence-wise loss",
    17: "a test model in which every expert is chosen",
    18: "a test model whose router has no bias",
    19: "the chain of prediction modules",
    20: "a label leaks, or targets are out of step",
    21: "the order of the concatenation",
    22: "speculation that changes the output",
    23: "rounding to E4M3",
    24: "the blocks that share a scale",
    25: "how products are accumulated",
    26: "counting parameters",
}

MUTANTS: list[Mutant] = [
    *attention.MUTANTS,
    *experts.MUTANTS,
    *prediction.MUTANTS,
    *fp8.MUTANTS,
    *counting.MUTANTS,
]
