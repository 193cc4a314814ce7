"""Speculative decoding is plain decoding: the same tokens, or the same distribution."""

from __future__ import annotations

from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv3_mini import ModelConfig, Transformer
from dsv3_mini.generate import generate as plain
from dsv3_mini.speculative import Acceptance, generate, verify
from tests.reference import oracles

TINY = ModelConfig.tiny()


def agreeing(config: ModelConfig, seed: int, share: float) -> Transformer:
    """A model in fp64 whose module drafts well: its state is, to a ``share``, a good predictor.

    The next token hardly depends on anything but the token before it, in both.
    """
    model = oracles.shaken(config, seed).double()
    torch.manual_seed(seed)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(share)
        layer = model.model.layers[config.num_hidden_layers]
        hidden = config.hidden_size
        layer.eh_proj.weight.zero_()
        layer.eh_proj.weight[:, :hidden] = torch.eye(hidden)
    return model


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("seed", range(12))
def test_greedy_is_token_for_token_the_same(seed: int, batch: int) -> None:
    config = oracles.small_config(seed)
    config = config.replace(num_nextn_predict_layers=1)
    model = agreeing(config, seed, 1 + 10 * (seed % 3))
    for length, count in ((1, 1), (1, 2), (4, 3), (7, 20)):
        prompt = torch.randint(0, config.vocab_size, (batch, length))
        out, stats = generate(model, prompt, count)
        assert torch.equal(out, plain(model, prompt, count))
        assert len(stats.fates) == count
        assert stats.accepted <= stats.drafted


def test_some_drafts_are_accepted_and_some_refused() -> None:
    """Else the test above would show little."""
    total = Acceptance()
    for seed in range(12):
        model = agreeing(oracles.small_config(seed).replace(num_nextn_predict_layers=1), seed, 20)
        _, stats = generate(model, [1, 2, 3], 24)
        total.drafted += stats.drafted
        total.accepted += stats.accepted
    assert 0.1 < total.rate < 0.9


def test_a_module_that_is_sure_and_wrong_is_not_believed() -> None:
    total = Acceptance()
    for seed in range(6):
        model = agreeing(oracles.small_config(seed).replace(num_nextn_predict_layers=1), seed, 20)
        layer = model.model.layers[model.config.num_hidden_layers]
        layer.shared_head.norm.weight.mul_(1000)  # nearly all of the probability on one token
        out, stats = generate(model, [1, 2, 3], 24)
        assert torch.equal(out, plain(model, [1, 2, 3], 24))
        total.drafted += stats.drafted
        total.accepted += stats.accepted
    assert 0.1 < total.rate < 0.9


def test_drafts_are_what_the_module_says_about_the_whole_text() -> None:
    """Without a cache, at every step: nothing of a refused draft lives on in the next one."""
    kinds = set()
    for seed in range(6):
        model = agreeing(oracles.small_config(seed).replace(num_nextn_predict_layers=1), seed, 20)
        text, stats = generate(model, [1, 2, 3], 24)
        fates, known, steps = ["plain"], 4, 0
        while known < 26:
            steps += 1
            draft = model(text[:, :known], mtp=True).mtp_logits[0][0, -1].argmax()
            accepted = bool(draft == text[0, known])
            fates += ["accepted", "plain"] if accepted else ["rejected"]
            known += 2 if accepted else 1
        fates += ["plain"] * (27 - known)  # no room for a draft
        assert stats.fates == fates
        assert stats.steps == steps + (27 - known)
        assert (stats.drafted, stats.accepted) == (steps, fates.count("accepted"))
        kinds |= set(fates)
    assert kinds == {"plain", "accepted", "rejected"}


def test_every_place_of_a_stop_token() -> None:
    """Also inside an accepted draft, and in one row before the others."""
    found = set()
    for seed in range(4):
        model = agreeing(TINY, seed, 20)
        prompt = torch.randint(0, 128, (2, 3))
        text = plain(model, prompt, 14)
        for stop in set(text[:, 3:].flatten().tolist()):
            for rows in (prompt, prompt[:1]):
                out, stats = generate(model, rows, 14, stop_token=stop)
                assert torch.equal(out, plain(model, rows, 14, stop_token=stop))
                found.add(stats.fates[-1])
                # Drafts count for rows that go on, not for those that only wait.
                drafts = [i for i, fate in enumerate(stats.fates) if fate != "plain"]
                alive = [(out[:, 3 : 3 + i] != stop).all(dim=1).sum() for i in drafts]
                assert stats.accepted <= stats.drafted == sum(alive)
    assert found == {"plain", "accepted", "rejected"}


