"""Small random models on which this package and an independent reference must agree.

Random, because a hand-written test model leaves out exactly what its author did not think of:
every expert chosen by every token, no router bias, values as wide as keys, no YaRN.
"""

from __future__ import annotations

import random

import torch

from dsv3_mini.config import ModelConfig, RopeScaling
from dsv3_mini.model import Transformer


def random_config(seed: int) -> ModelConfig:
    """A configuration of a few thousand parameters; the same one for the same seed.

    Norm epsilon stays at 1e-6: transformers' latent norms have that built in. Shared experts are
    never 0, which transformers has no layout for.
    """
    rng = random.Random(seed)
    n_group = rng.choice([1, 2, 4, 4])
    group_size = rng.choice([2, 3, 4])
    topk_group = rng.randint(1, max(n_group - 1, 1))
    layers, heads = rng.randint(1, 4), rng.choice([1, 2, 3])
    return ModelConfig(
        vocab_size=rng.choice([61, 96]),
        hidden_size=rng.choice([24, 32, 48]),
        intermediate_size=rng.choice([40, 64]),
        moe_intermediate_size=rng.choice([8, 20]),
        num_hidden_layers=layers,
        first_k_dense_replace=rng.choice([0, rng.randint(1, layers)]),
        num_nextn_predict_layers=rng.choice([1, 1, 2]),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        q_lora_rank=rng.choice([None, 12, 20]),
        kv_lora_rank=rng.choice([8, 16, 24]),
        qk_nope_head_dim=rng.choice([6, 8, 16]),
        qk_rope_head_dim=rng.choice([4, 8, 16]),
        v_head_dim=rng.choice([6, 10, 16, 32]),
        n_routed_experts=n_group * group_size,
        n_shared_experts=rng.choice([1, 2]),
        num_experts_per_tok=rng.randint(1, topk_group * group_size - 1),
        n_group=n_group,
        topk_group=topk_group,
        norm_topk_prob=rng.choice([True, True, False]),
        routed_scaling_factor=rng.choice([1.0, 1.7, 2.5]),
        max_position_embeddings=rng.choice([64, 4096]),
        rope_theta=rng.choice([100.0, 10000.0]),
        rope_scaling=_random_scaling(rng) if rng.random() < 0.7 else None,
        initializer_range=0.02,
    )


def _random_scaling(rng: random.Random) -> RopeScaling:
    mscale = rng.choice([0.0, 0.707, 1.0])
    return RopeScaling(
        factor=rng.choice([1.0, 2.5, 8.0, 40.0]),
        original_max_position_embeddings=rng.choice([16, 256, 4096]),
        beta_fast=rng.choice([4.0, 16.0, 32.0]),
        beta_slow=rng.choice([0.5, 1.0, 2.0]),
        mscale=mscale,
        mscale_all_dim=rng.choice([mscale, mscale, 0.0, 0.5]),
    )


@torch.no_grad()
def randomise(model: Transformer, seed: int) -> Transformer:
    """Weights that make every part of the model matter; returns the same model.

    At the initial 0.02 all experts score one half and attention is uniform, so a mistake hardly
    shows. Norm weights leave one, and most router biases are negative, so that a masked expert
    whose score was set to 0 would win.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.uniform_(0.5, 1.5, generator=generator)
        else:
            gain = 2.0 if name.endswith("mlp.gate.weight") else 1.2
            parameter.normal_(0, gain / parameter.shape[-1] ** 0.5, generator=generator)
    for gate in model.gates:
        gate.e_score_correction_bias.normal_(-0.3, 0.5, generator=generator)
    return model
