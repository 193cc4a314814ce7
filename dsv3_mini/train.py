"""Training as a generator: one optimizer step, one record, and the caller decides what to do next.

Why a generator: a notebook plots each record, a command writes it to a file, a test stops after
three; none of them needs a callback. Everything that a step needs is its number: batches are a
pure function of it, so a run that was killed and resumed sees what an uninterrupted one saw.

The loss is report eq 25 added to the main one: L + lambda / D x sum_k L^k, plus alpha times the
sequence-wise balance loss (eq 17). After the optimizer's step, and once per step however many
micro-batches it had, each router bias moves by gamma against its expert's load (text after eq 16).

Long runs: ``python -m dsv3_mini.train --out runs/mini --steps 2000``; started again with the same
words, it goes on from the last save. Begun by torchrun, all its processes train one model.

Legend: B batch, T positions, L MoE layers (MTP last), E experts.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_mini.balance import max_violation, update_bias
from dsv3_mini.config import ConfigError, require
from dsv3_mini.data import Corpus
from dsv3_mini.fp8 import convert_to_fp8
from dsv3_mini.model import Transformer
from dsv3_mini.mtp import mtp_loss

Rule = Callable[[Tensor, Tensor, float], Tensor]
Step = Callable[[Transformer, "TrainState", "TrainConfig", list[Tensor], Rule], "Record"]


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Betas, weight decay, clipping, alpha, gamma and lambda are the report's (4.2).

    A step sees ``accumulate`` micro-batches of ``batch_size`` sequences of ``seq_len`` tokens.
    ``learning_rate`` rises linearly over ``warmup`` steps and falls along a cosine to
    ``final_ratio`` of itself. Raises ConfigError.
    """

    steps: int = 200
    batch_size: int = 16
    seq_len: int = 128
    accumulate: int = 1
    learning_rate: float = 3e-3
    final_ratio: float = 0.1
    warmup: int = 20
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    clip: float = 1.0
    gamma: float = 0.001
    alpha: float = 0.0001
    alpha_batch: float = 0.0
    """Weight of the batch-wise loss; V3 has none, notebook 05 compares."""
    mtp_lambda: float = 0.3
    seed: int = 0
    fp8: bool = False
    """Cast the products of linear layers, as report 3.3; the model is converted in place."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "seq_len", "accumulate"):
            require(name, getattr(self, name), 1, whole=True)
        for name in ("learning_rate", "clip"):
            require(name, getattr(self, name), 0, above=True)
        weights = ("gamma", "alpha", "alpha_batch", "mtp_lambda")
        for name in ("warmup", "weight_decay", *weights, "seed"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected 0 or more")
        for name in ("final_ratio", "beta1", "beta2"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected 0 to 1")


@dataclass(frozen=True)
class Record:
    """What one step did. Losses are in nats per token and measured before the step."""

    step: int
    """Steps done, 1 after the first."""
    loss: float
    mtp_losses: tuple[float, ...]
    balance_loss: float
    """Sum over MoE layers before alpha; the number of MoE layers is perfect balance."""
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    counts_LE: Tensor
    """Tokens per layer and expert in this step, int64, on the CPU."""
    max_violation: tuple[float, ...]
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Training tokens of this step over its time."""
        return self.tokens / self.seconds

    def scalars(self) -> dict[str, object]:
        """Everything that JSON can hold, for a log line."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**fields, "counts_LE": self.counts_LE.tolist()}


@dataclass
class TrainState:
    """What changes while training, besides the model: the optimizer and the steps done."""

    optimizer: torch.optim.AdamW
    step: int = 0


def new_state(model: Transformer, config: TrainConfig) -> TrainState:
    """A fresh optimizer. Weight decay acts on matrices only, not on norm weights."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    return TrainState(torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True))


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of step number ``step`` (from 0): linear warm-up, then a cosine."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    done = (step - config.warmup) / max(config.steps - config.warmup, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return config.learning_rate * (config.final_ratio + (1 - config.final_ratio) * cosine)


