"""The small parts that layers share: products, RMSNorm, SwiGLU, and softmax attention itself.

Why one attention function: MLA and its yardstick (MHA, GQA, MQA) differ in how queries, keys and
values are made and stored, not in what is done with them. ``attend`` has two paths that a test
proves equal: the explicit one is equation 10 as written, the fused one is torch's kernel.

Legend: B batch, T new tokens, S tokens seen so far (keys), H heads, D width of a head or model,
M rows, I inputs, O outputs, P threads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW_ROWS, MANY_WEIGHTS = 64, 2**16
"""``linear`` shares a product out up to so many rows and from so many weights: found by timing."""


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in fp32 or wider."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as x (..., width)."""
        if x.dtype == self.weight.dtype == torch.float32:
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.rms_norm(wide, x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., I) times weight (O, I) transposed: (..., O), ``F.linear`` on every CPU thread.

    A decode step waits for weights. In fp32 torch reads those of a product with few rows on one
    thread, but shares a batch of products out: here each thread's is a part of the outputs.
    """
    threads, (outputs, inputs) = torch.get_num_threads(), weight.shape
    if (
        threads == 1 or outputs % threads or weight.numel() < MANY_WEIGHTS
        or x.numel() > FEW_ROWS * inputs or x.dtype != torch.float32 or not x.is_cpu
        or torch.is_grad_enabled()
    ):  # fmt: skip
        return F.linear(x, weight)
    x_PMI = x.reshape(1, -1, inputs).expand(threads, -1, -1)
    out_PMO = torch.bmm(x_PMI, weight.view(threads, -1, inputs).mT)
    return out_PMO.transpose(0, 1).reshape(*x.shape[:-1], outputs)


class Linear(nn.Linear):
    """An ``nn.Linear`` without bias that multiplies by ``linear``."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return linear(input, self.weight)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): the dense feed-forward, one expert, and the shared expert."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = Linear(width, inner)
        self.up_proj = Linear(width, inner)
        self.down_proj = Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as x (..., width)."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


def causal_mask(new: int, seen: int, device: torch.device | None = None) -> Tensor:
    """Which of ``seen`` keys each of the last ``new`` positions may look at: (new, seen) bool.

    Row i is position seen - new + i. With a cache the mask is a rectangle, not a square.
    """
    return torch.ones(new, seen, dtype=torch.bool, device=device).tril(seen - new)


def attend(q_BHTD: Tensor, k_BHSD: Tensor, v_BHSV: Tensor, scale: float, fused: bool) -> Tensor:
    """Causal softmax attention of the last T positions over all S: (B, H, T, V).

    Source: report eq 10. H of k and v may be smaller and divide that of q (grouped queries).
    ``fused`` uses torch's kernel, else the formula is written out.
    """
    new, seen = q_BHTD.shape[-2], k_BHSD.shape[-2]
    groups = q_BHTD.shape[1] // k_BHSD.shape[1]
    if groups > 1 and new == 1 and fused:
        # Heads that share a key become rows of one query: the cache is read as it lies.
        rows_BGRD = q_BHTD.unflatten(1, (-1, groups)).squeeze(3)
        out_BGRV = F.scaled_dot_product_attention(rows_BGRD, k_BHSD, v_BHSV, scale=scale)
        return out_BGRV.flatten(1, 2).unsqueeze(2)
    if groups > 1:
        k_BHSD, v_BHSV = (x.repeat_interleave(groups, dim=1) for x in (k_BHSD, v_BHSV))
    if not fused:
        logits = torch.einsum("bhtd,bhsd->bhts", q_BHTD, k_BHSD) * scale
        logits = logits.masked_fill(~causal_mask(new, seen, q_BHTD.device), float("-inf"))
        return torch.einsum("bhts,bhsv->bhtv", logits.softmax(dim=-1), v_BHSV)
    width = v_BHSV.shape[-1]
    # The fast kernel wants equal widths; zero columns cost less than the slow kernel.
    v_BHSV = F.pad(v_BHSV, (0, q_BHTD.shape[-1] - width)) if width < q_BHTD.shape[-1] else v_BHSV
    square = new == seen
    mask = None if square or new == 1 else causal_mask(new, seen, q_BHTD.device)
    out = F.scaled_dot_product_attention(
        q_BHTD, k_BHSD, v_BHSV, attn_mask=mask, is_causal=square and new > 1, scale=scale
    )
    return out[..., :width]
