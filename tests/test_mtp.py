"""mtp: which token each depth reads, which it is asked for, and what it shares with the model."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dsv3_mini import ModelConfig, Transformer
from dsv3_mini.mtp import MTPLayer, mtp_loss
from tests.reference import oracles

TINY = ModelConfig.tiny()
DEPTHS = pytest.mark.parametrize("depths", [1, 2, 3])


def chain(depths: int, seed: int = 0, **changes: object) -> Transformer:
    return oracles.shaken(TINY.replace(num_nextn_predict_layers=depths, **changes), seed)


def mtp_layers(model: Transformer) -> list[MTPLayer]:
    return list(model.model.layers[model.config.num_hidden_layers :])


def some_tokens(length: int, batch: int = 2) -> Tensor:
    return torch.randint(0, TINY.vocab_size, (batch, length))


# ---------------------------------------------------------------------- which token, which target


@DEPTHS
def test_depth_k_reads_token_i_plus_k(depths: int) -> None:
    """Report eq 21: at i, the embedding of t_{i+k} beside the state of depth k - 1."""
    model = chain(depths)
    seen: list[Tensor] = []
    states: list[Tensor] = []
    for layer in mtp_layers(model):
        layer.eh_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        layer.shared_head.norm.register_forward_hook(lambda _m, _a, out: states.append(out))
    tokens = some_tokens(7)
    result = model(tokens, mtp=True)
    states.insert(0, result.hidden)
    table, width = oracles.numbers(model.model.embed_tokens.weight), TINY.hidden_size
    for k in range(1, depths + 1):
        layer = mtp_layers(model)[k - 1]
        assert seen[k - 1].shape == (2, 7 - k, 2 * width)
        for b in range(2):
            for i in range(7 - k):
                embedded = table[int(tokens[b, i + k])]
                embedded = oracles.rms_norm(embedded, oracles.numbers(layer.enorm.weight), 1e-6)
                below = oracles.numbers(states[k - 1][b, i])
                below = oracles.rms_norm(below, oracles.numbers(layer.hnorm.weight), 1e-6)
                joined = oracles.numbers(seen[k - 1][b, i])
                np.testing.assert_allclose(joined[:width], embedded, atol=1e-5)
                np.testing.assert_allclose(joined[width:], below, atol=1e-5)


def test_a_worked_example_of_the_targets() -> None:
    """Text 10 11 12 13 14 15, the last only a target: T = 5.

    Depth 1: positions 0..3 read 11 12 13 14 and are asked for 12 13 14 15.
    Depth 2: positions 0..2 read 12 13 14 and are asked for 13 14 15.
    """
    tokens = torch.tensor([[10, 11, 12, 13, 14, 15]])

    def sure_of(answers: list[int]) -> Tensor:
        logits = torch.zeros(1, len(answers), 20)
        for i, answer in enumerate(answers):
            logits[0, i, answer] = 50.0
        return logits

    right = mtp_loss([sure_of([12, 13, 14, 15]), sure_of([13, 14, 15])], tokens)
    assert [float(loss) for loss in right] == pytest.approx([0.0, 0.0], abs=1e-9)
    # Asked for what it was shown, or for the main model's own target, it would be right here:
    leaked = mtp_loss([sure_of([11, 12, 13, 14]), sure_of([12, 13, 14])], tokens)
    assert [float(loss) for loss in leaked] == pytest.approx([50 * 4 / 5, 50 * 3 / 5])


@pytest.mark.parametrize("seed", range(6))
def test_the_chain_against_equations_21_to_23(seed: int) -> None:
    """Report eqs 21-23, position by position and depth by depth."""
    config = oracles.small_config(seed, num_nextn_predict_layers=1 + seed % 2)
    model = oracles.shaken(config, seed)
    tokens = torch.randint(0, config.vocab_size, (2, 8))
    result = model(tokens, mtp=True)
    for b in range(2):
        text = tokens[b].tolist()
        state = oracles.hidden(model, text)
        np.testing.assert_allclose(result.hidden[b], state, atol=2e-5)
        expected = oracles.mtp_logits(model, text, state)
        for ours, slow in zip(result.mtp_logits, expected, strict=True):
            np.testing.assert_allclose(ours[b], slow, atol=5e-5)


# -------------------------------------------------------------------------------------- causality


def changed_positions(before: Tensor, after: Tensor) -> list[bool]:
    # Experts see other batches, so the last digits of a double may move without any meaning.
    return ((before - after).abs() > 1e-10).any(dim=-1).any(dim=0).tolist()


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("attention", ["mla", "gqa"])
def test_no_logit_sees_its_answer(attention: str, cached: bool) -> None:
    """Changing t_j changes main logits from j on, and depth k's from i = j - k on: no others."""
    length = 8
    model = chain(2, attention=attention).double()

    def run(tokens: Tensor) -> list[Tensor]:
        cache = model.new_cache(1, length, mtp=True) if cached else None
        pieces = tokens.split([3, 1, 4], dim=1) if cached else [tokens]
        results = [model(piece, cache, mtp=True) for piece in pieces]
        parts = [[r.logits for r in results]]
        parts += [[r.mtp_logits[k] for r in results] for k in range(2)]
        return [torch.cat(part, dim=1) for part in parts]

    tokens = some_tokens(length, batch=1)
    before = run(tokens)
    for j in range(length):
        other = tokens.clone()
        other[0, j] = (other[0, j] + 1) % TINY.vocab_size
        after = run(other)
        for k in range(3):  # k = 0 is the main model
            changed = changed_positions(before[k], after[k])
            assert changed == [i + k >= j for i in range(length - k)], f"t_{j}, depth {k}"


