"""A task that needs position and nothing else: name the token that stood five places back.

Why: on real text a model of this size hardly uses attention, so a worse attention does not show
in its loss. Here the tokens are random, and the only way to be right is to look exactly five
places back and to carry one symbol over: the first needs position, the second room in the latent.
A one-layer model learns it in about a second. Guessing is right once in ``vocab_size`` times.

Legend: B batch, T positions, V symbols.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_mini.accounting import count_parameters
from dsv3_mini.config import ModelConfig
from dsv3_mini.model import Transformer

BACK = 5
LENGTH = 32
PARAMETERS = 42_000

Model = TypeVar("Model", bound=Transformer)


def recall_config(rank: int = 16, heads: int = 4) -> ModelConfig:
    """One dense layer of MLA, 64 wide, over 32 symbols; heads share 64 numbers.

    The feed-forward takes up the difference, so that models of any latent ``rank`` and number of
    ``heads`` have equally many parameters, to within one of its neurons.
    """
    config = ModelConfig.mini().replace(
        vocab_size=32, hidden_size=64, intermediate_size=1, num_hidden_layers=1,
        first_k_dense_replace=1, num_nextn_predict_layers=0, num_attention_heads=heads,
        num_key_value_heads=heads, q_lora_rank=32, kv_lora_rank=rank,
        qk_nope_head_dim=64 // heads, qk_rope_head_dim=8, v_head_dim=64 // heads,
    )  # fmt: skip
    neuron = 3 * config.hidden_size
    return config.replace(
        intermediate_size=1 + (PARAMETERS - count_parameters(config).total) // neuron
    )


def recall_batch(model: Transformer, batch: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random tokens and their targets, both (B, T); the first ``BACK`` targets are -100: none."""
    if length <= BACK:
        raise ValueError(f"length is {length}; expected more than {BACK}, or nothing is asked")
    generator = torch.Generator().manual_seed(seed)
    tokens_BT = torch.randint(model.config.vocab_size, (batch, length), generator=generator)
    targets_BT = torch.full_like(tokens_BT, -100)
    targets_BT[:, BACK:] = tokens_BT[:, :-BACK]
    device = model.lm_head.weight.device
    return tokens_BT.to(device), targets_BT.to(device)


def practise(
    model: Model, seed: int = 0, steps: int = 200, length: int = LENGTH, batch: int = 32,
    rate: float = 1e-2,
) -> Model:  # fmt: skip
    """Train ``model`` on the task, in place, and return it; the rate rises and then falls."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20) * (1 - 0.9 * step / steps)
        tokens_BT, targets_BT = recall_batch(model, batch, length, 1_000_003 * seed + step)
        loss = F.cross_entropy(model(tokens_BT).logits.flatten(0, 1), targets_BT.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@torch.no_grad()
def recall_loss(model: Transformer, length: int = LENGTH, batch: int = 32) -> Tensor:
    """Mean loss in nats at each position from ``BACK`` on, (T - BACK,), on unseen sequences."""
    tokens_BT, targets_BT = recall_batch(model, batch, length, seed=2**40)
    logits_BVT = model(tokens_BT).logits.transpose(1, 2)
    return F.cross_entropy(logits_BVT, targets_BT, reduction="none").mean(dim=0)[BACK:]


def practised(shape: tuple[int, int], seed: int, steps: int) -> tuple[float, int]:
    """Loss and number of parameters of a new model of (rank, heads) after ``steps`` of practice."""
    torch.manual_seed(seed)
    model = practise(Transformer(recall_config(*shape)), seed, steps)
    return recall_loss(model).mean().item(), sum(p.numel() for p in model.parameters())


@torch.no_grad()
def recall_accuracy(
    model: Transformer, length: int = LENGTH, batch: int = 32, absorb: bool | None = None
) -> Tensor:
    """Share of right answers at each position from ``BACK`` on, (T - BACK,), unseen sequences.

    ``absorb`` chooses MLA's path, as in the model.
    """
    tokens_BT, targets_BT = recall_batch(model, batch, length, seed=2**40)
    right_BT = model(tokens_BT, absorb=absorb).logits.argmax(dim=-1) == targets_BT
    return right_BT.float().mean(dim=0)[BACK:]


def swap_attention(model: Model, kind: type[nn.Module]) -> Model:
    """Give every layer another attention with the same parameters; returns the model.

    ``kind(config)`` must have the parameters of the attention that it replaces.
    """
    for layer in model.model.layers:
        attention = kind(model.config)
        attention.load_state_dict(layer.get_submodule("self_attn").state_dict())
        layer.self_attn = attention
    return model
