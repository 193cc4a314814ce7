"""One step against a loop written by hand, and what a whole run promises."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_mini.config import ConfigError, ModelConfig
from dsv3_mini.data import Corpus
from dsv3_mini.model import Transformer
from dsv3_mini.train import (
    Record,
    TrainConfig,
    evaluate,
    learning_rate,
    new_state,
    train,
    train_step,
)

TINY = ModelConfig.tiny()
SETTINGS = TrainConfig(steps=6, batch_size=4, seq_len=16, warmup=2, gamma=0.01, alpha=0.02)


def changed(**values: float) -> TrainConfig:
    return dataclasses.replace(SETTINGS, **values)


def random_corpus() -> Corpus:
    generator = torch.Generator().manual_seed(1)
    streams = [torch.randint(128, (300,), generator=generator) for _ in range(4)]
    return Corpus(
        {"python": streams[0], "prose": streams[1]},
        {"python": streams[2], "prose": streams[3]},
        128,
    )


def exact_model(config: ModelConfig = TINY) -> Transformer:
    """In float64, since Adam's first step turns a gradient's rounding into a whole step."""
    torch.manual_seed(0)
    return Transformer(config).double()


def biases(model: Transformer) -> list[Tensor]:
    return [gate.e_score_correction_bias.clone() for gate in model.gates]


def run(settings: TrainConfig, corpus: Corpus, seed: int = 0) -> tuple[Transformer, list[Record]]:
    torch.manual_seed(seed)
    model = Transformer(TINY)
    return model, list(train(model, corpus, settings))


@pytest.mark.parametrize("clip", [0.05, 1e6])
def test_three_steps_equal_a_loop_written_by_hand(clip: float) -> None:
    """Report eq 25 added to the main loss; AdamW and the step of the biases written out."""
    settings = changed(clip=clip)
    config = TINY.replace(num_nextn_predict_layers=2)
    ours, theirs = exact_model(config), exact_model(config)
    state = new_state(ours, settings)
    # Plain AdamW, written out; norms are known by their name and not by their shape.
    moments = {
        name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in theirs.named_parameters()
    }
    decayed = {name for name in moments if not name.endswith("norm.weight")}
    assert 0 < len(decayed) < len(moments)
    for step, rate in enumerate((1.5e-3, 3e-3, 3e-3)):
        tokens, _ = random_corpus().batch(step, 4, 16)
        record = train_step(ours, state, settings, [tokens])

        theirs.zero_grad()
        output = theirs(tokens[:, :-1], mtp=True)
        log_p = output.logits.log_softmax(-1)
        main = -log_p.gather(-1, tokens[:, 1:, None]).mean()
        further = []
        for depth, logits in enumerate(output.mtp_logits, start=1):
            picked = logits.log_softmax(-1).gather(-1, tokens[:, depth + 1 :, None])
            further.append(-picked.sum() / (4 * 16))  # eq 24: T - k terms, divided by T
        balance = output.balance_loss
        (main + 0.3 * (further[0] + further[1]) / 2 + 0.02 * balance).backward()
        gradients = {name: p.grad.clone() for name, p in theirs.named_parameters()}
        norm = math.sqrt(sum(float((g * g).sum()) for g in gradients.values()))
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                gradient = gradients[name] * min(1.0, clip / (norm + 1e-6))
                first, second = moments[name]
                first.mul_(0.9).add_(gradient, alpha=0.1)
                second.mul_(0.95).add_(gradient**2, alpha=0.05)
                m, v = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.95 ** (step + 1))
                parameter.mul_(1 - rate * (0.1 if name in decayed else 0.0))
                parameter.sub_(rate * m / (v.sqrt() + 1e-8))
            for gate, load in zip(theirs.gates, output.router_counts.tolist(), strict=True):
                mean = sum(load) / len(load)
                signs = [(mean > one) - (mean < one) for one in load]
                gate.e_score_correction_bias += 0.01 * torch.tensor(signs)

        assert record.step == state.step == step + 1
        assert record.loss == pytest.approx(main.item(), abs=1e-9)
        assert record.mtp_losses == pytest.approx([loss.item() for loss in further], abs=1e-9)
        assert record.balance_loss == pytest.approx(balance.item(), abs=1e-9)
        assert record.grad_norm == pytest.approx(norm, rel=1e-9)
        assert record.learning_rate == pytest.approx(rate)
        assert torch.equal(record.counts_LE, output.router_counts)
        assert record.tokens == 4 * 16
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9, msg=lambda text, n=name: n + text)
        for mine, other in zip(biases(ours), biases(theirs), strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-7)
            assert step or mine.any()


def test_two_micro_batches_are_one_batch_of_their_rows() -> None:
    whole, parts = exact_model(), exact_model()
    tokens, _ = random_corpus().batch(0, 8, 16)
    one = train_step(whole, new_state(whole, SETTINGS), SETTINGS, [tokens])
    two = train_step(parts, new_state(parts, SETTINGS), SETTINGS, [tokens[:4], tokens[4:]])
    for (name, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert (a - b).abs().max().item() < 1e-6, name
    for a, b in zip(biases(whole), biases(parts), strict=True):
        assert torch.equal(a, b)
        assert float(b.abs().max()) == pytest.approx(0.01)  # once, not once a micro-batch
    assert torch.equal(one.counts_LE, two.counts_LE)
    assert one.tokens == two.tokens == 8 * 16
    assert one.loss == pytest.approx(two.loss, abs=1e-9)
    assert one.grad_norm == pytest.approx(two.grad_norm, abs=1e-9)


def test_a_step_takes_its_own_micro_batches() -> None:
    settings = changed(accumulate=2, steps=2)
    model, records = run(settings, random_corpus())
    torch.manual_seed(0)
    other = Transformer(TINY)
    state = new_state(other, settings)
    for numbers in ((0, 1), (2, 3)):
        rows = [random_corpus().batch(number, 4, 16)[0] for number in numbers]
        train_step(other, state, settings, rows)
    assert [record.tokens for record in records] == [128, 128]
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_evaluate_equals_a_loop_and_touches_nothing() -> None:
    model, _ = run(changed(steps=2), random_corpus())
    model.train()
    model.zero_grad()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    windows = random_corpus().windows("prose", 16, 5)
    losses = [evaluate(model, windows, batch_size) for batch_size in (1, 2, 16)]
    assert torch.equal(random_state, torch.get_rng_state())
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    with torch.no_grad():
        rows = [F.cross_entropy(model(row[None, :-1]).logits[0], row[1:]) for row in windows]
    assert losses == pytest.approx([float(torch.stack(rows).mean())] * 3, abs=1e-5)
    model.eval()
    evaluate(model, windows)
    assert not model.training


@pytest.mark.parametrize("shape", [(17,), (0, 17)])
def test_evaluate_refuses_other_windows(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"windows are .*; expected \(n, seq \+ 1\)"):
        evaluate(Transformer(TINY), torch.zeros(shape, dtype=torch.int64))


def test_learning_rate_warms_up_and_ends_at_its_final_share() -> None:
    settings = TrainConfig(steps=110, warmup=10, learning_rate=2.0, final_ratio=0.1)
    rates = [learning_rate(step, settings) for step in range(111)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10] == 2.0
    assert rates[60] == pytest.approx(1.1)  # half way, half way between 2.0 and 0.2
    assert rates[110] == pytest.approx(0.2)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert learning_rate(500, settings) == pytest.approx(0.2)
    assert learning_rate(0, dataclasses.replace(settings, warmup=0)) == 2.0
    assert learning_rate(0, TrainConfig(steps=1, warmup=1)) == 3e-3


def test_loss_falls_on_a_text_that_repeats() -> None:
    stream = torch.arange(10, 30).repeat(20)
    corpus = Corpus({"python": stream}, {"python": stream}, 128)
    model, records = run(changed(steps=30, learning_rate=1e-2), corpus)
    assert records[0].loss == pytest.approx(math.log(128), abs=0.2)
    assert records[-1].loss < 0.7 * records[0].loss
    assert records[-1].mtp_losses[0] < 0.8 * records[0].mtp_losses[0]
    assert evaluate(model, corpus.windows("python", 16, 4)) < 0.7 * records[0].loss


def test_the_same_seed_gives_the_same_run_and_another_one_does_not() -> None:
    one, first = run(SETTINGS, random_corpus())
    two, second = run(SETTINGS, random_corpus())
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for a, b in zip(first, second, strict=True):
        assert {**a.scalars(), "seconds": 0} == {**b.scalars(), "seconds": 0}
    _, other = run(changed(seed=1), random_corpus())  # other batches for the same weights
    assert other[0].loss != first[0].loss


def test_without_lambda_the_main_model_learns_as_if_there_were_no_mtp() -> None:
    # alpha is 0, too: the MTP layer's balance loss would also reach the main model.
    settings = changed(mtp_lambda=0.0, alpha=0.0)
    tokens, _ = random_corpus().batch(0, 4, 16)
    with_mtp, without = exact_model(), exact_model(TINY.replace(num_nextn_predict_layers=0))
    without.load_state_dict({name: with_mtp.state_dict()[name] for name in without.state_dict()})
    record = train_step(with_mtp, new_state(with_mtp, settings), settings, [tokens])
    alone = train_step(without, new_state(without, settings), settings, [tokens])
    gradients = {name: p.grad for name, p in with_mtp.named_parameters()}
    for name, parameter in without.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=1e-12)
    assert record.grad_norm == pytest.approx(alone.grad_norm, rel=1e-9)
    assert len(record.mtp_losses) == 1
    assert alone.mtp_losses == ()
    trained = exact_model()
    train_step(trained, new_state(trained, SETTINGS), changed(alpha=0.0), [tokens])
    assert not torch.equal(trained.lm_head.weight.grad, gradients["lm_head.weight"])


def test_a_model_without_experts_trains() -> None:
    config = TINY.replace(first_k_dense_replace=2, num_nextn_predict_layers=0)
    [record] = train(Transformer(config), random_corpus(), changed(steps=1))
    assert record.max_violation == ()
    assert record.balance_loss == 0


def test_a_run_goes_on_with_its_state_and_stops_at_the_last_step() -> None:
    whole, _ = run(SETTINGS, random_corpus())
    torch.manual_seed(0)
    model = Transformer(TINY)
    state = new_state(model, SETTINGS)
    for record in train(model, random_corpus(), SETTINGS, state):
        if record.step == 2:
            break
    rest = [record.step for record in train(model, random_corpus(), SETTINGS, state)]
    assert rest == [3, 4, 5, 6]
    assert list(train(model, random_corpus(), SETTINGS, state)) == []
    for a, b in zip(whole.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_record_fits_in_a_line_of_json() -> None:
    _, [record] = run(changed(steps=1), random_corpus())
    line = json.loads(json.dumps(record.scalars()))
    assert line["step"] == 1
    assert torch.equal(torch.tensor(line["counts_LE"]), record.counts_LE)
    assert record.counts_LE.sum(1).tolist() == [4 * 16 * 3, 4 * 15 * 3]  # the MTP layer sees T - 1
    assert record.tokens_per_second == pytest.approx(64 / record.seconds)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps is 0; expected an integer of at least 1"),
        ({"batch_size": 2.0}, "batch_size is 2.0; expected an integer"),
        ({"accumulate": True}, "accumulate is True; expected an integer"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; expected a number above 0"),
        ({"clip": math.nan}, "clip is nan; expected a number above 0"),
        ({"gamma": -1}, "gamma is -1; expected 0 or more"),
        ({"warmup": -1}, "warmup is -1; expected 0 or more"),
        ({"mtp_lambda": math.nan}, "mtp_lambda is nan; expected 0 or more"),
        ({"final_ratio": 1.5}, "final_ratio is 1.5; expected 0 to 1"),
        ({"beta2": -0.1}, "beta2 is -0.1; expected 0 to 1"),
    ],
)
def test_impossible_settings_are_named(values: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**values)


@pytest.mark.parametrize(
    ("seq_len", "message"),
    [
        (129, "seq_len 129 exceeds max_position_embeddings 128; shorten it"),
        (1, "seq_len 1 leaves nothing to predict at MTP depth 1; expected at least 2"),
    ],
)
def test_sequences_that_the_model_cannot_train_on_are_refused(seq_len: int, message: str) -> None:
    model = Transformer(TINY)
    before = model.lm_head.weight.clone()
    with pytest.raises(ConfigError, match=message):
        next(train(model, random_corpus(), changed(seq_len=seq_len)))
    assert torch.equal(model.lm_head.weight, before)


def test_sequences_longer_than_the_text_are_refused() -> None:
    short = Corpus({"prose": torch.zeros(10, dtype=torch.int64)}, {}, 128)
    with pytest.raises(ValueError, match=r"seq_len 16, but .* has 10 tokens"):
        next(train(Transformer(TINY), short, SETTINGS))
