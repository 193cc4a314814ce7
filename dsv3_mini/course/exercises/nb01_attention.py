"""Exercises of notebook 01, the cache at work: who may look at what, and a step that appends.

Legend: T new tokens, P tokens before them, S = P + T, H heads, G key heads, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv3_mini.course.checking import Draw, Drawing, Exercise, Function, Wrong

# ------------------------------------------------------------------- 01.2 who may look at whom


def look_case(draw: Draw) -> dict[str, Any]:
    return {"before": draw.randint(0, 6), "new": draw.randint(1, 5)}


def look_by_position(before: int, new: int) -> Tensor:
    """Cell by cell: the key's position against the query's."""
    rows = [[key <= query for key in range(before + new)] for query in range(before, before + new)]
    return torch.tensor(rows)


def looking(allowed: Callable[[int, int, int], bool]) -> Function:
    """The answer of somebody who lets row i look at key j, with P tokens before, where this holds.

    ``allowed`` receives i, j and P.
    """

    def answer(before: int, new: int) -> Tensor:
        keys = range(before + new)
        return torch.tensor([[allowed(row, key, before) for key in keys] for row in range(new)])

    return answer


def look_picture(answer: Function) -> Drawing:
    panels = {"nothing before": answer(0, 6), "8 tokens before": answer(8, 6)}
    return Drawing(
        "maps", {"panels": panels, "rows": "new token", "columns": "key", "unit": "1: may look"}
    )


LOOK = Exercise(
    identifier="01.2", title="Who may look at whom",
    difficulty=2, importance=5, minutes=8, lines=2,
    case=look_case, oracle=look_by_position, picture=look_picture,
    alt="two masks for six new tokens. With nothing before them a triangle; with 8 tokens before "
    "them, all rows see those eight columns, and the triangle follows at the right edge.",
    wrong=(
        Wrong(lambda before, new: look_by_position(0, new),
              "a square mask, for the new tokens alone; the cached keys are columns too", 8),
        Wrong(looking(lambda row, key, before: key <= row),
              "the triangle stands at the left edge; at which position is the first new token?", 8),
        Wrong(looking(lambda row, key, before: True),
              "everything is allowed; one of several new tokens then sees those after it", 8),
        Wrong(looking(lambda row, key, before: key < before),
              "only the cached tokens are seen; new tokens also see each other, backwards"),
        Wrong(looking(lambda row, key, before: key >= before and key <= before + row),
              "the cached tokens are hidden; what are they kept for?"),
        Wrong(looking(lambda row, key, before: key < before + row),
              "a token does not see itself; its own key and value take part"),
        Wrong(looking(lambda row, key, before: key > before + row),
              "True where a key is hidden; here True means that it may be seen"),
        Wrong(lambda before, new: torch.zeros(new, before + new).masked_fill(
                  ~look_by_position(before, new), float("-inf")),
              "a mask to be added to scores, of 0 and -inf; here it is one of True and False"),
    ),
)  # fmt: skip

# ----------------------------------------------------------- 01.3 a step that appends to a cache


def append_case(draw: Draw) -> dict[str, Any]:
    key_heads, group, width = draw.randint(2, 3), draw.randint(2, 3), draw.randint(4, 8)
    new, before = draw.randint(1, 4), draw.randint(1, 6)
    return {
        "q_HTD": 2 * draw.normal(key_heads * group, new, width),
        "k_GTD": draw.normal(key_heads, new, width), "v_GTD": draw.normal(key_heads, new, width),
        "keys_GPD": draw.normal(key_heads, before, width),
        "values_GPD": draw.normal(key_heads, before, width),
    }  # fmt: skip


def append_one_by_one(
    q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, keys_GPD: Tensor, values_GPD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Lists that grow by a token, and every head's query compared with all that is in them."""
    q, k, v, keys, values = (
        x.double().numpy() for x in (q_HTD, k_GTD, v_GTD, keys_GPD, values_GPD)
    )
    lists = [([*old_k], [*old_v]) for old_k, old_v in zip(keys, values, strict=True)]
    out = np.zeros(q.shape)
    for t in range(q.shape[1]):
        for key_head, (known_k, known_v) in enumerate(lists):
            known_k.append(k[key_head, t])
            known_v.append(v[key_head, t])
        for head in range(len(q)):
            known_k, known_v = lists[head * len(lists) // len(q)]
            powers = [np.exp(sum(q[head, t] * each) / np.sqrt(len(each))) for each in known_k]
            out[head, t] = sum(p * x for p, x in zip(powers, known_v, strict=True)) / sum(powers)
    made = (out, [known_k for known_k, _ in lists], [known_v for _, known_v in lists])
    output, all_keys, all_values = (torch.tensor(np.array(x), dtype=torch.float32) for x in made)
    return output, all_keys, all_values


def causal(x_HTS: Tensor, beyond: int = 0) -> Tensor:
    """Scores with the future at minus infinity; the diagonal moved right by ``beyond``."""
    new, seen = x_HTS.shape[1:]
    allowed = torch.ones(new, seen, dtype=torch.bool).tril(seen - new + beyond)
    return x_HTS.masked_fill(~allowed, float("-inf"))


def masked_afterwards(x_HTS: Tensor) -> Tensor:
    return x_HTS.softmax(2).tril(x_HTS.shape[2] - x_HTS.shape[1])


def appending(
    weigh: Callable[[Tensor, int], Tensor] = lambda x, d: (causal(x) / d**0.5).softmax(2),
    match: Callable[[Tensor, int], Tensor] = lambda x, group: x.repeat_interleave(group, 0),
    join: Callable[[Tensor, Tensor], Tensor] = lambda old, new: torch.cat((old, new), 1),
) -> Function:
    """The answer of somebody who makes shares of scores and the width, matches key heads to query
    heads, and joins old and new, in these ways."""

    def answer(q: Tensor, k: Tensor, v: Tensor, old_k: Tensor, old_v: Tensor) -> Any:
        keys, values = join(old_k, k), join(old_v, v)
        group = len(q) // len(k)
        shares = weigh(q @ match(keys, group).mT, q.shape[2])
        return shares @ match(values, group), keys, values

    return answer


def returning(change: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Function:
    """The right output with another cache: made of the whole one, the old one and the queries."""

    def answer(q: Tensor, k: Tensor, v: Tensor, old_k: Tensor, old_v: Tensor) -> Any:
        output, keys, values = append_one_by_one(q, k, v, old_k, old_v)
        return output, change(keys, old_k, q), change(values, old_v, q)

    return answer


def append_picture(answer: Function) -> Drawing:
    one_hot = torch.eye(12)[None]
    old, new = one_hot.split([8, 4], dim=1)
    q_HTD = 20 * torch.eye(12)[[3, 9]][:, None].expand(-1, 4, -1)  # each head asks for one key
    output_HTD, _, _ = answer(q_HTD, new, new, old, old)
    names = ["head 0 asks for key 3", "head 1 asks for key 9"]
    return Drawing("maps", {
        "panels": dict(zip(names, output_HTD, strict=True)), "rows": "new token",
        "columns": "number of the output", "unit": "value",
        "ticks": ["token 8", "token 9", "token 10", "token 11"],
    })  # fmt: skip


APPEND = Exercise(
    identifier="01.3", title="A step that appends to a cache",
    difficulty=3, importance=5, minutes=25, lines=7,
    case=append_case, oracle=append_one_by_one, picture=append_picture,
    alt="four new tokens after eight cached ones. Key and value of token t are one at place t. "
    "Head 0 asks for key 3 and every token finds it. Head 1 asks for key 9: token 8 stands before "
    "it and gets a bit of everything so far, the other three find it.",
    wrong=(
        Wrong(appending(lambda x, d: (x / d**0.5).softmax(2)),
              "no mask; one token at a time that goes well, but of several the first sees the "
              "last", 8),
        Wrong(appending(lambda x, d: (causal(x, x.shape[1] - x.shape[2]) / d**0.5).softmax(2)),
              "the mask counts new tokens from position 0; they come after the cached ones", 8),
        Wrong(appending(lambda x, d: (causal(x, -1) / d**0.5).softmax(2)),
              "a token does not see itself; its key is appended before it asks"),
        Wrong(appending(lambda x, d: masked_afterwards(x / d**0.5)),
              "the future is set to zero after the softmax; the shares then do not add up to one"),
        Wrong(appending(lambda x, d: causal(x).softmax(2)),
              "the scale is missing", 5),
        Wrong(appending(lambda x, d: (causal(x) / d**0.5).softmax(1)),
              "the softmax runs over the queries; each query weighs the keys"),
        Wrong(appending(match=lambda x, group: x.repeat(group, 1, 1)),
              "the key heads are dealt out in turn; neighbouring heads share one"),
        Wrong(appending(join=lambda old, new: torch.cat((new, old), 1)),
              "the new keys stand before the old ones; the order of rows is the order of tokens"),
        Wrong(returning(lambda whole, old, q: old),
              "the output is right, but the cache is returned as it was; what will the next step "
              "know of these tokens?"),
        Wrong(returning(lambda whole, old, q: whole[:, -q.shape[1] :]),
              "the output is right, but only the new tokens are returned; the old ones are lost"),
        Wrong(returning(lambda whole, old, q: whole.repeat_interleave(len(q) // len(old), 0)),
              "the output is right, but the cache has a copy for every head; stored are G heads"),
    ),
)  # fmt: skip

EXERCISES = (LOOK, APPEND)
