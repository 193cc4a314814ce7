"""Exercises of notebook 06, the module: how it joins state and token, and the chain of depths.

Legend: T tokens, D hidden, X = 2 D, K depths, V vocabulary. Positions and tokens count from 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv3_mini.course.checking import Draw, Drawing, Exercise, Function, Wrong
from dsv3_mini.course.exercises.nb02_cache import norm
from dsv3_mini.course.exercises.nb06_tokens import drawn_tokens

# -------------------------------------------------------------------- 06.2 state and token, eq 21


def join_case(draw: Draw) -> dict[str, Any]:
    tokens, hidden, vocabulary = draw.randint(4, 8), draw.randint(9, 14), draw.randint(16, 20)
    return {
        "h_TD": 3 * draw.normal(tokens, hidden),
        "tokens_T": drawn_tokens(draw, tokens, vocabulary),
        "embed_VD": draw.normal(vocabulary, hidden) / 4,
        "g_emb_D": draw.normal(hidden).abs() + 0.5,
        "g_hid_D": draw.normal(hidden).abs() + 0.5,
        "m_DX": draw.normal(hidden, 2 * hidden) / hidden**0.5,
    }


def join_one_by_one(
    h_TD: Tensor, tokens_T: Tensor, embed_VD: Tensor, g_emb_D: Tensor, g_hid_D: Tensor, m_DX: Tensor
) -> Tensor:
    """Position by position, each half of M on its own."""
    h, embed, g_emb, g_hid, m = (
        each.double().numpy() for each in (h_TD, embed_VD, g_emb_D, g_hid_D, m_DX)
    )
    hidden, out = len(m), []
    for position, token in enumerate(tokens_T.tolist()[1:]):
        both = []
        for vector, weight in ((embed[token], g_emb), (h[position], g_hid)):
            length = np.sqrt(sum(a * a for a in vector) / hidden + 1e-6)
            both.append([a / length * w for a, w in zip(vector, weight, strict=True)])
        out.append(m[:, :hidden] @ both[0] + m[:, hidden:] @ both[1])
    return torch.tensor(np.array(out), dtype=torch.float32)


def joining(
    make: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    states: slice = slice(0, -1), tokens: slice = slice(1, None),
) -> Function:  # fmt: skip
    """The answer of somebody who makes both parts of e, h and the weights so."""

    def answer(h: Tensor, t: Tensor, embed: Tensor, g_e: Tensor, g_h: Tensor, m: Tensor) -> Tensor:
        return torch.cat(make(embed[t[tokens]], h[states], g_e, g_h), dim=1) @ m.T

    return answer


def normed(e: Tensor, h: Tensor, g_e: Tensor, g_h: Tensor) -> tuple[Tensor, Tensor]:
    return norm(e) * g_e, norm(h) * g_h


def normed_together(e: Tensor, h: Tensor, g_e: Tensor, g_h: Tensor) -> tuple[Tensor, Tensor]:
    both = torch.cat((e, h), dim=1)
    return norm(e, over=both) * g_e, norm(h, over=both) * g_h


def join_picture(answer: Function) -> Drawing:
    tokens, hidden = torch.tensor([2, 5, 0, 7, 3, 6, 1, 4]), 8
    picked = torch.zeros(2 * hidden, 4 * hidden)
    picked[range(hidden), range(hidden)] = 1  # the first numbers of the embedding
    picked[range(hidden, 2 * hidden), range(2 * hidden, 3 * hidden)] = 1  # those of the state
    one_TD = torch.cat((torch.eye(hidden), torch.zeros(hidden, hidden)), dim=1)
    out = answer(one_TD, tokens, one_TD, torch.ones(16), torch.ones(16), picked)
    names = [f"position {i}, token {t}" for i, t in enumerate(tokens[:-1].tolist())]
    return Drawing("maps", {
        "panels": {"columns 0 to 7 from the embedding, 8 to 15 from the state": out}, "rows": "",
        "columns": "number", "unit": "value", "ticks": names,
    })  # fmt: skip


JOIN = Exercise(
    identifier="06.2", title="State and token, joined",
    difficulty=2, importance=4, minutes=15, lines=6,
    case=join_case, oracle=join_one_by_one, picture=join_picture,
    alt="the text 2 5 0 7 3 6 1 4. Token v's embedding is one at place v, position i's state at "
    "place i, and M copies. Two bright cells a row: left the next row's token, 5, 0, 7 and so on; "
    "right the row's own position, a diagonal.",
    wrong=(
        Wrong(joining(lambda *a: normed(*a)[::-1]),
              "the state stands first, as equation 21 prints it; the released M expects another "
              "order", 21),
        Wrong(joining(lambda e, h, a, b: normed(0 * e, h, a, b)),
              "the token's embedding is missing; without it this is a parallel head", 19),
        Wrong(joining(normed, tokens=slice(0, -1)),
              "position i is joined with its own token; the state knows that one"),
        Wrong(joining(normed, slice(0, -2), slice(2, None)),
              "position i is joined with token i + 2, the answer", 20),
        Wrong(joining(normed, states=slice(1, None)),
              "token i + 1 is joined with its own state; the state is that of position i"),
        Wrong(joining(lambda e, h, a, b: (e, h)),
              "no norms; state and embedding have one each"),
        Wrong(joining(lambda e, h, a, b: (e, norm(h) * b)),
              "the norm on the embedding is missing"),
        Wrong(joining(lambda e, h, a, b: (norm(e) * a, h)),
              "the norm on the state is missing"),
        Wrong(joining(normed_together),
              "one mean over both halves; state and embedding have a norm each"),
        Wrong(joining(lambda e, h, a, b: normed(e, h, b, a)),
              "the weights of the two norms are mixed up"),
    ),
)  # fmt: skip

# --------------------------------------------------------------- 06.3 depth after depth, eqs 21-23


def chain_case(draw: Draw) -> dict[str, Any]:
    depths, hidden, vocabulary = draw.randint(2, 3), draw.randint(5, 7), draw.randint(16, 20)
    tokens = depths + draw.randint(3, 6)
    return {
        "h_TD": draw.normal(tokens, hidden),
        "tokens_T": drawn_tokens(draw, tokens, vocabulary),
        "embed_VD": draw.normal(vocabulary, hidden),
        "m_KDX": draw.normal(depths, hidden, 2 * hidden) / hidden**0.5,
        "head_VD": draw.normal(vocabulary, hidden),
    }


def chain_one_by_one(
    h_TD: Tensor, tokens_T: Tensor, embed_VD: Tensor, m_KDX: Tensor, head_VD: Tensor
) -> list[Tensor]:
    """A state asks for those it is made of, down to the main model's; no depth is kept."""

    def state(depth: int, position: int) -> Tensor:
        if depth == 0:
            return h_TD[position].double()
        m, seen = m_KDX[depth - 1].double(), range(position + 1)
        joined = [
            torch.cat((embed_VD[tokens_T[i + depth]].double(), state(depth - 1, i))) for i in seen
        ]
        return torch.stack([m @ each for each in joined]).mean(0)

    sizes = [(k, len(h_TD) - k) for k in range(1, len(m_KDX) + 1)]
    logits = [torch.stack([head_VD.double() @ state(k, i) for i in range(n)]) for k, n in sizes]
    return [each.float() for each in logits]


