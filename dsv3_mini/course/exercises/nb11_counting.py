"""Exercises of notebook 11, counting: the parameters of the model, the bytes on one card."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from dsv3_mini.course.checking import Draw, Drawing, Exercise, Function, Wrong

# ----------------------------------------------------- 11.1 totals from the shapes, report 2.1, 2.2


def totals_case(draw: Draw) -> dict[str, Any]:
    experts, dense = draw.randint(8, 12), draw.randint(1, 3)
    return {
        "vocabulary": draw.randint(300, 400), "hidden": draw.randint(11, 17),
        "layers": dense + draw.randint(3, 5), "dense": dense,
        "dense_width": draw.randint(50, 70), "experts": experts, "chosen": draw.randint(2, 5),
        "width": draw.randint(5, 9), "attention": draw.randint(1000, 2000),
    }  # fmt: skip


def totals_by_instantiating(
    vocabulary: int, hidden: int, layers: int, dense: int, dense_width: int, experts: int,
    chosen: int, width: int, attention: int,
) -> tuple[int, int, int]:  # fmt: skip
    """Lay out every tensor without its memory, by name, and add up the numbers in them."""
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens": (vocabulary, hidden)}
    shapes |= {"lm_head": (vocabulary, hidden), "norm": (hidden,)}
    for layer in range(layers + 1):  # the last one is MTP's
        block: dict[str, tuple[int, ...]] = {"attention": (attention,)}
        block |= {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
        ffns = {"mlp": dense_width}
        if layer >= dense:
            block |= {"gate": (experts, hidden), "bias": (experts,)}
            names = [*(f"experts.{e}" for e in range(experts)), "shared_experts"]
            ffns = dict.fromkeys(names, width)
        for name, wide in ffns.items():
            block |= {f"{name}.gate": (wide, hidden), f"{name}.up": (wide, hidden)}
            block[f"{name}.down"] = (hidden, wide)
        if layer == layers:
            block |= dict.fromkeys(("enorm", "hnorm", "shared_head.norm"), (hidden,))
            block["eh_proj"] = (hidden, 2 * hidden)
        shapes |= {f"{layer}.{name}": shape for name, shape in block.items()}
    main = used = mtp = 0
    for name, shape in shapes.items():
        count = torch.empty(shape, device="meta").numel()
        words = name.split(".")
        if words[0] == str(layers):
            mtp += count
            continue
        main += count
        idle = words[1:2] == ["experts"] and int(words[2]) >= chosen
        used += 0 if idle or name == "embed_tokens" else count
    return main, used, mtp


class Pieces(NamedTuple):
    """What totals are made of: sizes of single pieces, and the number of dense and MoE layers."""

    table: int
    hidden: int
    dense_ffn: int
    expert: int
    experts: int
    idle: int
    dense: int
    moe: int


def off_by(change: Callable[[Pieces], tuple[int, int, int]]) -> Function:
    """The answer of somebody whose three numbers are off by so much."""

    def answer(*sizes: int) -> tuple[int, ...]:
        vocabulary, hidden, layers, dense, dense_width, experts, chosen, width, _ = sizes
        off = change(Pieces(vocabulary * hidden, hidden, 3 * dense_width * hidden,
                            3 * width * hidden, experts, experts - chosen, dense,
                            layers - dense))  # fmt: skip
        return tuple(n + d for n, d in zip(totals_by_instantiating(*sizes), off, strict=True))

    return answer


def with_mtp(*sizes: int) -> tuple[int, int, int]:
    main, used, mtp = totals_by_instantiating(*sizes)
    return main + mtp, used, mtp


def with_mtp_twice(*sizes: int) -> tuple[int, int, int]:
    main, used, mtp = totals_by_instantiating(*sizes)
    return main + mtp, used + mtp, mtp


def totals_picture(answer: Function) -> Drawing:
    experts = [8, 16, 32, 64, 128, 256]
    every = [answer(129_280, 7168, 61, 3, 18_432, count, 8, 2048, 187_107_328) for count in experts]
    return Drawing("lines", {
        "x": experts, "xlabel": "routed experts in a layer, 8 of them chosen", "logx": True,
        "curves": {"all": [main / 1e9 for main, _, _ in every],
                   "a token uses": [used / 1e9 for _, used, _ in every]},
        "ylabel": "parameters (billions)",
    })  # fmt: skip


TOTALS = Exercise(
    identifier="11.1", title="671 billion, from the sizes",
    difficulty=3, importance=5, minutes=20, lines=8,
    case=totals_case, oracle=totals_by_instantiating, picture=totals_picture,
    alt="V3's parameters if it had fewer experts. With 8 experts, all of them chosen, the main "
    "model would have 37 billion. With 256 it has 671, while what a token uses stays between 36.5 "
    "and 36.6: only the routers grow.",
    wrong=(
        Wrong(off_by(lambda p: (-p.table, 0, 0)),
              "the total has one table for embedding and head together; V3 does not tie them", 26),
        Wrong(off_by(lambda p: (-p.table, -p.table, 0)),
              "total and use have one table for embedding and head together, and a token's use "
              "has neither left; V3 does not tie them", 26),
        Wrong(off_by(lambda p: (-p.moe * p.experts, -p.moe * p.experts, -p.experts)),
              "the routers' biases are missing; nothing trains them, and they are stored all the "
              "same", 26),
        Wrong(off_by(lambda p: (0, -p.moe * p.experts, 0)),
              "what a token uses is counted without the routers' biases; who chose its experts?",
              26),
        Wrong(with_mtp,
              "the MTP layer is in the main model's total; it is the third number", 26),
        Wrong(with_mtp_twice,
              "the MTP layer is in the main model's total and in what a token uses; it is the "
              "third number", 26),
        Wrong(off_by(lambda p: (0, 0, 2 * p.table)),
              "the MTP layer is counted with its copies of embedding and head; those belong to the "
              "main model", 26),
        Wrong(off_by(lambda p: (0, 0, -2 * p.hidden**2)),
              "the MTP layer has no matrix that joins state and embedding", 26),
        Wrong(off_by(lambda p: (0, 0, -(p.hidden**2))),
              "the MTP layer's own matrix is square; how wide is what it is given?", 26),
        Wrong(off_by(lambda p: (0, 0, -3 * p.hidden)),
              "the MTP layer has the norms of a block only; it has three more", 26),
        Wrong(off_by(lambda p: (0, p.table, 0)),
              "what a token uses is counted with the embedding table, of which it reads one row",
              26),
        Wrong(off_by(lambda p: (0, -p.table, 0)),
              "what a token uses is counted without the head; its logits need every row of that",
              26),
        Wrong(off_by(lambda p: (0, -p.dense * p.idle * p.expert, 0)),
              "idle experts are taken off in dense layers too, which have none"),
        Wrong(off_by(lambda p: (0, -p.moe * p.expert, 0)),
              "what a token uses is counted without the shared experts"),
        Wrong(off_by(lambda p: (p.dense * ((p.experts + 1) * p.expert - p.dense_ffn
                                           + p.experts * (p.hidden + 1)),) * 2 + (0,)),
              "every layer is taken for a MoE layer, and the first ones keep their dense form"),
        Wrong(off_by(lambda p: (-(2 * (p.dense + p.moe) + 1) * p.hidden,) * 2 + (-5 * p.hidden,)),
              "the norms are missing: two in a layer, one at the end, MTP's five"),
        Wrong(off_by(lambda p: (-p.hidden, -p.hidden, 0)),
              "the norm before the head is missing"),
        Wrong(off_by(lambda p: (
            -(p.dense * p.dense_ffn + p.moe * (p.experts + 1) * p.expert) // 3,
            -(p.dense * p.dense_ffn + p.moe * (p.experts + 1 - p.idle) * p.expert) // 3,
            -(p.experts + 1) * p.expert // 3)),
              "a feed-forward is counted with two matrices; SwiGLU has three"),
    ),
)  # fmt: skip

# ------------------------------------------------------------------------ 11.2 bytes on one card


def card_case(draw: Draw) -> dict[str, Any]:
    block, cards = draw.randint(4, 6), draw.randint(3, 5)
    return {
        "cards": cards, "layers": draw.randint(2, 4),
        "experts": cards * draw.randint(2, 3) + draw.randint(1, cards - 1),
        "width": 2 * block + draw.randint(1, block - 1),
        "hidden": 4 * block + draw.randint(1, block - 1),
        "block": block, "rest": draw.randint(1000, 2000),
    }  # fmt: skip


def card_by_dealing(
    cards: int, layers: int, experts: int, width: int, hidden: int, block: int, rest: int
) -> int:
    """Walk through the blocks of an expert, then deal out experts like playing cards."""
    expert = 0
    for rows, columns in ((width, hidden), (width, hidden), (hidden, width)):
        for top in range(0, rows, block):
            for left in range(0, columns, block):
                expert += min(block, rows - top) * min(block, columns - left) + 4
    held = [rest] * cards
    for _ in range(layers):
        for number in range(experts):
            held[number % cards] += expert
    return max(held)


def holding(
    scales: Callable[[int, int, int], float] = lambda w, h, b: 4 * -(-w // b) * -(-h // b),
    most: Callable[[int, int, int], float] = lambda experts, cards, layers: (
        layers * -(-experts // cards)
    ),
    rest: Callable[[int, int], float] = lambda rest, cards: rest,
    matrices: int = 3,
) -> Function:
    """The answer of somebody who counts such scales of a matrix, and such experts and rest."""

    def answer(
        cards: int, layers: int, experts: int, width: int, hidden: int, block: int, others: int
    ) -> int:
        matrix = width * hidden + scales(width, hidden, block)
        return int(most(experts, cards, layers) * matrices * matrix + rest(others, cards))

    return answer


def card_picture(answer: Function) -> Drawing:
    cards = list(range(8, 65))
    # The rest: everything but routed experts, MTP's own included, as notebook 11 adds it up.
    held = [answer(n, 59, 256, 2048, 7168, 128, 19_522_665_024) / 1e9 for n in cards]
    return Drawing("lines", {
        "x": cards, "curves": {"fullest card": held, "80 GB": [80.0] * len(cards)},
        "xlabel": "cards", "ylabel": "weights (GB)", "marks": False,
    })  # fmt: skip


CARD = Exercise(
    identifier="11.2", title="The fullest card",
    difficulty=2, importance=4, minutes=15, lines=5,
    case=card_case, oracle=card_by_dealing, picture=card_picture,
    alt="gigabytes of V3's FP8 weights on the fullest card, all but the experts on each. The line "
    "falls in steps that get longer, as more cards help only when each gets an expert less. It "
    "passes 80 GB from 11 to 12 cards, and cannot fall below the 19.5 GB that each one has.",
    wrong=(
        Wrong(holding(lambda w, h, b: 0),
              "there are no scales; FP8 codes alone do not say how large a number is", 24),
        Wrong(holding(lambda w, h, b: 4 * (w // b) * (h // b)),
              "blocks at a ragged edge have no scale; they are smaller, and have one all the same",
              24),
        Wrong(holding(lambda w, h, b: 4 * -(-w * h // b**2)),
              "blocks are counted from the number of weights; a block does not go on at the next "
              "edge", 24),
        Wrong(holding(lambda w, h, b: 4),
              "one scale for a whole matrix; each block has its own", 24),
        Wrong(holding(lambda w, h, b: 4 * w * -(-h // b)),
              "a scale for each piece of a row, as activations have; those of weights are square",
              24),
        Wrong(holding(lambda w, h, b: -(-w // b) * -(-h // b)),
              "a scale takes one byte; it is an fp32 number"),
        Wrong(holding(lambda w, h, b: 2 * -(-w // b) * -(-h // b)),
              "a scale takes two bytes; it is an fp32 number"),
        Wrong(holding(lambda w, h, b: w * h + 8 * -(-w // b) * -(-h // b)),
              "everything is twice as large; an FP8 code is one byte"),
        Wrong(holding(matrices=2),
              "an expert is counted with two matrices; SwiGLU has three"),
        Wrong(holding(most=lambda experts, cards, layers: layers * (experts // cards)),
              "the emptiest card; where experts are left over, some cards get one more"),
        Wrong(holding(most=lambda experts, cards, layers: layers * experts / cards),
              "the mean over the cards; an expert is not cut"),
        Wrong(holding(most=lambda experts, cards, layers: -(-layers * experts // cards)),
              "the layers' experts are dealt out together; each layer's are dealt from the first "
              "card on"),
        Wrong(holding(most=lambda experts, cards, layers: -(-experts // cards)),
              "the experts of one layer"),
        Wrong(holding(most=lambda experts, cards, layers: layers * experts),
              "every card has all experts; they are spread"),
        Wrong(holding(rest=lambda rest, cards: rest // cards),
              "the rest is in slices; here every card has all of it"),
        Wrong(holding(rest=lambda rest, cards: 0),
              "the rest of the weights is missing"),
    ),
)  # fmt: skip

EXERCISES = (TOTALS, CARD)