# ------------------------------------------------------------------------------------------- loss


@DEPTHS
def test_loss_and_gradient_against_a_loop(depths: int) -> None:
    """Report eq 24: T - k terms, divided by T; averaged over the batch."""
    length, vocabulary = 6, 9
    tokens = torch.randint(0, vocabulary, (3, length + 1))
    logits = [
        torch.randn(3, length - k, vocabulary, dtype=torch.float64, requires_grad=True)
        for k in range(1, depths + 1)
    ]
    ours = mtp_loss(logits, tokens)
    assert len(ours) == depths
    for k in range(1, depths + 1):
        slow = torch.zeros((), dtype=torch.float64)
        for b in range(3):
            for i in range(length - k):
                powers = logits[k - 1][b, i].exp()
                probability = powers[tokens[b, i + k + 1]] / powers.sum()
                slow = slow - probability.log() / length / 3
        assert ours[k - 1].item() == pytest.approx(slow.item(), rel=1e-12)
        (got,) = torch.autograd.grad(ours[k - 1], logits[k - 1])
        (expected,) = torch.autograd.grad(slow, logits[k - 1])
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14)


def test_ignorance_costs_the_logarithm_of_the_vocabulary() -> None:
    """Uniform logits: ln V a term, times (T - k) / T. Dividing by T - k would give ln V."""
    tokens = torch.randint(0, 16, (2, 11))
    losses = mtp_loss([torch.zeros(2, 9, 16), torch.zeros(2, 8, 16)], tokens)
    expected = [math.log(16) * 9 / 10, math.log(16) * 8 / 10]
    assert [float(loss) for loss in losses] == pytest.approx(expected)


def test_the_models_logits_fit_the_loss() -> None:
    """All T + 1 tokens for the loss, T for the model, one list entry a depth."""
    model, tokens = chain(2), some_tokens(9)
    result = model(tokens[:, :-1], mtp=True)
    assert [tuple(x.shape) for x in result.mtp_logits] == [(2, 7, 128), (2, 6, 128)]
    assert len(mtp_loss(result.mtp_logits, tokens)) == 2


# --------------------------------------------------------------------------------- what is shared


@DEPTHS
def test_embedding_and_head_are_the_main_models(depths: int) -> None:
    model = chain(depths)
    for layer in mtp_layers(model):
        assert layer.embed_tokens is model.model.embed_tokens
        assert layer.shared_head.head is model.lm_head
        assert layer.embed_tokens.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
        assert layer.shared_head.head.weight.data_ptr() == model.lm_head.weight.data_ptr()
        assert layer.shared_head.norm is not model.model.norm
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    assert len({id(layer.eh_proj) for layer in mtp_layers(model)}) == depths  # modules of their own
    names = [name for name, _ in model.named_parameters()]
    assert not [n for n in names if "layers" in n and ("embed_tokens" in n or "head.head" in n)]