def with_gradients(
    function: Function, h: Tensor, tokens: Tensor, embed: Tensor, m: Tensor, head: Tensor
) -> Any:
    """The logits, and what embedding and head learn from the sum of their squares."""
    shared = embed.clone().requires_grad_(), head.clone().requires_grad_()
    logits = function(h, tokens, shared[0], m, shared[1])
    if logits is None:
        return None
    made = logits if isinstance(logits, list | tuple) else []
    parts = [each for each in made if isinstance(each, Tensor) and each.requires_grad]
    loss = sum((each.square().sum() for each in parts), start=torch.zeros((), requires_grad=True))
    learned = torch.autograd.grad(loss, shared, allow_unused=True, materialize_grads=True)
    names = ("gradient of the embedding", "gradient of the head")
    return {"logits": logits, **dict(zip(names, learned, strict=True))}


def running_mean(x_TD: Tensor) -> Tensor:
    return x_TD.cumsum(0) / torch.arange(1, len(x_TD) + 1)[:, None]


def chaining(
    join: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda e, h: (e, h),
    block: Callable[[Tensor], Tensor] = running_mean,
    state: Callable[[Tensor, Tensor], Tensor] = lambda h, h0: h[:-1],
    start: Callable[[int], int] = lambda k: k,
    shared: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda embed, head: (embed, head),
    own: bool = True,
) -> Function:
    """The answer of somebody who does one of these in another way."""

    def answer(h0: Tensor, tokens: Tensor, embed: Tensor, m_KDX: Tensor, head: Tensor) -> Any:
        (embed, head), h, logits = shared(embed, head), h0, []
        for k, m in enumerate(m_KDX, start=1):
            h = state(h, h0)[: len(h0) - k]
            joined = torch.cat(join(embed[tokens[start(k) :][: len(h)]], h), dim=1)
            h = block(joined @ (m if own else m_KDX[0]).T)
            logits.append(h @ head.T)
        return logits

    return answer


