"""accounting: every closed form against models that exist, and operations that torch counted."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dsv3_mini import ModelConfig, Transformer
from dsv3_mini.accounting import (
    Parameters,
    StoredBytes,
    attention_parameters,
    cache_bytes,
    cache_numbers_per_token,
    checkpoint_bytes,
    count_parameters,
    forward_flops,
    training_flops_per_token,
)
from dsv3_mini.course.fp8_formats import formats
from dsv3_mini.fp8 import convert_to_fp8
from dsv3_mini.moe import Experts
from tests.reference import oracles

V3 = ModelConfig.v3()
GQA = ModelConfig.mini().replace(attention="gqa", num_key_value_heads=2)
CONFIGS = {
    "v3": V3,
    "gpu": ModelConfig.gpu(),
    "mini": ModelConfig.mini(),
    "tiny": ModelConfig.tiny(),
    "mha": GQA.replace(num_key_value_heads=4),
    "gqa": GQA,
    "mqa": GQA.replace(num_key_value_heads=1),
    "two MTP layers": ModelConfig.tiny().replace(num_nextn_predict_layers=2),
    "no MTP": ModelConfig.tiny().replace(num_nextn_predict_layers=0),
    "no shared expert": ModelConfig.tiny().replace(n_shared_experts=0),
    "full queries": ModelConfig.tiny().replace(q_lora_rank=None),
    "all dense": ModelConfig.tiny().replace(first_k_dense_replace=2),
    "all experts": ModelConfig.tiny().replace(first_k_dense_replace=0),
    **{f"seed {seed}": oracles.small_config(seed) for seed in range(20)},
}

# Which names belong to which part; the first that matches decides, and every name must match.
PARTS = {
    "embedding": r"model\.embed_tokens\.weight",
    "head": r"lm_head\.weight",
    "attention": r"model\.layers\.\d+\.self_attn\..*",
    "routers": r"model\.layers\.\d+\.mlp\.gate\.weight",
    "router_biases": r"model\.layers\.\d+\.mlp\.gate\.e_score_correction_bias",
    "routed_experts": r"model\.layers\.\d+\.mlp\.experts\..*",
    "shared_experts": r"model\.layers\.\d+\.mlp\.shared_experts\..*",
    "dense_ffn": r"model\.layers\.\d+\.mlp\.(gate|up|down)_proj\.weight",
    "norms": r"model\.(layers\.\d+\.(input|post_attention)_layernorm|norm)\.weight",
}


def counted(config: ModelConfig) -> dict[str, int]:
    """Parameters and router biases of a model on the meta device, by part."""
    with torch.device("meta"):
        model = Transformer(config)
    parts = dict.fromkeys([*PARTS, "mtp", "idle_experts"], 0)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer and int(layer[1]) >= config.num_hidden_layers:
            parts["mtp"] += tensor.numel()
            continue
        part = next(part for part, pattern in PARTS.items() if re.fullmatch(pattern, name))
        parts[part] += tensor.numel()
        if part == "routed_experts":
            idle = tensor.shape[0] - config.num_experts_per_tok
            parts["idle_experts"] += sum(tensor[e].numel() for e in range(idle))
    return parts


@pytest.mark.parametrize("name", CONFIGS)
def test_every_part_is_counted_on_a_model(name: str) -> None:
    config = CONFIGS[name]
    expected = counted(config)
    ours = count_parameters(config)
    assert dataclasses.asdict(ours) == expected
    assert set(expected) == {field.name for field in dataclasses.fields(Parameters)}
    main = sum(expected[part] for part in PARTS)
    assert ours.total == main
    assert ours.active_with_embedding == main - expected["idle_experts"]
    assert ours.active == main - expected["idle_experts"] - expected["embedding"]
    assert attention_parameters(config) * config.num_hidden_layers == expected["attention"]


def test_v3_by_part() -> None:
    """The integers of the report's shapes, written out."""
    v3 = count_parameters(V3)
    assert dataclasses.asdict(v3) == {
        "embedding": 926_679_040,
        "attention": 11_413_547_008,
        "dense_ffn": 1_189_085_184,
        "routed_experts": 653_908_770_816,
        "shared_experts": 2_554_331_136,
        "routers": 106_430_464,
        "router_biases": 14_848,
        "norms": 881_664,
        "head": 926_679_040,
        "mtp": 11_610_068_224,
        "idle_experts": 58 * 248 * 44_040_192,
    }
    assert v3.total == 671_026_419_200
    assert v3.active == 36_625_618_432
    assert v3.active_with_embedding == 37_552_297_472
    assert attention_parameters(V3) == 187_105_280 + 2_048
    # What the Hub calls 685B: MTP is stored with copies of embedding and head.
    assert v3.total + v3.mtp + v3.embedding + v3.head == 684_489_845_504


# ------------------------------------------------------------------------------------------ FLOPs

FLOP_CONFIGS = {name: config for name, config in CONFIGS.items() if name not in ("v3", "gpu")}


