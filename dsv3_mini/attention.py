"""The yardstick: multi-head, grouped-query and multi-query attention with an ordinary KV cache.

Why: to say what MLA saves, the same model must run without it. One module covers all three:
``num_key_value_heads`` equal to the heads is MHA, 1 is MQA, anything between is GQA. Each token
stores 2 x heads x width numbers a layer (DeepSeek-V2 Table 1). RoPE turns the whole head, as in
Llama: nothing has to be decoupled, because keys are stored as they are used.

Legend: B batch, T new tokens, S tokens seen, H heads, G key heads, D hidden, V head width.
"""

from __future__ import annotations

from torch import Tensor, nn

from dsv3_mini.cache import Cache
from dsv3_mini.config import ModelConfig
from dsv3_mini.layers import Linear, attend
from dsv3_mini.rope import apply_rope, softmax_scale


class GroupedQueryAttention(nn.Module):
    """Attention with ``num_key_value_heads`` key and value heads of width ``v_head_dim``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width, hidden = config.v_head_dim, config.hidden_size
        self.q_proj = Linear(hidden, config.num_attention_heads * width)
        self.k_proj = Linear(hidden, config.num_key_value_heads * width)
        self.v_proj = Linear(hidden, config.num_key_value_heads * width)
        self.o_proj = Linear(config.num_attention_heads * width, hidden)

    def forward(
        self, x_BTD: Tensor, cos_TR: Tensor, sin_TR: Tensor, cache: Cache | None = None,
        layer: int = 0, absorb: bool | None = None, fused: bool = True,
    ) -> Tensor:  # fmt: skip
        """(B, T, D) to (B, T, D). ``absorb`` is MLA's choice and has no meaning here."""
        q_BHTV, k_BGTV, v_BGTV = (
            proj(x_BTD).unflatten(-1, (-1, self.config.v_head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q_BHTV, k_BGSV = apply_rope(q_BHTV, cos_TR, sin_TR), apply_rope(k_BGTV, cos_TR, sin_TR)
        v_BGSV = v_BGTV
        if cache is not None:
            k_BGSV, v_BGSV = cache.append(layer, k_BGSV, v_BGTV)
        out_BHTV = attend(q_BHTV, k_BGSV, v_BGSV, softmax_scale(self.config), fused)
        out_BTD: Tensor = self.o_proj(out_BHTV.transpose(1, 2).flatten(2))
        return out_BTD