def test_the_last_position_can_be_filled() -> None:
    config = TINY.replace(max_position_embeddings=16)
    model = agreeing(config, 0, 20)
    prompt = torch.randint(0, 128, (1, 5))
    assert torch.equal(generate(model, prompt, 12)[0], plain(model, prompt, 12))
    with pytest.raises(ValueError, match="max_position_embeddings"):
        generate(model, prompt, 13)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_verify_has_exactly_the_main_models_distribution(temperature: float) -> None:
    rows, size = 200_000, 7
    p, q = torch.randn(2, size) * 1.5
    draft = torch.multinomial((q / temperature).softmax(-1), rows, replacement=True)
    generator = torch.Generator().manual_seed(1)
    token, kept = verify(p.expand(rows, -1), q.expand(rows, -1), draft, temperature, generator)
    wanted = (p / temperature).softmax(-1)
    seen = torch.bincount(token, minlength=size) / rows
    assert (seen - wanted).abs().max() < 4 * (0.25 / rows) ** 0.5
    overlap = torch.minimum(wanted, (q / temperature).softmax(-1)).sum().item()
    assert kept.float().mean().item() == pytest.approx(overlap, abs=4 * (0.25 / rows) ** 0.5)
    assert torch.equal(token[kept], draft[kept])


def test_verify_at_temperature_0_is_equality_with_the_best() -> None:
    p = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    token, kept = verify(p, torch.zeros(2, 3), torch.tensor([1, 1]), 0.0, None)
    assert token.tolist() == [1, 0]
    assert kept.tolist() == [True, False]


def sequences(model: Transformer, prompt: Tensor, count: int) -> dict[tuple[int, ...], float]:
    """The probability of every continuation, by exact enumeration."""
    size = model.config.vocab_size
    found = {}
    for text in product(range(size), repeat=count):
        tokens = torch.cat((prompt, torch.tensor([text])), dim=1)
        logs = model(tokens).logits.log_softmax(-1)[0, prompt.shape[1] - 1 : -1]
        found[text] = float(logs.gather(-1, torch.tensor(text)[:, None]).sum().exp())
    return found


def test_sampled_text_has_the_distribution_of_plain_sampling() -> None:
    """Three tokens over a vocabulary of 4: 64 continuations, against their exact probabilities."""
    model = agreeing(TINY.replace(vocab_size=4), 3, 3)
    prompt, runs = torch.tensor([[1, 2]]), 1500
    with torch.no_grad():
        exact = sequences(model, prompt, 3)
    assert sum(exact.values()) == pytest.approx(1)
    counts: Counter[tuple[int, ...]] = Counter()
    rates = []
    for seed in range(runs):
        out, stats = generate(model, prompt.expand(2, -1), 3, temperature=1.0, seed=seed)
        counts.update(tuple(row) for row in out[:, 2:].tolist())
        rates.append(stats.rate)
    assert 0.2 < np.mean(rates) < 0.98  # both branches were taken
    total = 2 * runs
    chi2 = sum((counts[text] - total * p) ** 2 / (total * p) for text, p in exact.items())
    # 63 degrees of freedom: 103 is exceeded once in a thousand.
    assert chi2 < 103


def test_a_seed_repeats_and_bad_input_is_refused() -> None:
    model = oracles.shaken(TINY)
    one, two = (generate(model, [1, 2], 9, temperature=0.9, seed=4)[0] for _ in range(2))
    assert torch.equal(one, two)
    with pytest.raises(ValueError, match="no MTP module"):
        generate(Transformer(TINY.replace(num_nextn_predict_layers=0)), [1, 2], 3)
    for arguments in ({"max_new_tokens": 0}, {"max_new_tokens": 3, "temperature": -1.0}):
        with pytest.raises(ValueError, match="expected"):
            generate(model, [1, 2], **arguments)  # type: ignore[arg-type]


def test_statistics() -> None:
    stats = Acceptance(steps=4, drafted=5, accepted=3, fates=["plain"] * 8)
    assert stats.rate == 0.6
    assert stats.tokens_per_step == 7 / 4
    assert Acceptance().rate == Acceptance().tokens_per_step == 0.0


def test_a_generator_alone_decides_the_draws() -> None:
    """Whatever else has drawn random numbers meanwhile."""
    p, q, draft = torch.randn(64, 5), torch.randn(64, 5), torch.randint(5, (64,))
    answers = []
    for other in (1, 2):
        torch.manual_seed(other)
        mine = torch.Generator().manual_seed(7)
        answers.append(verify(p, q, draft, 1.0, mine))
    assert all(torch.equal(one, two) for one, two in zip(*answers, strict=True))
    assert 0 < int(answers[0][1].sum()) < 64
