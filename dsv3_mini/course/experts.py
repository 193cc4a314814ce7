"""A mixture of experts that trains in a second, also without its shared expert.

Why so small: to compare ways of balancing, each must be trained from several seeds, or a lucky one
is taken for an effect. Two layers of 16 experts in 4 groups, top 4, are enough to collapse.
"""

from __future__ import annotations

from dsv3_mini.config import ModelConfig
from dsv3_mini.model import Transformer
from dsv3_mini.moe import MoE


def small_moe() -> ModelConfig:
    """Two MoE layers, 48 wide, over the project's 2,048 tokens; no dense layer, no MTP."""
    return ModelConfig.mini().replace(
        hidden_size=48, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=2,
        first_k_dense_replace=0, num_nextn_predict_layers=0, num_attention_heads=2,
        num_key_value_heads=2, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=16,
        qk_rope_head_dim=8, v_head_dim=16,
    )  # fmt: skip


def without_shared_expert(model: Transformer) -> Transformer:
    """The same weights with the shared expert switched off and one more routed expert instead.

    So a token still uses as many experts. Source: the ablation of DeepSeekMoE 4.4.
    """
    config = model.config
    more = config.num_experts_per_tok + config.n_shared_experts
    other = Transformer(config.replace(num_experts_per_tok=more))
    other.load_state_dict(model.state_dict())
    for layer in other.model.layers:
        mlp = layer.get_submodule("mlp")
        if isinstance(mlp, MoE):
            mlp.shared_experts = None
    return other
