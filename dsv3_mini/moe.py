"""Mixture of experts: many small feed-forwards, of which each token uses a few (report 2.1.2).

Why: 97 % of V3's parameters are routed experts, and a token pays for 8 of 256 a layer. The router
scores every expert with a sigmoid (eq 15), a bias per expert decides together with the score who
is *chosen*, and the score alone decides how much a chosen expert *counts* (eq 16): so the bias
can balance the load without touching what the model computes. Choice is limited to the best 4 of
8 groups, each group living on one node, so that a token crosses to at most 4 nodes. One shared
expert runs for every token, un-routed and un-gated (eq 12).

Two dispatches, equal by test: ``dense`` runs every expert on every token and weighs most by zero;
sorted (the default) groups tokens by expert and runs each expert once. No token is ever dropped.

Legend: B batch, T tokens, D hidden, E experts, K chosen, G groups, F expert width, N = B x T.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from dsv3_mini.config import ModelConfig
from dsv3_mini.layers import SwiGLU, linear

Parts = Sequence[Tensor]
Run = Callable[[Tensor, Tensor, Tensor, Tensor, Parts | None], Tensor]
BLOCK_ROWS = 1024
"""Rows of experts at once where no gradient is wanted: 2 MB at 512 wide, a core's cache."""


@dataclass(frozen=True)
class Routing:
    """What a router decided for B x T tokens: raw affinities, who was chosen, and their gates."""

    scores_BTE: Tensor
    indices_BTK: Tensor
    weights_BTK: Tensor

    def counts(self) -> Tensor:
        """How many tokens each expert received: (E,) int64, summing to B x T x K."""
        return _count(self.indices_BTK.flatten(), self.scores_BTE.shape[-1])


def _count(flat: Tensor, experts: int) -> Tensor:
    # Not bincount, whose output's size depends on the numbers: a card would wait for them.
    return flat.new_zeros(experts).scatter_add(0, flat, torch.ones_like(flat))


class Gate(nn.Module):
    """The router. ``e_score_correction_bias`` is a buffer: moved by a rule, never by a gradient."""

    e_score_correction_bias: Tensor
    linear = staticmethod(linear)  # fp8 puts its own in place of it

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        bias = torch.zeros(config.n_routed_experts)
        self.register_buffer("e_score_correction_bias", bias)

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> Gate:
        # In bf16 a step of 0.001 is lost near 1: the bias changes device, never dtype.
        before = self.e_score_correction_bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after = self.e_score_correction_bias
        self.e_score_correction_bias = after.float() if before.is_meta else before.to(after.device)
        return self

    def groups(self, choice_BTE: Tensor) -> Tensor:
        """Which groups survive, (B, T, G) bool: the ``topk_group`` with the best top-two sums."""
        config = self.config
        by_group = choice_BTE.unflatten(-1, (config.n_group, -1))
        rank_BTG = by_group.topk(min(2, by_group.shape[-1]), dim=-1).values.sum(dim=-1)
        best = rank_BTG.topk(config.topk_group, dim=-1).indices
        return torch.zeros_like(rank_BTG, dtype=torch.bool).scatter(-1, best, True)

    def forward(self, x_BTD: Tensor) -> Routing:
        """Route tokens (B, T, D). Source: report eqs 13-16; scores in fp32."""
        config = self.config
        wide = torch.promote_types(x_BTD.dtype, torch.float32)
        scores_BTE = self.linear(x_BTD.to(wide), self.weight.to(wide)).sigmoid()
        with torch.no_grad():
            choice_BTE = scores_BTE + self.e_score_correction_bias
            if config.topk_group < config.n_group:
                drop_BTG1 = ~self.groups(choice_BTE)[..., None]
                by_group = choice_BTE.unflatten(-1, (config.n_group, -1))
                # Not 0: with negative biases a masked expert at 0 would win.
                choice_BTE = by_group.masked_fill(drop_BTG1, float("-inf")).flatten(-2)
            indices_BTK = choice_BTE.topk(config.num_experts_per_tok, dim=-1).indices
        weights_BTK = scores_BTE.gather(-1, indices_BTK)
        if config.norm_topk_prob:
            # Sigmoids can underflow together; the tiny term keeps 0 / 0 away.
            weights_BTK = weights_BTK / (weights_BTK.sum(dim=-1, keepdim=True) + 1e-20)
        return Routing(scores_BTE, indices_BTK, weights_BTK * config.routed_scaling_factor)


