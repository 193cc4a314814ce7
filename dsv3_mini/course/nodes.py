"""How far do tokens travel? What a limit on nodes does, counted on routing indices.

Why: experts live on machines (nodes), and the wires between nodes are the slow ones. A token that
picks 8 of 256 experts freely meets 5.3 of 8 nodes on average. DeepSeek-V3 lets it meet at most 4
(report 2.1.2), and sends it over the slow wires once per node, not once per expert: inside a node
the fast wires hand it on (report 3.2.2). Both savings can be counted without any network, because
who sends to whom follows from the indices alone.

Expert e lives on node e // (E / G): one group of experts is one node. Pure functions of tensors,
written to be read and compared with ``moe.Gate``; nothing here is fast.

Legend: N tokens, E experts, K chosen a token, G nodes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Traffic:
    """Bytes that tokens bring to other nodes, one way (dispatch; the results come back alike)."""

    per_node: int
    """If a token crosses once to every foreign node that holds an expert of its choice."""
    per_expert: int
    """If it crosses once for every chosen expert on a foreign node."""


def nodes_touched(indices_NK: Tensor, experts: int, nodes: int) -> Tensor:
    """On how many nodes the chosen experts of each token live: (N,) int64, 1 to min(K, nodes).

    Source: report 2.1.2, 'Node-Limited Routing', where this is at most M = 4. Raises ValueError.
    """
    return _touched(indices_NK, experts, nodes).sum(dim=1)


def route(scores_NE: Tensor, bias_E: Tensor, chosen: int, groups: int, kept: int) -> Tensor:
    """The chosen experts of each token, best first, (N, ``chosen``): one token after another.

    A group's rank is the sum of its two best s + bias; the best ``kept`` groups stay, every other
    expert gets minus infinity, and the ``chosen`` best s + bias win. The bias only chooses: gates
    are made from s. Source: report 2.1.2, eq 16 and 'Node-Limited Routing'. Raises ValueError.
    """
    experts = scores_NE.shape[-1]
    size = _experts_per_node(experts, groups)
    if not 1 <= kept <= groups or not 1 <= chosen <= kept * size:
        raise ValueError(
            f"chosen is {chosen} and kept {kept}; expected 1 to {groups} groups to be kept, and "
            f"at most as many experts chosen as they hold ({size} each)"
        )
    rows = []
    for scores_E in scores_NE:
        choice_E = scores_E + bias_E
        ranks = [group.sort(descending=True).values[:2].sum() for group in choice_E.split(size)]
        survivors = sorted(range(groups), key=lambda group: -float(ranks[group]))[:kept]
        masked_E = torch.full_like(choice_E, -math.inf)
        for group in survivors:
            members = slice(group * size, (group + 1) * size)
            masked_E[members] = choice_E[members]
        rows.append(masked_E.sort(descending=True, stable=True).indices[:chosen])
    return torch.stack(rows) if rows else torch.empty(0, chosen, dtype=torch.int64)


def traffic(
    indices_NK: Tensor, experts: int, nodes: int, hidden: int, bytes_per_number: int = 1
) -> Traffic:
    """Bytes between nodes if token n starts on node n mod ``nodes`` and has ``hidden`` numbers.

    A node's own tokens need no crossing. ``bytes_per_number``: V3 sends tokens to their experts in
    FP8, 1 byte (report 3.3.3), here without the scales, and gets results back in BF16, 2 bytes.
    Source for 'once per node, then NVLink inside it': report 3.2.2. Raises ValueError.
    """
    touched_NG = _touched(indices_NK, experts, nodes)
    home_N1 = torch.arange(len(indices_NK), device=indices_NK.device)[:, None] % nodes
    foreign_NK = indices_NK // (experts // nodes) != home_N1
    foreign_nodes = int(touched_NG.sum()) - int(touched_NG.gather(1, home_N1).sum())
    once = hidden * bytes_per_number
    return Traffic(foreign_nodes * once, int(foreign_NK.sum()) * once)


def expected_nodes(experts: int, nodes: int, chosen: int) -> float:
    """Mean nodes touched by ``chosen`` different experts drawn at random, without any limit.

    A node is missed if all of them fall on the others: G (1 - C(E - E/G, K) / C(E, K)). For V3
    8 (1 - C(224, 8) / C(256, 8)) = 5.29. Raises ValueError.
    """
    elsewhere = experts - _experts_per_node(experts, nodes)
    if not 1 <= chosen <= experts:
        raise ValueError(f"chosen is {chosen}; expected 1 to {experts}, the experts there are")
    return nodes * (1 - math.comb(elsewhere, chosen) / math.comb(experts, chosen))


def _experts_per_node(experts: int, nodes: int) -> int:
    if nodes < 1 or experts < nodes or experts % nodes:
        raise ValueError(
            f"{experts} experts do not divide among {nodes} nodes; expected equally many on each"
        )
    return experts // nodes


def _touched(indices_NK: Tensor, experts: int, nodes: int) -> Tensor:
    """Which nodes each token meets, (N, G) bool."""
    size = _experts_per_node(experts, nodes)
    if indices_NK.dim() != 2 or indices_NK.dtype != torch.int64:
        raise ValueError(
            f"indices are {indices_NK.dtype} {tuple(indices_NK.shape)}; expected int64 (tokens, "
            "chosen): join batch and sequence with routing.indices_BTK.flatten(0, 1)"
        )
    if indices_NK.numel() and not 0 <= int(indices_NK.min()) <= int(indices_NK.max()) < experts:
        raise ValueError(f"an index is outside 0 .. {experts - 1}; were there more experts?")
    nothing_NG = torch.zeros(len(indices_NK), nodes, dtype=torch.bool, device=indices_NK.device)
    return nothing_NG.scatter(1, indices_NK // size, True)
