"""What is measured, in one place: sizes, contexts, batches, and how often."""

from __future__ import annotations

from dataclasses import dataclass

from dsv3_mini.config import ModelConfig
from tests.bench.timing import Pace

MINI = ModelConfig.mini().replace(
    hidden_size=256, intermediate_size=704, moe_intermediate_size=128, num_hidden_layers=8,
    num_attention_heads=8, num_key_value_heads=8, q_lora_rank=96, kv_lora_rank=64,
    num_nextn_predict_layers=0, max_position_embeddings=32_768,
)  # fmt: skip
MID = MINI.replace(
    hidden_size=512, intermediate_size=1408, moe_intermediate_size=192, num_hidden_layers=12,
    q_lora_rank=192, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64,
    n_routed_experts=64, num_experts_per_tok=6, n_group=8, topk_group=4,
)  # fmt: skip


def moe_config(experts: int) -> ModelConfig:
    """The MoE layer that is measured alone: 8 of ``experts``, one shared."""
    return MID.replace(n_routed_experts=experts, num_experts_per_tok=8)


MOE_SIZE = f"hidden {MID.hidden_size}"


def moe_name(tokens: int) -> str:
    """What its race is called."""
    return f"MoE layer, {tokens:,} token{'s' if tokens > 1 else ''}"


MLA_RACE = "MLA layer, decode"


def mla_size(config: ModelConfig) -> str:
    """Which layer its race is about."""
    return f"hidden {config.hidden_size:,}"


def scaled(config: ModelConfig, hidden: int) -> ModelConfig:
    """``config`` with every width in proportion to ``hidden``: heads, latents and experts too."""
    names = ("intermediate_size", "moe_intermediate_size", "num_attention_heads",
             "num_key_value_heads", "q_lora_rank", "kv_lora_rank")  # fmt: skip
    widths = {name: getattr(config, name) * hidden // config.hidden_size for name in names}
    return config.replace(hidden_size=hidden, **widths)


@dataclass(frozen=True)
class Plan:
    """Everything that ``measure`` needs to know; a part that is empty is left out."""

    sizes: dict[str, ModelConfig]
    prefill: tuple[int, ...]
    decode: tuple[int, ...]
    train: tuple[int, int]
    """Sequences and tokens of each, also for peak memory."""
    all_peaks: bool
    """Peak memory of all four, training and prefill; or only of the first two, training."""
    experts: tuple[int, ...]
    moe_tokens: tuple[int, ...]
    mla: ModelConfig
    mla_contexts: tuple[int, ...]
    batches: tuple[int, ...]
    widths: tuple[int, ...]
    prompts: int
    """Texts a domain for speculative decoding."""
    new_tokens: int
    pace: Pace
    slow: Pace
    """For what takes seconds: training steps, and attention at V3's width."""


FULL = Plan(
    sizes={"mini": MINI, "mid": MID},
    prefill=(128, 512, 2048), decode=(128, 1024, 4096, 16_384), train=(8, 256), all_peaks=True,
    experts=(16, 64, 256), moe_tokens=(1, 2048),
    mla=ModelConfig.v3(), mla_contexts=(4096, 16_384),
    batches=(1, 2, 4, 8), widths=(128, 256, 512),
    prompts=2, new_tokens=64, pace=Pace(3, 1.5), slow=Pace(2, 4.0),
)  # fmt: skip
QUICK = Plan(
    sizes={"mini": MINI},
    prefill=(128, 512), decode=(128, 1024), train=(2, 128), all_peaks=False,
    experts=(16, 64), moe_tokens=(1, 512), mla=ModelConfig.v3(), mla_contexts=(),
    batches=(1, 2, 4), widths=(), prompts=1, new_tokens=32,
    pace=Pace(3, 0.5), slow=Pace(2, 1.0),
)  # fmt: skip
