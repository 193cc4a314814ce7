"""Multi-head latent attention: keys and values that are never stored (report 2.1.1, eqs 1-11).

Why: a KV cache costs 2 x heads x width numbers a token and layer. MLA stores one latent c^KV of
512 numbers, from which every head's keys *and* values are made by up-projections W^UK and W^UV,
plus one rotated key k^R of 64 that all heads share: 576, whatever the head count.

Why a separate rotary key: (W^UQ c^Q) . (W^UK c) equals (W^UK^T W^UQ c^Q) . c, so W^UK can move to
the query side once and the latent itself serves as key ("absorption"). A rotation between the two
would depend on the distance of the tokens and could not be moved. So position travels apart.

Two paths, equal by test. Naive expands keys and values of all S tokens, then is ordinary
attention with 192-wide keys. Absorbed never expands: multi-query attention with a 576-wide key
whose first 512 numbers are also the value. For one new token absorbed does far fewer operations;
for a whole prompt, naive does. ``cheaper_to_absorb`` counts them.

Legend: B batch, T new tokens, S tokens seen, H heads, D hidden, C kv_lora_rank,
N qk_nope_head_dim, R qk_rope_head_dim, V v_head_dim, K = C + R, M a product's rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsv3_mini.cache import Cache, KVCache
from dsv3_mini.config import ModelConfig
from dsv3_mini.layers import Linear, RMSNorm, attend, causal_mask
from dsv3_mini.rope import apply_rope, softmax_scale


def cheaper_to_absorb(config: ModelConfig, new: int, seen: int) -> bool:
    """Whether the absorbed path needs fewer multiplications a head for ``new`` of ``seen`` tokens.

    Both paths pay a projection of ``new`` queries or ``seen`` latents through W^UK and W^UV and
    then the attention itself, at widths 576 + 512 against 192 + 128 in V3.
    """
    project = config.kv_lora_rank * (config.qk_nope_head_dim + config.v_head_dim)
    naive = seen * project + new * seen * (config.qk_head_dim + config.v_head_dim)
    absorbed = new * project + new * seen * (2 * config.kv_lora_rank + config.qk_rope_head_dim)
    return absorbed < naive


class MultiHeadLatentAttention(nn.Module):
    """MLA with the official parameter names; ``q_lora_rank=None`` leaves queries uncompressed."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        heads, hidden = config.num_attention_heads, config.hidden_size
        if config.q_lora_rank is None:
            self.q_proj = Linear(hidden, heads * config.qk_head_dim)
        else:
            self.q_a_proj = Linear(hidden, config.q_lora_rank)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
            self.q_b_proj = Linear(config.q_lora_rank, heads * config.qk_head_dim)
        latent = config.kv_lora_rank + config.qk_rope_head_dim
        self.kv_a_proj_with_mqa = Linear(hidden, latent)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, config.rms_norm_eps)
        expanded = heads * (config.qk_nope_head_dim + config.v_head_dim)
        self.kv_b_proj = Linear(config.kv_lora_rank, expanded)
        self.o_proj = Linear(heads * config.v_head_dim, hidden)

    def queries(self, x_BTD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> tuple[Tensor, Tensor]:
        """q^C (B, H, T, N) and the rotated q^R (B, H, T, R), made from c^Q: report eqs 6-8."""
        if self.config.q_lora_rank is None:
            q = self.q_proj(x_BTD)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTD)))
        q_BHTK = q.unflatten(-1, (-1, self.config.qk_head_dim)).transpose(1, 2)
        widths = [self.config.qk_nope_head_dim, self.config.qk_rope_head_dim]
        q_nope_BHTN, q_rope_BHTR = q_BHTK.split(widths, dim=-1)
        return q_nope_BHTN, apply_rope(q_rope_BHTR, cos_TR, sin_TR)

    def latents(self, x_BTD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        """What is cached: the normalised c^KV and the rotated k^R, (B, T, K): report eqs 1, 3.

        k^R comes straight from the hidden state, is not normalised, and has no head dimension.
        """
        widths = [self.config.kv_lora_rank, self.config.qk_rope_head_dim]
        c_kv_BTC, k_rope_BTR = self.kv_a_proj_with_mqa(x_BTD).split(widths, dim=-1)
        k_rope_BTR = apply_rope(k_rope_BTR, cos_TR, sin_TR)
        return torch.cat((self.kv_a_layernorm(c_kv_BTC), k_rope_BTR), dim=-1)

    def expand(self, latent_BSK: Tensor) -> tuple[Tensor, Tensor]:
        """Every head's key (B, H, S, N + R) and value (B, H, S, V): report eqs 2, 4, 5."""
        nope, value = self.config.qk_nope_head_dim, self.config.v_head_dim
        c_kv_BSC = latent_BSK[..., : self.config.kv_lora_rank]
        k_rope_B1SR = latent_BSK[..., self.config.kv_lora_rank :].unsqueeze(1)
        kv_BHSX = self.kv_b_proj(c_kv_BSC).unflatten(-1, (-1, nope + value)).transpose(1, 2)
        k_nope_BHSN, v_BHSV = kv_BHSX.split([nope, value], dim=-1)
        k_rope_BHSR = k_rope_B1SR.expand(-1, k_nope_BHSN.shape[1], -1, -1)
        return torch.cat((k_nope_BHSN, k_rope_BHSR), dim=-1), v_BHSV

    def absorbed(self, q_nope_BHTN: Tensor, q_rope_BHTR: Tensor, latent_BSK: Tensor) -> Tensor:
        """Report eq 10 on the latents themselves, (B, H, T, V): DeepSeek-V2 2.1.2, appendix C."""
        nope, value = self.config.qk_nope_head_dim, self.config.v_head_dim
        batch, heads, new, _ = q_nope_BHTN.shape
        w_HXC = self.kv_b_proj.weight.unflatten(0, (heads, nope + value))
        w_uk_HNC, w_uv_HVC = w_HXC.split([nope, value], dim=1)
        # Heads outermost: a head's matrix is read once, however many sequences there are.
        q_HMC = torch.bmm(q_nope_BHTN.transpose(0, 1).flatten(1, 2), w_uk_HNC)
        q_BHTC = q_HMC.view(heads, batch, new, -1).transpose(0, 1)
        q_BHTK = torch.cat((q_BHTC, q_rope_BHTR), dim=-1)
        q_BHTK = q_BHTK * softmax_scale(self.config)  # fewer numbers than the logits
        # One key for all heads: a single product, whose many rows (tokens) the CPU's threads share.
        logits_BMS = torch.bmm(latent_BSK, q_BHTK.flatten(1, 2).mT).mT.contiguous()
        if new > 1:
            hidden = ~causal_mask(new, latent_BSK.shape[1], latent_BSK.device)
            logits_BHTS = logits_BMS.unflatten(1, (heads, new))
            logits_BMS = logits_BHTS.masked_fill(hidden, float("-inf")).flatten(1, 2)
        mean_BMC = torch.bmm(logits_BMS.softmax(dim=-1), latent_BSK[..., : w_uk_HNC.shape[-1]])
        mean_HBTC = mean_BMC.view(batch, heads, new, -1).transpose(0, 1)
        out_HMV = torch.bmm(mean_HBTC.flatten(1, 2), w_uv_HVC.mT)
        return out_HMV.view(heads, batch, new, value).transpose(0, 1)

    def forward(
        self, x_BTD: Tensor, cos_TR: Tensor, sin_TR: Tensor, cache: Cache | None = None,
        layer: int = 0, absorb: bool | None = None, fused: bool = True,
    ) -> Tensor:  # fmt: skip
        """(B, T, D) to (B, T, D): report eqs 1-11.

        ``absorb`` picks the path, None the cheaper one. With a KVCache the expanded keys and
        values are stored (71.1 times the latent at V3's sizes), and only the naive path exists.
        """
        q_nope_BHTN, q_rope_BHTR = self.queries(x_BTD, cos_TR, sin_TR)
        latent_BSK = self.latents(x_BTD, cos_TR, sin_TR)
        expanded = isinstance(cache, KVCache)
        if cache is not None and not expanded:
            (latent_BSK,) = cache.append(layer, latent_BSK)
        if absorb is None:
            absorb = cheaper_to_absorb(self.config, x_BTD.shape[1], latent_BSK.shape[1])
        if absorb and not expanded:
            out_BHTV = self.absorbed(q_nope_BHTN, q_rope_BHTR, latent_BSK)
        else:
            k_BHSK, v_BHSV = self.expand(latent_BSK)
            if cache is not None and expanded:
                k_BHSK, v_BHSV = cache.append(layer, k_BHSK, v_BHSV)
            q_BHTK = torch.cat((q_nope_BHTN, q_rope_BHTR), dim=-1)
            out_BHTV = attend(q_BHTK, k_BHSK, v_BHSV, softmax_scale(self.config), fused)
        out_BTD: Tensor = self.o_proj(out_BHTV.transpose(1, 2).flatten(2))
        return out_BTD
