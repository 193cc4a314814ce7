"""config: the presets, what cannot be changed, and that changed copies are checked again."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from dsv3_mini import ModelConfig, Transformer
from dsv3_mini.config import ConfigError, RopeScaling
from dsv3_mini.moe import Gate

PRESETS = {
    name: getattr(ModelConfig, name)() for name in ("tiny", "mini", "gpu", "v3")
}  # construction checks them

OFFICIAL: dict[str, Any] = {
    "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "num_hidden_layers": 61, "first_k_dense_replace": 3,
    "num_nextn_predict_layers": 1, "num_attention_heads": 128, "num_key_value_heads": 128,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8,
    "n_group": 8, "topk_group": 4, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    "max_position_embeddings": 163840, "rope_theta": 10000, "rms_norm_eps": 1e-6,
}  # fmt: skip
YARN: dict[str, Any] = {
    "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
    "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
FIXED: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_act": "silu",
    "attention_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": False,
    "moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
}  # fmt: skip


@pytest.mark.parametrize("field", OFFICIAL)
def test_v3_has_the_official_value(field: str) -> None:
    assert getattr(PRESETS["v3"], field) == OFFICIAL[field]


def test_v3_is_complete() -> None:
    """Every field is either official, or one of the three whose value is explained here."""
    v3 = PRESETS["v3"]
    names = {field.name for field in dataclasses.fields(v3)}
    assert names - set(OFFICIAL) == {"rope_scaling", "initializer_range", "attention"}
    assert dataclasses.asdict(v3)["rope_scaling"] == YARN
    assert v3.initializer_range == 0.006  # the report's; config.json has 0.02
    assert v3.attention == "mla"
    assert v3.qk_head_dim == 192


def test_the_official_json_and_back() -> None:
    rope = {"type": "yarn", **YARN}
    hf = {**FIXED, **OFFICIAL, "rope_scaling": rope, "initializer_range": 0.02, "ep_size": 1}
    config = ModelConfig.from_hf(hf)
    assert config == PRESETS["v3"].replace(initializer_range=0.02)
    written = config.to_hf()
    assert written == {name: value for name, value in hf.items() if name != "ep_size"}


def test_the_spelling_of_transformers_5() -> None:
    hf = {**OFFICIAL, "initializer_range": 0.006}
    del hf["rope_theta"]
    hf["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 10000.0, **YARN}
    assert ModelConfig.from_hf(hf) == PRESETS["v3"]
    hf["rope_parameters"] = {"rope_type": "default", "rope_theta": 500.0}
    assert ModelConfig.from_hf(hf) == PRESETS["v3"].replace(rope_theta=500.0, rope_scaling=None)
    del hf["rope_parameters"]["rope_type"]  # nothing to stretch by: the same
    assert ModelConfig.from_hf(hf) == PRESETS["v3"].replace(rope_theta=500.0, rope_scaling=None)


@pytest.mark.parametrize("name", PRESETS)
def test_no_field_can_be_set(name: str) -> None:
    config = PRESETS[name]
    for field in dataclasses.fields(config):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field.name, getattr(config, field.name))
    with pytest.raises(dataclasses.FrozenInstanceError):
        RopeScaling().factor = 1.0


@pytest.mark.parametrize(
    "changes",
    [
        {"first_k_dense_replace": 0, "num_nextn_predict_layers": 0, "n_shared_experts": 0},
        {"first_k_dense_replace": 4},  # every layer
        {"n_group": 16, "topk_group": 16},  # groups of one, but none has to be ranked
        {"num_experts_per_tok": 8},  # all that two groups of four hold
    ],
)
def test_what_is_just_allowed(changes: dict[str, Any]) -> None:
    config = ModelConfig.mini().replace(**changes)
    assert {name: getattr(config, name) for name in changes} == changes


def test_the_limits_of_yarn() -> None:
    """One position is the shortest text there is; beta_fast and beta_slow bound a ramp."""
    assert RopeScaling(original_max_position_embeddings=1).original_max_position_embeddings == 1
    with pytest.raises(ConfigError, match="beta_fast > beta_slow"):
        RopeScaling(beta_fast=2.0, beta_slow=2.0)


def test_replace_changes_a_copy() -> None:
    before = ModelConfig.mini()
    after = before.replace(vocab_size=7, rope_scaling=RopeScaling())
    assert (before.vocab_size, before.rope_scaling) == (2048, None)
    assert (after.vocab_size, after.rope_scaling) == (7, RopeScaling())
    assert after.replace(vocab_size=2048, rope_scaling=None) == before
    assert hash(after.replace(vocab_size=2048, rope_scaling=None)) == hash(before)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_size": 0}, "hidden_size"),
        ({"n_routed_experts": 15}, "n_group"),
        ({"topk_group": 5}, "topk_group"),
        ({"n_group": 16, "topk_group": 4}, "top two"),  # a group of one has no second best
        ({"num_experts_per_tok": 9}, "topk_group"),  # 2 groups of 4 hold 8
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"qk_rope_head_dim": 15}, "qk_rope_head_dim"),
        ({"attention": "gqa", "v_head_dim": 31}, "v_head_dim"),
        ({"first_k_dense_replace": 5}, "first_k_dense_replace"),
        ({"moe_intermediate_sizes": 3}, "moe_intermediate_size"),
        ({"vocab_size": 2**63}, "below 2"),  # torch counts in 64 bits
    ],
)
def test_replace_checks_again(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ModelConfig.mini().replace(**changes)


@pytest.mark.parametrize("name", PRESETS)
def test_every_mechanism_is_on(name: str) -> None:
    config = PRESETS[name]
    assert config.attention == "mla"
    assert config.q_lora_rank is not None
    assert config.n_shared_experts == 1
    assert config.num_nextn_predict_layers == 1
    assert 0 < config.first_k_dense_replace < config.num_hidden_layers
    assert config.num_attention_heads > 1
    assert config.norm_topk_prob
    assert config.routed_scaling_factor == 2.5
    # The latent is smaller than the keys and values it stands for.
    expanded = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    assert config.kv_lora_rank + config.qk_rope_head_dim < expanded


@pytest.mark.parametrize(
    ("name", "parameters", "experts", "groups", "kept", "longest"),
    [
        ("tiny", 53_624, 3, 4, 2, 128),
        ("mini", 2_642_144, 4, 4, 2, 4096),
        ("gpu", 519_575_680, 4, 8, 4, 4096),
    ],
)
def test_a_preset_keeps_its_size(
    name: str, parameters: int, experts: int, groups: int, kept: int, longest: int
) -> None:
    """What the notebooks measure and the tables count was measured on these; v3 is official."""
    config: ModelConfig = getattr(ModelConfig, name)()
    with torch.device("meta"):
        model = Transformer(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert (config.num_experts_per_tok, config.max_position_embeddings) == (experts, longest)
    assert (config.n_group, config.topk_group) == (groups, kept)


@pytest.mark.parametrize("name", PRESETS)
def test_routing_can_go_wrong(name: str) -> None:
    """Where every expert or every group is always chosen, no mistake of the router can show."""
    config = PRESETS[name]
    size = config.n_routed_experts // config.n_group
    assert config.topk_group < config.n_group
    assert config.num_experts_per_tok < config.topk_group * size  # a choice inside kept groups


@pytest.mark.parametrize("name", ["tiny", "mini", "gpu"])
def test_routing_depends_on_groups_and_bias(name: str) -> None:
    """Measured on random tokens: the group limit and a bias each change who is chosen."""
    config = PRESETS[name]
    gate = Gate(config)
    torch.nn.init.normal_(gate.weight, std=config.hidden_size**-0.5)
    x = torch.randn(1, 400, config.hidden_size)
    routing = gate(x)
    limited = np.sort(routing.indices_BTK[0].numpy(), axis=-1)
    k = config.num_experts_per_tok
    free = np.sort(np.argsort(-routing.scores_BTE[0].detach().numpy(), axis=-1)[:, :k], axis=-1)
    assert 0.05 < (limited != free).any(axis=-1).mean() < 1
    counts = routing.counts()
    assert counts.min() > 0
    assert counts.max() < 400  # no expert is chosen by every token
    gate.e_score_correction_bias[0] = -0.3
    assert gate(x).counts()[0] < counts[0]
