"""How few numbers stand for a trained model's keys and values?

Why: MLA's latent assumes that all keys and values of a token are linear functions of few numbers.
That can be looked up in a model that was trained without a latent: replace the matrix that makes
them by its best stand-in of rank r, and see what the loss does. 'Best' is for the inputs that the
layer really gets: the leading right singular vectors of the keys and values themselves.

Legend: N tokens, D hidden, X numbers of all keys and values of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3_mini.attention import GroupedQueryAttention
from dsv3_mini.model import Transformer
from dsv3_mini.train import evaluate


def best_of_rank(x_ND: Tensor, w_XD: Tensor, rank: int) -> Tensor:
    """The matrix of this rank whose products with ``x`` are nearest to those of ``w``, (X, D)."""
    v_RX = torch.linalg.svd(x_ND @ w_XD.T, full_matrices=False).Vh[:rank]
    return v_RX.T @ (v_RX @ w_XD)


@torch.no_grad()
def loss_at_rank(model: Transformer, windows: Tensor, rank: int, joint: bool) -> float:
    """Held-out loss in nats with ``rank`` numbers a token and layer behind all keys and values.

    ``joint`` makes both from the same numbers, else half of them serve the keys and half the
    values. The model (with the yardstick attention) gets its own weights back afterwards.
    """
    main = model.model.layers[: model.config.num_hidden_layers]  # without the MTP layers
    attentions = [layer.get_submodule("self_attn") for layer in main]
    if not joint and rank % 2:
        raise ValueError(f"rank is {rank}; expected an even one, to be split into halves")
    inputs: list[Tensor] = []
    hooks = [
        attention.get_submodule("k_proj").register_forward_pre_hook(
            lambda _, x: inputs.append(x[0].flatten(0, 1))
        )
        for attention in attentions
    ]
    model(windows[:, :-1])
    for hook in hooks:
        hook.remove()
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    for attention, x_ND in zip(attentions, inputs, strict=True):
        assert isinstance(attention, GroupedQueryAttention)
        keys, values = attention.k_proj.weight, attention.v_proj.weight
        parts = [torch.cat((keys, values))] if joint else [keys, values]
        low = torch.cat([best_of_rank(x_ND, part, rank // len(parts)) for part in parts])
        keys.copy_(low[: len(keys)])
        values.copy_(low[len(keys) :])
    loss = evaluate(model, windows)
    model.load_state_dict(kept)
    return loss