def executed(config: ModelConfig, tokens: int, backward: bool) -> int:
    """Operations of matrix products that torch ran, on the naive and explicit path."""
    model = oracles.shaken(config).requires_grad_(backward)
    for module in model.modules():
        if isinstance(module, Experts):
            module.grouped = module.in_turn  # type: ignore[method-assign]  # torch counts no groups
    with FlopCounterMode(display=False) as counter:
        result = model(torch.randint(0, config.vocab_size, (1, tokens)), absorb=False, fused=False)
        if backward:
            result.logits.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", FLOP_CONFIGS)
def test_forward_flops_are_what_torch_executes(name: str) -> None:
    """The explicit path fills the whole square, masked half included: each token meets all T."""
    config, tokens = FLOP_CONFIGS[name], 11
    ours = forward_flops(config, tokens)
    assert executed(config, tokens, backward=False) == tokens * ours.total
    parts = ours.projections + ours.attention + ours.feed_forward + ours.head
    assert ours.total == parts


@pytest.mark.parametrize("name", ["tiny", "gqa", "full queries"])
def test_training_is_three_forwards(name: str) -> None:
    config, tokens = FLOP_CONFIGS[name], 11
    square = 3 * tokens * forward_flops(config, tokens).total
    assert executed(config, tokens, backward=True) == square
    # Causally, the mean token meets (T + 1) / 2 others, itself included, rather than T.
    per_token = 3 * forward_flops(config, sum(range(1, tokens + 1)) / tokens).total
    assert training_flops_per_token(config, tokens) == per_token
    assert training_flops_per_token(config, tokens) < square / tokens


@pytest.mark.parametrize("config", [ModelConfig.tiny(), GQA], ids=["mla", "gqa"])
def test_flops_by_part(config: ModelConfig) -> None:
    """Two operations a weight in use; attention alone grows, and linearly, with the context."""
    near, far = forward_flops(config, 10), forward_flops(config, 30)
    assert far.attention == 3 * near.attention
    assert dataclasses.replace(far, attention=0) == dataclasses.replace(near, attention=0)
    parts = counted(config)
    with torch.device("meta"):
        model = Transformer(config)
    norms = sum(
        p.numel()
        for n, p in model.named_parameters()
        if "_layernorm" in n and "self_attn" in n and ".2." not in n
    )
    assert near.projections == 2 * (parts["attention"] - norms)
    assert near.head == 2 * config.hidden_size * config.vocab_size
    used = parts["routed_experts"] - parts["idle_experts"]
    fed = used + parts["dense_ffn"] + parts["shared_experts"] + parts["routers"]
    assert near.feed_forward == 2 * fed


def test_v3_trains_at_250_gflops_a_token() -> None:
    """Insights, Table 2, for sequences of 4,096."""
    assert training_flops_per_token(V3, 4096) / 1e9 == pytest.approx(250, rel=0.005)


# ------------------------------------------------------------------------------------------ cache


@pytest.mark.parametrize("name", FLOP_CONFIGS)
def test_cache_bytes_against_live_caches(name: str) -> None:
    config = FLOP_CONFIGS[name]
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        model = oracles.shaken(config).to(dtype)
        for expanded in {False, config.attention == "mla"}:
            cache = model.new_cache(2, 12, expanded=expanded)
            for tokens in (4, 1):
                model(torch.randint(0, config.vocab_size, (2, tokens)), cache)
            assert cache.nbytes == cache_bytes(config, 5, 2, size, expanded)
            numbers = cache_numbers_per_token(config, expanded)
            assert cache.nbytes == config.num_hidden_layers * 2 * 5 * numbers * size


def test_published_cache_sizes() -> None:
    """Insights Table 1, bytes per token in BF16; two of its models need only widths."""
    assert cache_bytes(V3, 1) == 70_272
    qwen = V3.replace(
        attention="gqa", num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8
    )
    llama = V3.replace(attention="gqa", num_hidden_layers=126, num_key_value_heads=8)
    assert cache_bytes(qwen, 1) == 327_680
    assert cache_bytes(llama, 1) == 516_096
    assert cache_bytes(V3, 131_072) == 9_210_691_584  # 8.58 GiB, the rotary 64 included


@pytest.mark.parametrize("name", CONFIGS)
def test_checkpoint_bytes_against_a_converted_model(name: str) -> None:
    config = CONFIGS[name]
    with torch.device("meta"):
        model = Transformer(config)
    convert_to_fp8(model)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    cast = {row.name: shapes[row.name] for row in formats(model) if "E4M3" in row.weight}
    blocks = 0
    for *stacked, rows, columns in cast.values():
        blocks += math.prod(stacked) * math.ceil(rows / 128) * math.ceil(columns / 128)
    codes = sum(map(math.prod, cast.values()))
    copies = 2 * config.num_nextn_predict_layers * model.lm_head.weight.numel()
    rest = sum(map(math.prod, shapes.values())) - codes + copies
    biases = sum(gate.e_score_correction_bias.numel() for gate in model.gates)
    assert checkpoint_bytes(config) == StoredBytes(codes, 4 * blocks, 2 * rest, 4 * biases)


def test_v3_checkpoint_by_format() -> None:
    """The counts that are published for the checkpoint, and what follows from them."""
    stored = checkpoint_bytes(V3)
    assert stored.fp8 == 680_571_043_840
    assert stored.bf16 == 2 * 3_918_786_560
    assert stored.scales + stored.fp32 == 4 * 41_555_600
    assert round(stored.total / 1e9, 2) == 688.57