def test_shared_gradients_are_the_sum_of_both_uses() -> None:
    """A copy whose MTP layer has its own tables splits the gradient into its two parts."""
    model = chain(1).double().requires_grad_()
    split = copy.deepcopy(model)
    layer = mtp_layers(split)[0]
    layer.embed_tokens = copy.deepcopy(layer.embed_tokens)
    layer.shared_head.head = copy.deepcopy(layer.shared_head.head)
    tokens = some_tokens(9)
    for each in (model, split):
        result = each(tokens[:, :-1], mtp=True)
        main = nn.functional.cross_entropy(result.logits.flatten(0, 1), tokens[:, 1:].flatten())
        (main + mtp_loss(result.mtp_logits, tokens)[0]).backward()
    pairs = [
        (model.model.embed_tokens, split.model.embed_tokens, layer.embed_tokens),
        (model.lm_head, split.lm_head, layer.shared_head.head),
    ]
    for shared, first, second in pairs:
        parts = (first.weight.grad, second.weight.grad)
        assert all(part.abs().max() > 1e-4 for part in parts)
        torch.testing.assert_close(shared.weight.grad, parts[0] + parts[1], rtol=1e-9, atol=1e-12)


def test_mtp_trains_the_main_model_too() -> None:
    model = chain(2).requires_grad_()
    tokens = some_tokens(9)
    mtp_loss(model(tokens[:, :-1], mtp=True).mtp_logits, tokens)[1].backward()
    unmoved = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert unmoved == []  # the second depth's loss reaches all: layers, norms, and depth 1


# -------------------------------------------------------------------------- beside the main model


@pytest.mark.parametrize("cached", [False, True])
def test_the_main_model_does_not_notice(cached: bool) -> None:
    model, tokens = chain(2), some_tokens(8)
    caches = [model.new_cache(2, 8, mtp=mtp) if cached else None for mtp in (True, False)]
    with_mtp, without = (
        model(tokens, c, mtp=m) for c, m in zip(caches, (True, False), strict=True)
    )
    assert torch.equal(with_mtp.logits, without.logits)
    assert torch.equal(with_mtp.hidden, without.hidden)
    assert without.mtp_logits == []
    assert len(without.routing) == len(with_mtp.routing) - 2


def test_the_embedding_comes_first() -> None:
    """eh_proj = [I | 0] lets the embedding through, [0 | I] the state, as released weights do."""
    model = chain(1)
    layer, width = mtp_layers(model)[0], TINY.hidden_size
    entering: list[Tensor] = []
    layer.input_layernorm.register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    tokens = some_tokens(6)
    own = layer.eh_proj.weight.clone()
    one, none = torch.eye(width), torch.zeros(width, width)
    swapped = torch.cat((own[:, width:], own[:, :width]), dim=1)
    for weight in (torch.cat((one, none), 1), torch.cat((none, one), 1), own, swapped):
        layer.eh_proj.weight.copy_(weight)
        hidden = model(tokens, mtp=True).hidden
    table = oracles.numbers(model.model.embed_tokens.weight)
    embedded = oracles.rms_norm(table[tokens[:, 1:]], oracles.numbers(layer.enorm.weight), 1e-6)
    state = oracles.numbers(hidden[:, :-1])
    state = oracles.rms_norm(state, oracles.numbers(layer.hnorm.weight), 1e-6)
    first, last = oracles.numbers(own[:, :width]), oracles.numbers(own[:, width:])
    expected = [
        embedded,
        state,
        embedded @ first.T + state @ last.T,
        embedded @ last.T + state @ first.T,
    ]
    for got, wanted in zip(entering, expected, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)
    assert np.abs(expected[2] - expected[3]).max() > 0.1


# ------------------------------------------------------------------------------------------ cache


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ["latent", "expanded", "gqa"])
@DEPTHS
def test_cached_equals_uncached(depths: int, kind: str, seed: int) -> None:
    """Random chunks, a third of them one token: every depth's logits, wherever the cuts fall."""
    length = 13
    attention = "gqa" if kind == "gqa" else "mla"
    model = chain(depths, seed, attention=attention).double()
    tokens = some_tokens(length)
    whole = model(tokens, mtp=True)
    cache = model.new_cache(2, length, mtp=True, expanded=kind == "expanded")
    lengths = [1] * length if seed == 0 else oracles.chunks(length, seed)
    results = [model(piece, cache, mtp=True) for piece in tokens.split(lengths, dim=1)]
    got = torch.cat([r.logits for r in results], dim=1)
    torch.testing.assert_close(got, whole.logits, rtol=0, atol=1e-12)
    for k in range(depths):
        got = torch.cat([r.mtp_logits[k] for r in results], dim=1)
        torch.testing.assert_close(got, whole.mtp_logits[k], rtol=0, atol=1e-12)
    assert [inner.length for inner in cache.mtp] == [length - k for k in range(1, depths + 1)]


def test_too_few_tokens_give_no_prediction() -> None:
    result = chain(3)(some_tokens(2), mtp=True)
    assert [tuple(x.shape) for x in result.mtp_logits] == [(2, 1, 128), (2, 0, 128), (2, 0, 128)]
