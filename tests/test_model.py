"""model: names, results, initialisation, and whole forwards against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dsv3_mini import ModelConfig, Transformer
from tests.reference import oracles

ATTENTION = [
    "q_a_proj.weight", "q_a_layernorm.weight", "q_b_proj.weight", "kv_a_proj_with_mqa.weight",
    "kv_a_layernorm.weight", "kv_b_proj.weight", "o_proj.weight",
]  # fmt: skip
SWIGLU = ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]
MOE = [
    "gate.weight", "gate.e_score_correction_bias",
    "experts.gate_proj", "experts.up_proj", "experts.down_proj",
    *(f"shared_experts.{name}" for name in SWIGLU),
]  # fmt: skip
LAYER = [
    *(f"self_attn.{name}" for name in ATTENTION),
    "input_layernorm.weight", "post_attention_layernorm.weight",
]  # fmt: skip
MTP = [
    "enorm.weight", "hnorm.weight", "eh_proj.weight", "embed_tokens.weight",
    "shared_head.norm.weight", "shared_head.head.weight",
]  # fmt: skip


def test_names_are_the_checkpoints() -> None:
    """tiny: a dense layer 0, an expert layer 1, and MTP as layer 2, as layer 61 is in V3."""
    expected = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    expected += [f"model.layers.0.{name}" for name in LAYER]
    expected += [f"model.layers.0.mlp.{name}" for name in SWIGLU]
    for index in (1, 2):
        expected += [f"model.layers.{index}.{name}" for name in LAYER]
        expected += [f"model.layers.{index}.mlp.{name}" for name in MOE]
    expected += [f"model.layers.2.{name}" for name in MTP]
    assert sorted(Transformer(ModelConfig.tiny()).state_dict()) == sorted(expected)


def test_the_first_layers_are_dense() -> None:
    for dense in range(4):
        config = ModelConfig.tiny().replace(num_hidden_layers=3, first_k_dense_replace=dense)
        names = Transformer(config).state_dict()
        have = [f"model.layers.{index}.mlp.gate.weight" in names for index in range(4)]
        assert have == [False] * dense + [True] * (4 - dense)  # the last one is MTP's


def test_the_size_of_v3() -> None:
    """Counted on a model, on the meta device: parameters and router biases, MTP apart."""
    with torch.device("meta"):
        model = Transformer(ModelConfig.v3())
    main = mtp = 0
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.startswith("model.layers.61."):
            mtp += tensor.numel()
        else:
            main += tensor.numel()
    assert main == 671_026_419_200
    assert mtp == 11_610_068_224
    assert sum(b.numel() for n, b in model.named_buffers() if ".61." not in n) == 58 * 256


# ---------------------------------------------------------------------------------------- forward


@pytest.mark.parametrize("seed", range(8))
def test_logits_against_numpy(seed: int) -> None:
    """A whole model, embedding to head, one token, head and expert at a time."""
    config = oracles.small_config(seed)
    if seed % 4 == 3:
        config = config.replace(attention="gqa", num_key_value_heads=1)
    model = oracles.shaken(config, seed)
    tokens = torch.randint(0, config.vocab_size, (2, 7))
    result = model(tokens)
    for b in range(2):
        state = oracles.hidden(model, tokens[b].tolist())
        np.testing.assert_allclose(result.hidden[b], state, atol=2e-5)
        logits = state @ oracles.numbers(model.lm_head.weight).T
        np.testing.assert_allclose(result.logits[b], logits, atol=5e-5)


def test_hidden_is_what_the_head_reads() -> None:
    model = oracles.shaken(ModelConfig.tiny())
    result = model(torch.randint(0, 128, (2, 6)))
    assert result.logits.shape == (2, 6, 128)
    assert result.hidden.shape == (2, 6, 32)
    expected = oracles.numbers(result.hidden) @ oracles.numbers(model.lm_head.weight).T
    np.testing.assert_allclose(result.logits, expected, atol=1e-5)


def test_forward_repeats_and_changes_nothing() -> None:
    model = oracles.shaken(ModelConfig.tiny()).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokens = torch.randint(0, 128, (2, 9))
    first, second = model(tokens, mtp=True), model(tokens, mtp=True)
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.mtp_logits[0], second.mtp_logits[0])
    assert torch.equal(first.router_counts, second.router_counts)
    assert torch.equal(model.eval()(tokens).logits, first.logits)  # no dropout, no jitter
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_sequences_of_a_batch_do_not_meet() -> None:
    model = oracles.shaken(ModelConfig.tiny()).double()
    tokens = torch.randint(0, 128, (3, 7))
    together = model(tokens).logits
    for b in range(3):
        alone = model(tokens[b : b + 1]).logits[0]
        torch.testing.assert_close(together[b], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_every_path_gives_the_same(seed: int) -> None:
    config = oracles.small_config(seed)
    model = oracles.shaken(config, seed).double()
    tokens = torch.randint(0, config.vocab_size, (2, 9))
    results = [
        model(tokens, mtp=True, absorb=absorb, fused=fused)
        for absorb in (None, True, False)
        for fused in (True, False)
    ]
    for other in results[1:]:
        torch.testing.assert_close(other.logits, results[0].logits, rtol=0, atol=1e-12)
        for got, wanted in zip(other.mtp_logits, results[0].mtp_logits, strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def test_int32_tokens_are_tokens() -> None:
    model = oracles.shaken(ModelConfig.tiny())
    tokens = torch.randint(0, 128, (2, 6))
    for mtp in (False, True):
        small, large = model(tokens.int(), mtp=mtp), model(tokens, mtp=mtp)
        assert torch.equal(small.logits, large.logits)


# ---------------------------------------------------------------------------------------- routing


@pytest.mark.parametrize("mtp", [False, True])
def test_router_counts(mtp: bool) -> None:
    """A row per MoE layer; MTP depth k routes T - k positions and comes last."""
    config = ModelConfig.tiny().replace(num_hidden_layers=4, num_nextn_predict_layers=2)
    model = oracles.shaken(config)
    counts = model(torch.randint(0, 128, (2, 9)), mtp=mtp).router_counts
    assert counts.dtype == torch.int64
    expected = [2 * 9 * 3] * 3 + ([2 * 8 * 3, 2 * 7 * 3] if mtp else [])
    assert counts.shape == (len(expected), 8)
    assert counts.sum(dim=-1).tolist() == expected
    assert len(model.gates) == 5
    in_order = [layer.mlp.gate for layer in model.model.layers[1:]]
    assert [id(gate) for gate in model.gates] == [id(gate) for gate in in_order]


def test_a_row_of_counts_is_its_own_layers() -> None:
    """A bias in layer 2 moves row 1 (layer 0 is dense) and no row above it."""
    model = oracles.shaken(ModelConfig.tiny().replace(num_hidden_layers=4))
    tokens = torch.randint(0, 128, (2, 9))
    before = model(tokens).router_counts
    model.gates[1].e_score_correction_bias[[0, 1]] = 9.0
    after = model(tokens).router_counts
    assert torch.equal(after[0], before[0])
    assert after[1, :2].tolist() == [18, 18]


# --------------------------------------------------------------------------------- initialisation


@pytest.mark.parametrize("std", [0.02, 0.006])
def test_initialisation(std: float) -> None:
    """Every matrix normal with the configured width, norms one, router biases zero."""
    model = Transformer(ModelConfig.mini().replace(initializer_range=std)).requires_grad_(False)
    for name, tensor in model.named_parameters():
        if tensor.dim() == 1:
            assert torch.equal(tensor, torch.ones_like(tensor)), name
            continue
        spread = 4 / (2 * tensor.numel()) ** 0.5  # four standard errors
        assert float(tensor.std()) == pytest.approx(std, rel=spread), name
        assert abs(float(tensor.mean())) < 4 * std / tensor.numel() ** 0.5, name
    assert not any(gate.e_score_correction_bias.any() for gate in model.gates)


def test_a_new_model_is_undecided() -> None:
    """Small weights: the first loss is the logarithm of the vocabulary."""
    model = Transformer(ModelConfig.mini()).requires_grad_(False)
    tokens = torch.randint(0, 2048, (2, 33))
    logits = model(tokens[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert float(loss) == pytest.approx(np.log(2048), abs=0.1)


# ----------------------------------------------------------------------------------------- dtypes


def test_bf16_runs_and_stays_close() -> None:
    """bf16 through prompt, cache and MTP. Rounding may reroute a token, so most, not all, agree."""
    model = oracles.shaken(ModelConfig.mini().replace(initializer_range=0.02))
    tokens = torch.randint(0, 2048, (1, 24))
    exact = model(tokens, mtp=True)
    low = model.bfloat16()
    result = low(tokens, mtp=True)
    assert result.logits.dtype == result.hidden.dtype == torch.bfloat16
    assert result.mtp_logits[0].dtype == torch.bfloat16
    assert result.routing[0].scores_BTE.dtype == torch.float32
    errors = (result.logits.float() - exact.logits).norm(dim=-1) / exact.logits.norm(dim=-1)
    assert float(errors.median()) < 0.03
    cache = low.new_cache(1, 24, mtp=True)
    pieces = [low(piece, cache, mtp=True).logits for piece in tokens.split([20, 1, 3], dim=1)]
    cached = torch.cat(pieces, dim=1)
    assert cached.dtype == torch.bfloat16
    errors = (cached.float() - exact.logits).norm(dim=-1) / exact.logits.norm(dim=-1)
    assert float(errors.median()) < 0.03