def chain_picture(answer: Function) -> Drawing:
    draw, text = Draw(0), torch.arange(9)
    embed_VD, m_KDX = draw.normal(20, 6).double(), draw.normal(3, 6, 12).double()

    def logits(tokens: Tensor) -> list[Tensor]:
        made: list[Tensor] = answer(
            running_mean(embed_VD[tokens]), tokens, embed_VD, m_KDX, embed_VD
        )
        return made

    base, panels = logits(text), {f"depth {k}": torch.zeros(9, 9) for k in (1, 2, 3)}
    for column in range(9):
        for before, after, panel in zip(
            base, logits(text + 9 * (text == column)), panels.values(), strict=True
        ):
            moved = (after - before).abs().amax(1) > 1e-9
            panel[: len(moved), column] = moved.float()
    return Drawing("maps", {
        "panels": panels, "rows": "position", "columns": "token changed", "unit": "prediction moves"
    })  # fmt: skip


CHAIN = Exercise(
    identifier="06.3", title="A chain of depths",
    difficulty=4, importance=5, minutes=25, lines=7,
    case=chain_case, oracle=chain_one_by_one, picture=chain_picture, run=with_gradients,
    alt="which predictions move when a token is changed, behind a main model that takes the mean "
    "of what it has read. Each depth fills a triangle, one column wider than the depth before: "
    "position i knows tokens 0 to i + k, and never i + k + 1, its answer. The last k rows are "
    "empty.",
    wrong=(
        Wrong(chaining(state=lambda h, h0: h0),
              "every depth starts from the main model's state; in a chain it starts from the depth "
              "before", 19),
        Wrong(chaining(state=lambda h, h0: h0, join=lambda e, h: (0 * e, h)),
              "parallel heads that see no token; a depth joins the state with one, and starts from "
              "the depth before", 19),
        Wrong(chaining(join=lambda e, h: (0 * e, h)),
              "the tokens' embeddings are missing; each depth joins one with its state", 19),
        Wrong(chaining(shared=lambda embed, head: (embed.detach().clone(), head)),
              "right numbers, with an own embedding; the main model's learns nothing from here",
              19),
        Wrong(chaining(shared=lambda embed, head: (embed, head.detach().clone())),
              "right numbers, with an own head; the main model's learns nothing from here", 19),
        Wrong(chaining(shared=lambda embed, head: (embed.detach(), head.detach())),
              "right numbers, with an own embedding and an own head; the main model's learn "
              "nothing from here", 19),
        Wrong(chaining(join=lambda e, h: (h, e)),
              "the state stands first; the released weights expect another order", 21),
        Wrong(chaining(start=lambda k: 1),
              "each depth is given depth 1's tokens; each depth looks one token further"),
        Wrong(chaining(start=lambda k: k - 1),
              "depth k is given token i + k - 1, which the depth before has seen already"),
        Wrong(chaining(state=lambda h, h0: h[1:]),
              "the state of the next position is joined; state and prediction share a position"),
        Wrong(chaining(block=lambda x: x.mean(0).expand_as(x)),
              "the mean runs over all positions; a position sees none behind it"),
        Wrong(chaining(block=lambda x: x),
              "the block is missing; each position takes the mean of all up to itself"),
        Wrong(chaining(own=False),
              "one M for all depths; each has its own"),
    ),
)  # fmt: skip

EXERCISES = (JOIN, CHAIN)
