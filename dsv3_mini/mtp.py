"""Multi-token prediction: one more token a position, in sequence (report 2.2, eqs 21-25).

Why: next-token training asks each position one question. An MTP module asks one more, 'and what
comes after that?', which densifies the training signal; at inference the module is dropped, or it
drafts the token after next for speculative decoding.

Depth k at position i joins the state of depth k - 1 at the *same* position with the embedding of
the true token t_{i+k}, runs one own layer, and is scored on t_{i+k+1} through the main model's
head. Modules form a chain, unlike parallel heads, so each depth sees the tokens in between.

| position i | state      | joined with  | predicts    |
|------------|------------|--------------|-------------|
| main model | h^0_i      | -            | t_{i+1}     |
| depth 1    | h^0_i      | Emb(t_{i+1}) | t_{i+2}     |
| depth 2    | h^1_i      | Emb(t_{i+2}) | t_{i+3}     |

Two points that the report leaves open are taken from the released weights' readers (transformers,
vLLM): the embedding comes first in the concatenation, although eq 21 prints the state first; and
the state is the one *after* the final norm, main model and module alike.

Legend: B batch, T positions, D hidden, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_mini.block import DecoderLayer
from dsv3_mini.cache import Cache
from dsv3_mini.config import ModelConfig
from dsv3_mini.layers import Linear, RMSNorm
from dsv3_mini.moe import Routing


class SharedHead(nn.Module):
    """An own norm and the main model's output head."""

    def __init__(self, config: ModelConfig, head: nn.Linear) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = head


class MTPLayer(DecoderLayer):
    """Depth k of the chain, stored as layer num_hidden_layers + k - 1 of the checkpoint.

    ``embed_tokens`` and ``shared_head.head`` are the main model's own modules: the same memory,
    the same gradients (report 3.2.3).
    """

    def __init__(
        self, config: ModelConfig, index: int, embed_tokens: nn.Embedding, head: nn.Linear
    ) -> None:
        super().__init__(config, index)
        self.embed_tokens = embed_tokens
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
        self.shared_head = SharedHead(config, head)

    def forward(  # type: ignore[override]
        self, hidden_BTD: Tensor, tokens_BT: Tensor, cos_TR: Tensor, sin_TR: Tensor,
        cache: Cache | None = None, absorb: bool | None = None, fused: bool = True,
    ) -> tuple[Tensor, Tensor, Routing | None]:  # fmt: skip
        """States of depth k - 1 and tokens t_{i+k} to logits (B, T, V), states (B, T, D), routing.

        Source: report eqs 21-23. Position i of both inputs belongs together.
        """
        joined = torch.cat((self.enorm(self.embed_tokens(tokens_BT)), self.hnorm(hidden_BTD)), -1)
        x_BTD, routing = super().forward(
            self.eh_proj(joined), cos_TR, sin_TR, cache, 0, absorb, fused
        )
        state_BTD = self.shared_head.norm(x_BTD)
        return self.shared_head.head(state_BTD), state_BTD, routing


def mtp_loss(mtp_logits: list[Tensor], tokens_BT: Tensor) -> list[Tensor]:
    """L^k of every depth, scalars, for ``tokens`` (B, T + 1) whose first T went into the model.

    Depth k has T - k positions; position i is scored on t_{i+k+1}. Source: report eq 24, which
    sums T - k terms and divides by T. Weigh by lambda / D for eq 25. Raises ValueError.
    """
    if tokens_BT.dim() != 2 or tokens_BT.dtype != torch.int64:
        raise ValueError(
            f"tokens have shape {tuple(tokens_BT.shape)} and dtype {tokens_BT.dtype}; expected "
            "int64 (batch, T + 1)"
        )
    length = tokens_BT.shape[1] - 1
    losses = []
    for depth, logits_BTV in enumerate(mtp_logits, start=1):
        target_BT = tokens_BT[:, depth + 1 :]
        if logits_BTV.shape[:2] != target_BT.shape:
            raise ValueError(
                f"depth {depth} has logits for {tuple(logits_BTV.shape[:2])} positions and "
                f"{tuple(target_BT.shape)} targets; expected (batch, T - {depth}) of each: pass "
                "all T + 1 tokens"
            )
        total = F.cross_entropy(logits_BTV.flatten(0, 1), target_BT.flatten(), reduction="sum")
        losses.append(total / (tokens_BT.shape[0] * length))
    return losses
