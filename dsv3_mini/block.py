"""One transformer layer: x + attention(norm(x)), then x + feed-forward(norm(x)).

Why pre-norm with two residual additions: the stream x is only ever added to, so gradients reach
the first layer unscaled. The first ``first_k_dense_replace`` layers have one dense feed-forward,
the rest a mixture of experts. The report's eq 12 leaves the norm out; the official code has it.

Legend: B batch, T new tokens, D hidden, R rotary width.
"""

from __future__ import annotations

from torch import Tensor, nn

from dsv3_mini.attention import GroupedQueryAttention
from dsv3_mini.cache import Cache
from dsv3_mini.config import ModelConfig
from dsv3_mini.layers import RMSNorm, SwiGLU
from dsv3_mini.mla import MultiHeadLatentAttention
from dsv3_mini.moe import MoE, Routing


class DecoderLayer(nn.Module):
    """Layer number ``index`` of the model, with the official parameter names."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        latent = config.attention == "mla"
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = (
            MultiHeadLatentAttention(config) if latent else GroupedQueryAttention(config)
        )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        dense = index < config.first_k_dense_replace
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size) if dense else MoE(config)

    def forward(
        self, x_BTD: Tensor, cos_TR: Tensor, sin_TR: Tensor, cache: Cache | None, layer: int,
        absorb: bool | None = None, fused: bool = True,
    ) -> tuple[Tensor, Routing | None]:  # fmt: skip
        """(B, T, D) to (B, T, D), and the routing if this layer has experts.

        ``layer`` is the cache's row, 0 for an MTP layer. Source: report eq 12, whose u_t is x.
        """
        attended = self.self_attn(
            self.input_layernorm(x_BTD), cos_TR, sin_TR, cache, layer, absorb, fused
        )
        x_BTD = x_BTD + attended
        normed_BTD = self.post_attention_layernorm(x_BTD)
        if isinstance(self.mlp, MoE):
            fed_BTD, routing = self.mlp(normed_BTD)
            return x_BTD + fed_BTD, routing
        return x_BTD + self.mlp(normed_BTD), None
