"""Does asking one more question in training help? Small models, several seeds.

Legend: K depths.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3_mini.cache import Cache
from dsv3_mini.config import ModelConfig
from dsv3_mini.course.runs import run_all
from dsv3_mini.data import load_corpus
from dsv3_mini.model import Transformer
from dsv3_mini.moe import Routing
from dsv3_mini.mtp import MTPLayer, mtp_loss
from dsv3_mini.train import TrainConfig, evaluate, train


@dataclass(frozen=True)
class Plan:
    """How much MTP: depths, their weight lambda, and whether they are parallel heads instead."""

    depths: int = 1
    mtp_lambda: float = 0.3
    parallel: bool = False
    """Each depth sees the main model's state and no later token, as in Gloeckle et al."""


@dataclass(frozen=True)
class Outcome:
    """Held-out losses in nats: of the next token, and of each depth; and the time of training."""

    loss: float
    mtp_losses: tuple[float, ...]
    seconds: float


class ParallelHead(MTPLayer):
    """A depth that is not told the token in between: its embedding is replaced by zeros."""

    def forward(  # type: ignore[override]
        self, hidden_BTD: Tensor, tokens_BT: Tensor, cos_TR: Tensor, sin_TR: Tensor,
        cache: Cache | None = None, absorb: bool | None = None, fused: bool = True,
    ) -> tuple[Tensor, Tensor, Routing | None]:  # fmt: skip
        """As an MTP layer, without knowing ``tokens``; the state goes on unchanged."""
        joined = torch.cat((torch.zeros_like(hidden_BTD), self.hnorm(hidden_BTD)), dim=-1)
        x_BTD, routing = super(MTPLayer, self).forward(
            self.eh_proj(joined), cos_TR, sin_TR, cache, 0, absorb, fused
        )
        return self.shared_head.head(self.shared_head.norm(x_BTD)), hidden_BTD, routing


def small_mtp(depths: int = 1) -> ModelConfig:
    """One dense and one MoE layer, 64 wide, and ``depths`` MTP layers."""
    return ModelConfig.mini().replace(
        hidden_size=64, intermediate_size=128, moe_intermediate_size=32, num_hidden_layers=2,
        num_nextn_predict_layers=depths, num_attention_heads=2, num_key_value_heads=2,
        q_lora_rank=32, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
    )  # fmt: skip


def build(plan: Plan, seed: int) -> Transformer:
    """The small model of a plan, with fresh weights."""
    torch.manual_seed(seed)
    model = Transformer(small_mtp(plan.depths))
    if plan.parallel:
        for layer in model.model.layers[model.config.num_hidden_layers :]:
            layer.__class__ = ParallelHead  # the same parameters, another forward
    return model


def run(plan: Plan, seed: int, steps: int) -> Outcome:
    """Train one plan from one seed, and measure on held-out text."""
    corpus, model = load_corpus(), build(plan, seed)
    settings = TrainConfig(
        steps=steps, batch_size=8, seq_len=64, learning_rate=5e-3, gamma=0.005,
        mtp_lambda=plan.mtp_lambda, seed=seed,
    )  # fmt: skip
    records = list(train(model, corpus, settings))
    windows = torch.cat([corpus.windows(domain, 64, 24) for domain in corpus.domains])
    further: tuple[float, ...] = ()
    if plan.depths:
        with torch.no_grad():
            losses = mtp_loss(model(windows[:, :-1], mtp=True).mtp_logits, windows)
        # Eq 24 divides by T; per token that was asked it is T / (T - k) as much.
        further = tuple(loss.item() * 64 / (64 - k) for k, loss in enumerate(losses, start=1))
    return Outcome(evaluate(model, windows), further, sum(r.seconds for r in records))


def study(plans: Mapping[str, Plan], seeds: int = 5, steps: int = 80) -> dict[str, list[Outcome]]:
    """Every plan from every seed."""
    return run_all(run, plans, seeds, steps)
