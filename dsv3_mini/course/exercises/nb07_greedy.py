"""Exercises of notebook 07, greedy decoding: what is kept of a chain of drafts, and the cache.

Legend: K drafts, T = K + 1 answers, V vocabulary, S cached tokens, N tokens of the prompt, M states
of the toy model's memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dsv3_mini.course.checking import Draw, Drawing, Exercise, Function, Wrong

# ------------------------------------------------------------------- 07.2 which drafts are kept


def kept_case(draw: Draw) -> dict[str, Any]:
    """All drafts are right in one case of four; how sure the module was says nothing about it."""
    count, vocabulary = draw.randint(3, 6), draw.randint(12, 20)
    logits_TV = draw.normal(count + 1, vocabulary)
    right = draw.choice([0.6, 0.6, 0.6, 1.0])
    drafts = [
        best if draw.random() < right else draw.choice([v for v in range(vocabulary) if v != best])
        for best in logits_TV.argmax(1).tolist()[:-1]
    ]
    sure = [draw.uniform(0.91, 0.99) if draw.random() < 0.6 else 0.09 for _ in drafts]
    return {
        "drafts_K": torch.tensor(drafts), "chance_K": torch.tensor(sure), "logits_TV": logits_TV
    }  # fmt: skip


def kept_one_by_one(drafts_K: Tensor, chance_K: Tensor, logits_TV: Tensor) -> Tensor:
    """What plain greedy decoding says, for as long as the text is the one that was drafted."""
    text: list[int] = []
    for place, row in enumerate(logits_TV.tolist()):
        if text != drafts_K[:place].tolist():
            break
        text.append(max(range(len(row)), key=row.__getitem__))
    return torch.tensor(text)


def repeatedly(function: Function, drafts: Tensor, chance: Tensor, logits: Tensor) -> Any:
    """The answer; or that it is another one each time, which no case alone could tell."""
    with torch.random.fork_rng(devices=[]):
        made = []
        for seed in range(12):
            torch.manual_seed(seed)
            made.append(function(drafts, chance, logits))
    first = made[0]
    if isinstance(first, Tensor) and not all(torch.equal(first, other) for other in made):
        return "another answer each time"
    return first


def keeping(
    good: Callable[[Tensor, Tensor, Tensor], Tensor],
    text: Callable[[Tensor, Tensor, int], Tensor] = lambda drafts, best, n: torch.cat(
        (drafts[:n], best[n : n + 1])
    ),
    count: Callable[[Tensor], int] = lambda good_K: int(good_K.long().cumprod(0).sum()),
) -> Function:
    """The answer of somebody to whom these drafts are good, who counts and puts together so."""

    def answer(drafts_K: Tensor, chance_K: Tensor, logits_TV: Tensor) -> Tensor:
        best_T = logits_TV.argmax(1)
        return text(drafts_K, best_T, count(good(drafts_K, chance_K, best_T)))

    return answer


def same(drafts_K: Tensor, chance_K: Tensor, best_T: Tensor) -> Tensor:
    return drafts_K == best_T[:-1]


def kept_picture(answer: Function) -> Drawing:
    drafts, rows = torch.arange(6), []
    bad = {"no draft wrong": [], **{f"draft {n} wrong": [n] for n in range(1, 7)}}
    for places in ({**bad, "2 and 5 wrong": [2, 5]}).values():
        best = torch.arange(7)
        best[[place - 1 for place in places]] = 7
        out = answer(drafts, torch.ones(6), torch.eye(8)[best])
        own = out != torch.cat((drafts, torch.tensor([-1])))[: len(out)]
        rows.append(torch.cat((1 + own, torch.zeros(7 - len(out)))))
    return Drawing("maps", {
        "panels": {"what a round with six drafts decides": torch.stack(rows)}, "rows": "",
        "columns": "token of the round, from 0", "unit": "1 draft, 2 main model's",
        "ticks": [*bad, "2 and 5 wrong"],
    })  # fmt: skip


KEPT = Exercise(
    identifier="07.2", title="Which drafts are kept?",
    difficulty=2, importance=5, minutes=15, lines=3,
    case=kept_case, oracle=kept_one_by_one, picture=kept_picture, run=repeatedly,
    alt="one round a row. Each row ends with a token of the main model, the drafts before it are "
    "kept: six and one if no draft is wrong, none and one if the first is. With drafts 2 and 5 "
    "wrong, the row is that of draft 2.",
    wrong=(
        Wrong(keeping(lambda d, chance, best: chance > 0.5),
              "drafts are kept when the module is sure of them; only the main model's answer "
              "decides", 22),
        Wrong(keeping(lambda d, chance, best: torch.rand(len(d)) < 0.5),
              "drafts are kept by chance, so the text is another one each time; a draft is kept "
              "where the main model agrees", 22),
        Wrong(keeping(lambda d, chance, best: d >= 0),
              "every draft is kept; some of them the main model would not have said", 22),
        Wrong(keeping(lambda d, chance, best: d == best[1:]),
              "a draft is compared with the answer that comes after it; its own row is the one "
              "before", 22),
        Wrong(keeping(same, count=lambda good_K: int(good_K.sum())),
              "drafts after a refused one are counted; they were made for a text that is gone"),
        Wrong(keeping(same, lambda d, best, n: torch.cat((d[: n + 1], best[n + 1 : n + 2]))),
              "the refused draft stays in the text; the main model's own token takes its place"),
        Wrong(keeping(same, lambda drafts, best, n: drafts[:n]),
              "the main model's own token is missing; each round decides one besides the drafts"),
        Wrong(keeping(same, lambda drafts, best, n: best[: min(n + 1, len(drafts))]),
              "with every draft kept, the last row is thrown away; it gives one token more"),
        Wrong(keeping(same, count=lambda good_K: len(good_K) * bool(good_K.all())),
              "all or nothing; drafts before the first refused one are good"),
        Wrong(keeping(same, lambda drafts, best, n: best),
              "answers after a refused draft are kept; they follow a text that is gone"),
    ),
)  # fmt: skip

# --------------------------------------------------------------------- 07.3 the loop and the cache


def main_model(cache_S: Tensor, tokens_T: Tensor, next_VM: Tensor) -> tuple[Tensor, Tensor]:
    """The toy of the notebook: its next token after each of ``tokens``, and the longer cache."""
    cache_S = torch.cat((cache_S, tokens_T))
    memory_T = cache_S.cumsum(0)[-len(tokens_T) :] % next_VM.shape[1]
    return next_VM[tokens_T, memory_T], cache_S


def toy(draw: Draw, vocabulary: int, right: float) -> tuple[Tensor, Tensor]:
    """A main model, and drafts that are the most frequent follower in this share of tokens."""
    usual = [draw.randrange(vocabulary) for _ in range(vocabulary)]
    next_VM = torch.tensor([[token] * 3 for token in usual])
    for row in next_VM:
        row[draw.randrange(3)] = draw.randrange(vocabulary)
    other = [token if draw.random() < right else (token + 1) % vocabulary for token in usual]
    return next_VM, torch.tensor(other)


def loop_case(draw: Draw) -> dict[str, Any]:
    next_VM, draft_V = toy(draw, vocabulary := draw.randint(20, 30), 0.9)
    prompt_N = torch.tensor([draw.randrange(vocabulary) for _ in range(draw.randint(3, 6))])
    return {
        "prompt_N": prompt_N, "next_VM": next_VM, "draft_V": draft_V, "count": draw.randint(15, 25)
    }  # fmt: skip


def loop_without_cache(
    prompt_N: Tensor, next_VM: Tensor, draft_V: Tensor, count: int
) -> tuple[Tensor, int]:
    """The plain greedy text first; then how many rounds it takes to walk along it."""
    table, guess, states = next_VM.tolist(), draft_V.tolist(), next_VM.shape[1]
    text = prompt_N.tolist()
    for _ in range(count + 1):
        text.append(table[text[-1]][sum(text) % states])
    new = text[len(prompt_N) :]
    place, passes = 0, 1  # the prompt's pass decides the first token
    while place + 1 < count:
        place += 2 if guess[new[place]] == new[place + 1] else 1
        passes += 1
    return torch.tensor(new[:count]), passes


def looping(
    accept: Callable[[Tensor, Tensor], Tensor] = lambda draft, best: draft == best[0],
    accepted: Callable[[Tensor, Tensor], list[Tensor]] = lambda draft, best: [draft, best[1]],
    refused: Callable[[Tensor, Tensor], list[Tensor]] = lambda draft, best: [best[0]],
    drop: tuple[int, int] = (0, 1), cut: bool = True, prompt_counts: int = 1,
) -> Function:  # fmt: skip
    """A loop in which one of these is done in another way; ``drop``: rows of the cache, accepted
    and refused."""

    def answer(
        prompt_N: Tensor, next_VM: Tensor, draft_V: Tensor, count: int
    ) -> tuple[Tensor, int]:
        best_T, cache_S = main_model(prompt_N[:0], prompt_N, next_VM)
        text, passes = [best_T[-1]], prompt_counts
        while len(text) < count:
            draft = draft_V[text[-1]]
            best_T, cache_S = main_model(cache_S, torch.stack((text[-1], draft)), next_VM)
            passes += 1
            good = bool(accept(draft, best_T))
            text += (accepted if good else refused)(draft, best_T)
            cache_S = cache_S[: len(cache_S) - drop[not good]]
        return torch.stack(text[:count] if cut else text), passes

    return answer


def loop_picture(answer: Function) -> Drawing:
    draw, tokens, shares = Draw(0), 1009, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    following_V = torch.arange(1, tokens + 1) % tokens
    luck_V = torch.tensor([draw.random() for _ in range(tokens)])
    passes = []
    for share in shares:
        guess_V = torch.where(luck_V < share, following_V, 0)
        new = answer(torch.tensor([1, 2]), following_V[:, None].expand(-1, 3), guess_V, 1000)
        passes.append(float(new[1]))
    return Drawing("lines", {
        "x": shares, "curves": {"without drafts": [1000.0] * 6, "with drafts": passes},
        "xlabel": "share of tokens after which the draft is right",
        "ylabel": "passes of the main model", "title": "1,000 new tokens",
    })  # fmt: skip


LOOP = Exercise(
    identifier="07.3", title="The loop, and what leaves the cache",
    difficulty=4, importance=5, minutes=30, lines=12,
    case=loop_case, oracle=loop_without_cache, picture=loop_picture,
    alt="how many passes 1,000 tokens take. Without drafts 1,000, a level line. With them as many "
    "if none is right, fewer the more of them are right, and 501 if all are: one for the prompt, "
    "and half of the 999 other tokens, rounded up.",
    wrong=(
        Wrong(looping(drop=(0, 0)),
              "the refused draft stays in the cache; all later tokens attend to it", 10),
        Wrong(looping(drop=(0, 2)),
              "two rows leave the cache after a refused draft; the decided token stays", 10),
        Wrong(looping(drop=(1, 1)),
              "a row leaves the cache after a kept draft, too; both tokens are in the text", 10),
        Wrong(looping(accept=lambda draft, best: torch.tensor(True)),
              "every draft is kept; some of them the main model would not have said", 22),
        Wrong(looping(accept=lambda draft, best: draft == best[1]),
              "the draft is compared with the answer that comes after it", 22),
        Wrong(looping(refused=lambda draft, best: [draft]),
              "a refused draft stays in the text; the main model's own token takes its place", 22),
        Wrong(looping(refused=lambda draft, best: [best[1]]),
              "after a refused draft the second answer is taken; it follows the draft", 22),
        Wrong(looping(accepted=lambda draft, best: [draft], drop=(1, 1)),
              "right text, no gain, a pass a token; the answer after a kept draft is a token, too"),
        Wrong(looping(cut=False),
              "a token too many, if the last round decides two; return `count` of them"),
        Wrong(looping(prompt_counts=0),
              "the prompt's pass is not counted"),
    ),
)  # fmt: skip

EXERCISES = (KEPT, LOOP)
