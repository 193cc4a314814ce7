"""Rotary position embedding, and YaRN, which stretches it to longer contexts.

Why: RoPE turns pair i of a query or key by position x theta_i, so a dot product depends on the
distance between two tokens only. Fast pairs (large theta) tell neighbours apart, slow ones tell
far from near. A model trained on 4K tokens has never seen the slow pairs complete a turn, so at
128K they reach angles it does not know. YaRN divides by the factor only those frequencies, leaves
the fast ones alone, and blends between (report 4.3). It also multiplies every logit by
(0.1 ln s + 1)^2, because a softmax over more keys needs sharper logits.

Pairs are adjacent, (0,1), (2,3), ..., as in the official checkpoint. Other code bases store them
as two halves: the same dot products, another order of the 64 dimensions.

Legend: T tokens, R rotary width (``x_TR``: any leading dimensions may stand before T).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsv3_mini.config import ModelConfig, RopeScaling


def frequencies(
    width: int, theta: float = 10000.0, scaling: RopeScaling | None = None, device: str = "cpu"
) -> Tensor:
    """Angle per position of each pair, in radians: (width / 2,) float32.

    Source: RoFormer theta_i = theta^(-2i/width); with ``scaling``, YaRN (report 4.3).
    """
    pairs = torch.arange(0, width, 2, dtype=torch.float32, device=device)
    plain: Tensor = 1.0 / theta ** (pairs / width)
    if scaling is None:
        return plain
    keep = 1.0 - yarn_ramp(width, theta, scaling, device)
    return plain * keep + plain / scaling.factor * (1.0 - keep)


def yarn_ramp(width: int, theta: float, scaling: RopeScaling, device: str = "cpu") -> Tensor:
    """How far each pair is interpolated: (width / 2,), 0 untouched, 1 divided by the factor.

    ``beta_fast`` and ``beta_slow`` count full turns over the training length: a pair that makes
    more than 32 is left alone, one that makes less than 1 is divided. V3's ramp: pairs 10 to 23.
    """

    def pair_with(turns: float) -> float:
        length = scaling.original_max_position_embeddings
        return width * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_with(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_with(scaling.beta_slow)), width - 1)
    index = torch.arange(width // 2, dtype=torch.float32, device=device)
    # A ramp of no width would divide by zero; 0.001 is what every implementation uses.
    return ((index - low) / (high - low or 0.001)).clamp(0, 1)


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's temperature term 0.1 m ln s + 1 (1.36889 for V3); 1 where nothing is stretched."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def softmax_scale(config: ModelConfig) -> float:
    """What every logit is multiplied by: 1/sqrt(192), times mscale squared under YaRN.

    Source: report eq 10, 4.3; 0.135234 for V3. Both parts share it, in prefill and decoding alike.
    """
    scale = 1 / math.sqrt(config.qk_head_dim)
    if config.rope_scaling is not None and config.rope_scaling.mscale_all_dim:
        scale *= yarn_mscale(config.rope_scaling.factor, config.rope_scaling.mscale_all_dim) ** 2
    return scale


def rope_table(config: ModelConfig, start: int, length: int, device: str) -> tuple[Tensor, Tensor]:
    """cos and sin for positions start .. start + length - 1, each (length, rotary_dim / 2)."""
    scaling = config.rope_scaling
    theta = frequencies(config.rotary_dim, config.rope_theta, scaling, device)
    position = torch.arange(start, start + length, dtype=torch.float32, device=device)
    angle_TR = position[:, None] * theta
    magnitude = 1.0 if scaling is None else _table_magnitude(scaling)
    return angle_TR.cos() * magnitude, angle_TR.sin() * magnitude


def _table_magnitude(scaling: RopeScaling) -> float:
    # 1 for V3, whose whole temperature sits in the softmax scale.
    if scaling.mscale and scaling.mscale_all_dim:
        numerator = yarn_mscale(scaling.factor, scaling.mscale)
        return numerator / yarn_mscale(scaling.factor, scaling.mscale_all_dim)
    return yarn_mscale(scaling.factor, 1.0)


def apply_rope(x_TR: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Turn each adjacent pair of the last dimension by its angle; same shape and dtype as x.

    Source: report eqs 3 and 8. x is (..., T, R), cos and sin are (T, R / 2).
    """
    wide = x_TR.to(torch.promote_types(x_TR.dtype, torch.float32))
    # As a complex number a pair is turned by one product, and decoding waits for launches.
    wide = wide.unflatten(-1, (-1, 2)).clone(memory_format=torch.contiguous_format)
    pair = torch.view_as_complex(wide)
    return torch.view_as_real(pair * torch.complex(cos_TR, sin_TR)).flatten(-2).to(x_TR.dtype)


def rotation_matrix(cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """The same rotation as one R x R matrix a token, (T, R, R): slow, for reading and proofs.

    ``apply_rope(x, cos, sin)[t] == rotation_matrix(cos, sin)[t] @ x[t]``. Source: RoFormer.
    """
    blocks = torch.stack((cos_TR, -sin_TR, sin_TR, cos_TR), dim=-1).unflatten(-1, (2, 2))
    return torch.stack([torch.block_diag(*pairs) for pairs in blocks])