def train_step(
    model: Transformer, state: TrainState, config: TrainConfig, batches: list[Tensor],
    rule: Rule = update_bias,
) -> Record:  # fmt: skip
    """One optimizer step on micro-batches of tokens (B, T + 1); moves the biases once, at the end.

    ``rule`` makes the next bias of a layer from the present one, its load and gamma.
    Source: report eq 25, and 2.1.2 for the biases; the settings are those of 4.2.
    """
    began = time.perf_counter()
    model.train()
    depths = model.config.num_nextn_predict_layers
    losses: list[Tensor] = []
    counts: list[Tensor] = []
    state.optimizer.zero_grad(set_to_none=True)
    for tokens in batches:
        output = model(tokens[:, :-1], mtp=depths > 0)
        main = F.cross_entropy(output.logits.flatten(0, 1), tokens[:, 1:].flatten())
        further = mtp_loss(output.mtp_logits, tokens)
        balance = output.balance_loss
        extra = sum(further, main.new_zeros(())) * (config.mtp_lambda / max(depths, 1))
        if config.alpha_batch:
            extra = extra + config.alpha_batch * output.batch_balance_loss
        if output.routing:
            counts.append(output.router_counts)
        del output  # the logits are not needed for the gradient: their softmax is
        ((main + extra + config.alpha * balance) / len(batches)).backward()
        losses.append(torch.stack([main, balance, *further]).detach())
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    rate = learning_rate(state.step, config)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.step()
    counts_LE = torch.stack(counts).sum(dim=0) if counts else torch.zeros(0, 1, dtype=torch.int64)
    for gate, load_E in zip(model.gates, counts_LE, strict=True):
        bias_E = gate.e_score_correction_bias
        bias_E.copy_(rule(bias_E, load_E, config.gamma))
    state.step += 1
    main_loss, balance_loss, *mtp_losses = torch.stack(losses).mean(dim=0).tolist()
    return Record(
        step=state.step,
        loss=main_loss,
        mtp_losses=tuple(mtp_losses),
        balance_loss=balance_loss,
        learning_rate=rate,
        grad_norm=float(norm),
        counts_LE=counts_LE.cpu(),
        max_violation=tuple(max_violation(counts_LE).tolist()),
        tokens=sum(tokens[:, 1:].numel() for tokens in batches),
        seconds=time.perf_counter() - began,
    )


def train(
    model: Transformer, corpus: Corpus, config: TrainConfig, state: TrainState | None = None,
    rule: Rule = update_bias, step: Step = train_step,
) -> Iterator[Record]:  # fmt: skip
    """Train until ``config.steps`` steps are done, yielding one Record after each.

    With ``state`` it goes on where that state is; the caller may stop at any time and lose
    nothing. ``step`` is ``parallel.train_step`` where several processes train one model. Raises
    ValueError if the corpus' vocabulary or sequences do not fit the model.
    """
    if config.seq_len > model.config.max_position_embeddings:
        raise ConfigError(
            f"seq_len {config.seq_len} exceeds max_position_embeddings "
            f"{model.config.max_position_embeddings}; shorten it or change the model"
        )
    if config.seq_len <= (depths := model.config.num_nextn_predict_layers):
        raise ConfigError(
            f"seq_len {config.seq_len} leaves nothing to predict at MTP depth {depths}; "
            f"expected at least {depths + 1}"
        )
    if config.fp8:
        convert_to_fp8(model)
    state = state or new_state(model, config)
    where = model.lm_head.weight.device
    while state.step < config.steps:
        first = state.step * config.accumulate
        batches = [
            corpus.batch(number, config.batch_size, config.seq_len, config.seed)[0].to(where)
            for number in range(first, first + config.accumulate)
        ]
        yield step(model, state, config, batches, rule)


@torch.no_grad()
def evaluate(model: Transformer, windows: Tensor, batch_size: int = 16) -> float:
    """Mean next-token loss in nats over held-out windows (n, T + 1); touches nothing."""
    if windows.dim() != 2 or not len(windows):
        raise ValueError(f"windows are {tuple(windows.shape)}; expected (n, seq + 1) with n >= 1")
    was_training = model.training
    model.eval()
    total = 0.0
    for tokens in windows.to(model.lm_head.weight.device).split(batch_size):
        logits = model(tokens[:, :-1]).logits.flatten(0, 1)
        total += F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum").item()
    model.train(was_training)
    return total / windows[:, 1:].numel()


if __name__ == "__main__":
    from dsv3_mini.train_command import main

    sys.exit(main())
