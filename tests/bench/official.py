"""The absorbed path of MLA as DeepSeek's own inference code goes about it, stated anew.

Why beside ours: same arithmetic, another arrangement. Ours keeps latent and rotary key side by
side and makes one product of both; here they lie in two caches, scores are the sum of two einsums,
and heads stay between tokens and widths. Decoding only: one new token, so no mask.

Legend: B batch, S 1 new token, T tokens held, H heads, D hidden, N content width, R rotary width,
C latent width, V value width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_mini.mla import MultiHeadLatentAttention
from dsv3_mini.rope import softmax_scale


class OfficialDecode:
    """One step of the layer ``ours``, whose weights it shares, on caches of its own."""

    def __init__(self, ours: MultiHeadLatentAttention, latents_BTK: Tensor) -> None:
        self.ours, self.config = ours, ours.config
        widths = [self.config.kv_lora_rank, self.config.qk_rope_head_dim]
        self.kv_cache_BTC, self.pe_cache_BTR = (
            part.contiguous() for part in latents_BTK.split(widths, dim=-1)
        )
        self.scale = softmax_scale(self.config)

    def step(self, x_BSD: Tensor, turn_SR: Tensor, context: int) -> Tensor:
        """(B, 1, D) to (B, 1, D) for the token after ``context``; ``turn`` is cos + i sin."""
        config, ours = self.config, self.ours
        nope, value = config.qk_nope_head_dim, config.v_head_dim
        c_q = norm(ours.q_a_proj(x_BSD), ours.q_a_layernorm.weight, config.rms_norm_eps)
        q_BSHK = ours.q_b_proj(c_q).unflatten(-1, (config.num_attention_heads, -1))
        q_nope_BSHN, q_pe_BSHR = q_BSHK.split([nope, config.qk_rope_head_dim], dim=-1)
        q_pe_BSHR = rotate(q_pe_BSHR, turn_SR[:, None])
        kv_BSC, k_pe_BSR = ours.kv_a_proj_with_mqa(x_BSD).split(
            [config.kv_lora_rank, config.qk_rope_head_dim], dim=-1
        )
        end = context + 1
        self.kv_cache_BTC[:, context:end] = norm(
            kv_BSC, ours.kv_a_layernorm.weight, config.rms_norm_eps
        )
        self.pe_cache_BTR[:, context:end] = rotate(k_pe_BSR, turn_SR)
        wkv_b_HXC = ours.kv_b_proj.weight.view(config.num_attention_heads, nope + value, -1)
        q_BSHC = torch.einsum("bshd,hdc->bshc", q_nope_BSHN, wkv_b_HXC[:, :nope])
        scores_BSHT = torch.einsum("bshc,btc->bsht", q_BSHC, self.kv_cache_BTC[:, :end])
        scores_BSHT = scores_BSHT + torch.einsum(
            "bshr,btr->bsht", q_pe_BSHR, self.pe_cache_BTR[:, :end]
        )
        weights = (scores_BSHT * self.scale).softmax(dim=-1, dtype=torch.float32).to(x_BSD.dtype)
        mean_BSHC = torch.einsum("bsht,btc->bshc", weights, self.kv_cache_BTC[:, :end])
        out_BSHV = torch.einsum("bshc,hdc->bshd", mean_BSHC, wkv_b_HXC[:, nope:])
        return ours.o_proj(out_BSHV.flatten(2))


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension."""
    return F.rms_norm(x, weight.shape, weight, eps)


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Adjacent pairs as complex numbers, times ``turn``."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)
