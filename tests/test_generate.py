"""generate: greedy against a loop without a cache, sampling against the softmax."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv3_mini import ModelConfig, Transformer
from dsv3_mini.generate import generate
from tests.reference import oracles

TINY = ModelConfig.tiny()


def greedy_loop(model: Transformer, tokens: Tensor, count: int) -> Tensor:
    """The whole text again for every token."""
    for _ in range(count):
        best = [int(np.argmax(row[-1].numpy())) for row in model(tokens).logits]
        tokens = torch.cat((tokens, torch.tensor(best)[:, None]), dim=1)
    return tokens


@pytest.mark.parametrize("seed", range(6))
def test_greedy_is_an_uncached_argmax_loop(seed: int) -> None:
    config = oracles.small_config(seed)
    if seed == 5:
        config = config.replace(attention="gqa", num_key_value_heads=1)
    model = oracles.shaken(config, seed).double()
    prompt = torch.randint(0, config.vocab_size, (3, 1 + seed))
    out = generate(model, prompt, 12)
    assert out.dtype == torch.int64
    assert torch.equal(out, greedy_loop(model, prompt, 12))
    assert len(set(out[:, prompt.shape[1] :].flatten().tolist())) > 3  # not one token for ever


def test_a_batch_is_its_rows() -> None:
    model = oracles.shaken(TINY).double()
    prompt = torch.randint(0, 128, (4, 5))
    together = generate(model, prompt, 9)
    for row in range(4):
        assert torch.equal(together[row : row + 1], generate(model, prompt[row], 9))


def test_prompts_of_all_kinds() -> None:
    model = oracles.shaken(TINY)
    expected = generate(model, torch.tensor([[5, 6, 7]]), 4)
    assert expected.shape == (1, 7)
    assert expected[0, :3].tolist() == [5, 6, 7]
    for prompt in (
        [5, 6, 7],
        torch.tensor([5, 6, 7]),
        torch.tensor([[5, 6, 7]], dtype=torch.int32),
    ):
        assert torch.equal(generate(model, prompt, 4), expected)


def test_generation_fills_the_last_position() -> None:
    """Prompt and new tokens may exceed the table by one: the last token is never fed back."""
    model = oracles.shaken(TINY.replace(max_position_embeddings=8)).double()
    prompt = torch.randint(0, 128, (1, 4))
    assert torch.equal(generate(model, prompt, 5), greedy_loop(model, prompt, 5))


def test_no_gradient_and_no_trace() -> None:
    model = oracles.shaken(TINY).requires_grad_().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    out = generate(model, [1, 2, 3], 5, temperature=1.0, seed=0)
    assert not out.requires_grad
    assert model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


# --------------------------------------------------------------------------------------- sampling


def test_seeds_repeat() -> None:
    model = oracles.shaken(TINY)
    prompt = torch.randint(0, 128, (2, 4))
    first = generate(model, prompt, 12, temperature=1.0, seed=7)
    torch.manual_seed(99)  # the global generator has no say
    state = torch.get_rng_state()
    assert torch.equal(generate(model, prompt, 12, temperature=1.0, seed=7), first)
    assert torch.equal(torch.get_rng_state(), state)  # and is not used up
    assert not torch.equal(generate(model, prompt, 12, temperature=1.0, seed=8), first)


def chi_square(drawn: list[int], probabilities: np.ndarray) -> float:
    expected = probabilities * len(drawn)
    observed = np.bincount(drawn, minlength=len(probabilities))
    return float(((observed - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.0])
def test_frequencies_are_the_softmax(temperature: float) -> None:
    """4,000 draws from 8 tokens: chi-square with 7 degrees of freedom, beyond 30 once in 10,000."""
    model = oracles.shaken(TINY.replace(vocab_size=8))
    prompt = torch.tensor([[1, 5, 2]])
    logits = oracles.numbers(model(prompt).logits[0, -1])
    out = generate(model, prompt.expand(4000, 3), 1, temperature=temperature, seed=0)
    drawn = out[:, 3].tolist()
    assert chi_square(drawn, oracles.softmax(logits / temperature)) < 30
    for other in (0.6, 1.0, 2.0, 1 / temperature):
        if other != temperature:  # so the bound can tell one temperature from the next
            assert chi_square(drawn, oracles.softmax(logits / other)) > 100


def test_the_second_token_follows_the_first() -> None:
    """Frequencies of the second token given the first, so the cache serves sampling too."""
    model = oracles.shaken(TINY.replace(vocab_size=4))
    out = generate(model, torch.tensor([[1, 3]]).expand(4000, 2), 2, temperature=1.0, seed=1)
    for first in range(4):
        drawn = out[out[:, 2] == first, 3].tolist()
        assert len(drawn) > 100
        logits = oracles.numbers(model(torch.tensor([[1, 3, first]])).logits[0, -1])
        assert chi_square(drawn, oracles.softmax(logits)) < 22  # 3 degrees of freedom


def test_a_cold_sample_is_greedy() -> None:
    model = oracles.shaken(TINY).double()
    prompt = torch.randint(0, 128, (2, 4))
    cold = generate(model, prompt, 8, temperature=1e-4, seed=0)
    assert torch.equal(cold, generate(model, prompt, 8))


# ------------------------------------------------------------------------------------------- stop


def test_a_stopped_row_is_filled_until_every_row_has_stopped() -> None:
    """Six tokens, five rows: each stops at its own time or never; the last one ends it."""
    model = oracles.shaken(TINY.replace(vocab_size=6)).double()
    prompt = torch.randint(0, 6, (5, 4))
    free = generate(model, prompt, 9)
    lengths = []
    for stop in range(6):
        ends = [[*row, stop].index(stop, 4) for row in free.tolist()]  # 13 where it never comes
        length = min(max(ends) + 1, 13)
        out = generate(model, prompt, 9, stop_token=stop)
        assert out.shape == (5, length)
        for row, end in enumerate(ends):
            expected = free[row, :end].tolist() + [stop] * 9
            assert out[row].tolist() == expected[:length]
        lengths.append((length, len(set(ends))))
    assert any(length < 13 and times > 1 for length, times in lengths)  # an early end was seen,
    assert any(length == 13 and times > 1 for length, times in lengths)  # and rows that go on


def test_a_stop_token_in_the_prompt_does_not_stop() -> None:
    model = oracles.shaken(TINY).double()
    free = generate(model, [9, 8, 7], 6)
    unused = next(token for token in (9, 8, 7) if token not in free[0, 3:].tolist())
    assert torch.equal(generate(model, [9, 8, 7], 6, stop_token=unused), free)