def weighted_swiglu(gate_RF: Tensor, up_RF: Tensor, weights_R1: Tensor | float) -> Tensor:
    """silu(gate) * up * weight. Eq 12 weighs the last product's result: it is linear, and wider."""
    return F.silu(gate_RF) * up_RF * weights_R1


class Experts(nn.Module):
    """All routed experts of a layer, stacked: gate_proj and up_proj (E, F, D), down_proj (E, D, F).

    The official checkpoint stores them one by one; ``checkpoint`` stacks and unstacks.
    """

    linear = staticmethod(linear)  # fp8 puts its own in place of it

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, inner, hidden = (
            config.n_routed_experts, config.moe_intermediate_size, config.hidden_size,
        )  # fmt: skip
        self.gate_proj = nn.Parameter(torch.empty(experts, inner, hidden))
        self.up_proj = nn.Parameter(torch.empty(experts, inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))

    def one(self, expert: int, x_ND: Tensor) -> Tensor:
        """Expert number ``expert`` on tokens (N, D): SwiGLU, (N, D)."""
        parts = self.gate_proj[expert], self.up_proj[expert], self.down_proj[expert]
        return self._swiglu(x_ND, 1.0, *parts)

    def _swiglu(self, x_ND: Tensor, weights_N1: Tensor | float, *parts: Tensor) -> Tensor:
        gate_FD, up_FD, down_DF = parts
        gate_NF, up_NF = self.linear(x_ND, gate_FD), self.linear(x_ND, up_FD)
        return self.linear(weighted_swiglu(gate_NF, up_NF, weights_N1), down_DF)

    def forward(self, x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """Each token through its K experts, weighted and summed: (N, D). Sorted by expert."""
        flat = indices_NK.flatten()
        weights_NK = weights_NK.to(x_ND.dtype)
        group, learns = self._can_group(x_ND, len(flat)), torch.is_grad_enabled()
        if len(x_ND) == 1 and not (group or learns):  # nothing to sort
            return self.together(x_ND, flat.tolist(), weights_NK.mT)
        order_R = flat.argsort(stable=True)
        token_R, weights_R1 = order_R // indices_NK.shape[1], weights_NK.flatten()[order_R, None]
        counts_E = _count(flat, self.gate_proj.shape[0])
        run = self.grouped if group else self.in_turn
        if x_ND.device.type == "cpu" and not learns:
            return self.in_blocks(run, x_ND, token_R, weights_R1, counts_E)
        out_RD = run(x_ND, token_R, weights_R1, counts_E, None)
        # order[r] says which choice row r is, its inverse in which row a choice lies.
        return F.embedding_bag(order_R.argsort().view_as(indices_NK), out_RD, mode="sum")

    def together(self, x_1D: Tensor, chosen: Sequence[int], weights_K1: Tensor) -> Tensor:
        """One token through its K experts, (1, D): what lies between products is done once."""
        gate_KF, up_KF = (
            torch.cat([self.linear(x_1D, weight[expert]) for expert in chosen])
            for weight in (self.gate_proj, self.up_proj)
        )
        inner_K1F = weighted_swiglu(gate_KF, up_KF, weights_K1).split(1)
        down_KDF = (self.down_proj[expert] for expert in chosen)
        return torch.cat(list(map(self.linear, inner_K1F, down_KDF))).sum(dim=0, keepdim=True)

    def in_blocks(
        self, run: Run, x_ND: Tensor, token_R: Tensor, weights_R1: Tensor, counts_E: Tensor
    ) -> Tensor:
        """A few experts at a time: all rows at once are K times x, a block's stay in the cache."""
        step = max(1, len(counts_E) * BLOCK_ROWS // max(1, len(token_R)))
        sizes = [int(counts.sum()) for counts in counts_E.split(step)]
        blocks = zip(
            token_R.split(sizes), weights_R1.split(sizes), counts_E.split(step),
            *(parameter.split(step) for parameter in self.parameters()), strict=True,
        )  # fmt: skip
        out_ND = torch.zeros_like(x_ND)
        for token, weights, counts, *parts in blocks:
            out_ND.index_add_(0, token, run(x_ND, token, weights, counts, parts))
        return out_ND

    def in_turn(
        self, x_ND: Tensor, token_R: Tensor, weights_R1: Tensor, counts_E: Tensor,
        parts: Parts | None = None,
    ) -> Tensor:  # fmt: skip
        """Rows sorted by expert through one after the other, (R, D).

        Row r is token ``token_R[r]``; ``parts`` are the weights if not all experts are counted.
        """
        rows_RD = x_ND.index_select(0, token_R)
        # Indexing would make a gradient as large as all experts for each one of them.
        experts = zip(*(w.unbind() for w in parts or self.parameters()), strict=True)
        sizes = counts_E.tolist()
        outs = []
        for rows, weights, expert in zip(
            rows_RD.split(sizes), weights_R1.split(sizes), experts, strict=True
        ):
            if len(rows):
                outs.append(self._swiglu(rows, weights, *expert))
        return torch.cat(outs) if outs else rows_RD

    def grouped(
        self, x_ND: Tensor, token_R: Tensor, weights_R1: Tensor, counts_E: Tensor,
        parts: Parts | None = None,
    ) -> Tensor:  # fmt: skip
        """The same in three launches, without the CPU knowing the counts."""
        ends_E = counts_E.cumsum(0).int()
        gate, up, down = (w.mT for w in parts or self.parameters())

        def select(kept: Tensor | None = None) -> Tensor:
            return x_ND.index_select(0, token_R) if kept is None else kept

        rows_RD = select()
        # Training keeps gate and up. The rows, K times x, and what lies between the products it
        # makes again; of what products keep, only the rows have two dimensions.
        with saved_tensors_hooks(lambda kept: None if kept.dim() == 2 else kept, select):
            gate_RF, up_RF = (F.grouped_mm(rows_RD, w, offs=ends_E) for w in (gate, up))
        between = gate_RF, up_RF, weights_R1
        again = partial(checkpoint, weighted_swiglu, use_reentrant=False, preserve_rng_state=False)
        inner_RF = again(*between) if torch.is_grad_enabled() else weighted_swiglu(*between)
        return F.grouped_mm(inner_RF, down, offs=ends_E)

    def _can_group(self, x: Tensor, rows: int) -> bool:
        """Where torch's kernel can run, fp8 is not in place, and few experts would rest."""
        aligned = all(size * x.element_size() % 16 == 0 for size in self.gate_proj.shape[1:])
        if self.linear is not linear or not aligned:
            return False
        if x.is_cuda:
            return x.dtype == torch.bfloat16
        return x.dtype in (torch.float32, torch.bfloat16) and rows >= self.gate_proj.shape[0]

    def dense(self, x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """Report eq 12 by brute force: every expert on every token, most gates zero."""
        gates_NE = x_ND.new_zeros(x_ND.shape[0], self.gate_proj.shape[0])
        gates_NE = gates_NE.scatter(1, indices_NK, weights_NK.to(x_ND.dtype))
        every = [self.one(e, x_ND) * gates_NE[:, e, None] for e in range(gates_NE.shape[1])]
        return torch.stack(every).sum(dim=0)


class MoE(nn.Module):
    """Router, routed experts and the shared expert: the feed-forward of layers 3 to 60 of V3."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Gate(config)
        self.experts = Experts(config)
        self.shared_experts = (
            SwiGLU(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)
            if config.n_shared_experts
            else None
        )

    def forward(self, x_BTD: Tensor, dense: bool = False) -> tuple[Tensor, Routing]:
        """(B, T, D) to (B, T, D) and what the router decided. Source: report eq 12."""
        routing = self.gate(x_BTD)
        dispatch = self.experts.dense if dense else self.experts
        tokens = (x_BTD, routing.indices_BTK, routing.weights_BTK)
        out_BTD: Tensor = dispatch(*(t.flatten(0, 1) for t in tokens)).view_as(x_BTD)
        if self.shared_experts is not None:
            out_BTD = out_BTD + self.shared_experts(x_BTD)
        return out_BTD, routing
