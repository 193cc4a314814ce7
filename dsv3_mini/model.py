"""Assembly: embedding, layers, norm, head, and the MTP chain behind them.

Why so little: every idea has its own module, and this file only says in which order they run.
Parameter names are those of the official checkpoint, MTP included (``model.layers.61`` in V3), so
a state dict needs no renaming beyond stacked experts. Nothing is balanced, cast or trained here:
the bias moves in ``train``, precision changes from outside.

Legend: B batch, T new tokens, D hidden, V vocabulary, R rotary width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dsv3_mini.balance import batch_balance_loss, sequence_balance_loss
from dsv3_mini.block import DecoderLayer
from dsv3_mini.cache import Cache, CacheError, KVCache, LatentCache
from dsv3_mini.config import ModelConfig
from dsv3_mini.layers import Linear, RMSNorm
from dsv3_mini.moe import Experts, Gate, Routing
from dsv3_mini.mtp import MTPLayer
from dsv3_mini.rope import rope_table


@dataclass(frozen=True)
class ModelOutput:
    """What a forward pass gives back; what is derived from the routing is computed on demand."""

    logits: Tensor
    """(B, T, V): position i predicts token i + 1."""
    hidden: Tensor
    """(B, T, D): the state after the final norm, which the head and MTP read."""
    mtp_logits: list[Tensor] = field(default_factory=list)
    """One (B, T - k, V) per depth k; position i predicts token i + k + 1."""
    routing: list[Routing] = field(default_factory=list)
    """One per MoE layer that ran, MTP layers last."""

    @property
    def router_counts(self) -> Tensor:
        """Tokens per expert, (moe_layers, experts) int64; MTP layers are the last rows."""
        if not self.routing:
            raise ValueError("no layer of this model has experts; lower first_k_dense_replace")
        return torch.stack([routing.counts() for routing in self.routing])

    @property
    def balance_loss(self) -> Tensor:
        """Sum over MoE layers of the sequence-wise loss before alpha (report eqs 17-20).

        As eq 18 says, it counts the K best raw scores. Perfect balance gives the layer count.
        """
        return self._balance(sequence_balance_loss)

    @property
    def batch_balance_loss(self) -> Tensor:
        """The same with the batch taken as one sequence (report 4.5.3); V3 does not use it."""
        return self._balance(batch_balance_loss)

    def _balance(self, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        losses = []
        for routing in self.routing:
            chosen = routing.indices_BTK.shape[-1]
            best = routing.scores_BTE.topk(chosen, dim=-1).indices
            losses.append(loss(routing.scores_BTE, best))
        return torch.stack(losses).sum() if losses else self.logits.new_zeros(())


class Backbone(nn.Module):
    """The names under ``model.`` in the checkpoint; layers past num_hidden_layers are MTP's."""

    def __init__(self, config: ModelConfig, head: nn.Linear) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        main = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in main)
        for depth in range(config.num_nextn_predict_layers):
            index = config.num_hidden_layers + depth
            self.layers.append(MTPLayer(config, index, self.embed_tokens, head))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    """DeepSeek-V3 at any size. ``Transformer(ModelConfig.mini())`` is ready to train."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.model = Backbone(config, self.lm_head)
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding | Experts | Gate):
            for parameter in module.parameters(recurse=False):
                nn.init.normal_(parameter, std=std)

    @property
    def gates(self) -> list[Gate]:
        """Every router in layer order, MTP layers last: the rows of ``router_counts``."""
        return [module for module in self.modules() if isinstance(module, Gate)]

    def new_cache(
        self, batch: int, max_len: int, mtp: bool = False, expanded: bool = False
    ) -> Cache:
        """An empty cache for ``batch`` sequences of up to ``max_len`` tokens.

        ``mtp`` adds one a depth, ``expanded`` stores full keys and values. Raises CacheError.
        """
        config, parameter = self.config, self.lm_head.weight
        kind = KVCache if expanded or config.attention == "gqa" else LatentCache
        if type(max_len) is int and max_len > config.max_position_embeddings:
            raise CacheError(
                f"max_len {max_len} exceeds max_position_embeddings "
                f"{config.max_position_embeddings}; shorten it or change the config"
            )

        def make(layers: int) -> Cache:
            return kind(config, layers, batch, max_len, parameter.dtype, parameter.device)

        cache = make(config.num_hidden_layers)
        cache.mtp = [make(1) for _ in range(config.num_nextn_predict_layers if mtp else 0)]
        return cache

    def forward(
        self, tokens: Tensor, cache: Cache | None = None, mtp: bool = False,
        absorb: bool | None = None, fused: bool = True,
    ) -> ModelOutput:  # fmt: skip
        """Integer tokens (B, T) to logits (B, T, V); with a cache they follow what it holds.

        ``mtp`` also runs the prediction chain. ``absorb`` and ``fused`` choose among equal paths
        (see ``mla`` and ``layers``). Raises ValueError on bad tokens, CacheError on a bad cache.
        """
        self._check(tokens, cache, mtp)
        start = cache.length if cache is not None else 0
        cos, sin = rope_table(self.config, start, tokens.shape[1], str(tokens.device))
        x = self.model.embed_tokens(tokens)
        routings: list[Routing | None] = []
        for index in range(self.config.num_hidden_layers):
            x, routing = self.model.layers[index](x, cos, sin, cache, index, absorb, fused)
            routings.append(routing)
        hidden = self.model.norm(x)
        mtp_logits: list[Tensor] = []
        if mtp:
            mtp_logits, more = self._predict_further(hidden, tokens, cache, absorb, fused)
            routings += more
        if cache is not None:
            cache.advance(tokens.shape[1])
        used = [routing for routing in routings if routing is not None]
        return ModelOutput(self.lm_head(hidden), hidden, mtp_logits, used)

    def draft(self, hidden_BTD: Tensor, following_BT: Tensor, cache: Cache) -> Tensor:
        """Logits (B, T, V) of MTP depth 1 for the token after ``following``; extends cache.mtp[0].

        ``hidden`` are the main model's next T states, ``following`` the tokens right after each.
        The caller keeps both in step: speculation knows which states were verified, and a plain
        ``mtp=True`` does not. Source: report 2.2.
        """
        inner = cache.mtp[0]
        new = following_BT.shape[1]
        cos, sin = rope_table(self.config, inner.length, new, str(following_BT.device))
        layer = self.model.layers[self.config.num_hidden_layers]
        logits_BTV, _, _ = layer(hidden_BTD, following_BT, cos, sin, inner)
        inner.advance(new)
        return logits_BTV

    def _predict_further(
        self, state: Tensor, tokens: Tensor, cache: Cache | None, absorb: bool | None, fused: bool
    ) -> tuple[list[Tensor], list[Routing | None]]:
        all_logits: list[Tensor] = []
        routings: list[Routing | None] = []
        for depth, layer in enumerate(self.model.layers[self.config.num_hidden_layers :]):
            inner = cache.mtp[depth] if cache is not None else None
            if inner is not None and inner.carry is not None:
                state = torch.cat((inner.carry, state), dim=1)
            if inner is not None and state.shape[1]:
                inner.carry = state[:, -1:]
            # Position i needs a token that follows it: the newest state waits for the next call.
            state = state[:, :-1]
            known = state.shape[1]
            if known == 0:
                all_logits.append(state.new_zeros(*state.shape[:2], self.config.vocab_size))
                continue
            at = inner.length if inner is not None else 0
            cos, sin = rope_table(self.config, at, known, str(tokens.device))
            logits, state, routing = layer(
                state, tokens[:, tokens.shape[1] - known :], cos, sin, inner, absorb, fused
            )
            all_logits.append(logits)
            routings.append(routing)
            if inner is not None:
                inner.advance(known)
        return all_logits, routings

    def _check(self, tokens: object, cache: object, mtp: bool) -> None:
        if not isinstance(tokens, Tensor):
            raise ValueError(
                f"tokens are a {type(tokens).__name__}; expected an integer tensor (batch, seq)"
            )
        if not isinstance(cache, Cache | None):
            raise CacheError(
                f"cache is a {type(cache).__name__}; expected None or model.new_cache(...)"
            )
        start = cache.length if cache is not None else 0
        if tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"tokens have shape {tuple(tokens.shape)} and dtype {tokens.dtype}; expected "
                "integer (batch, seq): add a batch dimension with tokens[None]"
            )
        if not tokens.numel():
            raise ValueError(f"tokens are empty, {tuple(tokens.shape)}; expected at least one")
        if start + tokens.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"position {start + tokens.shape[1] - 1} is past max_position_embeddings "
                f"{self.config.max_position_embeddings}; use fewer tokens or another config"
            )
        if not tokens.is_meta and not hasattr(tokens, "fake_mode"):  # these have no values
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(
                    f"token {low if low < 0 else high} is outside 0 .. "
                    f"{self.config.vocab_size - 1}; was the text encoded by another tokenizer?"
                )
        if mtp and not self.config.num_nextn_predict_layers:
            raise ValueError("mtp=True, but num_nextn_predict_layers is 0: this model has no MTP")
        if cache is not None:
            cache.check(*tokens.shape)
            self._check_cache(cache, mtp)

    def _check_cache(self, cache: Cache, mtp: bool) -> None:
        layers = cache.stores[0].shape[0]
        if layers != self.config.num_hidden_layers:
            raise CacheError(
                f"the cache has {layers} layers, the model {self.config.num_hidden_layers}; "
                "make it with model.new_cache(...)"
            )
        if not mtp:
            return
        if len(cache.mtp) != self.config.num_nextn_predict_layers:
            raise CacheError("mtp=True needs a cache made with new_cache(..., mtp=True)")
        for depth, inner in enumerate(cache.mtp, start=1):
            if inner.length != max(cache.length - depth, 0) or (
                cache.length >= depth and inner.carry is None
            ):
                raise CacheError(
                    f"MTP depth {depth} has lost step with the main model (after mtp=False or "
                    "truncate); start a new cache or keep mtp=True in every call"
                )
