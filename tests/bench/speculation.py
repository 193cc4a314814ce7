"""Speculative against plain decoding, with the trained model that comes with the package."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from dsv3_mini import speculative
from dsv3_mini.course.trained import load_trained
from dsv3_mini.data import load_corpus
from dsv3_mini.generate import generate
from tests.bench.plan import Plan
from tests.bench.timing import Entrant, Race, run_race

SPECULATIVE, PLAIN = "speculative", "plain decoding"
PROMPT = 32


@dataclass(frozen=True)
class Drafts:
    """What does not depend on the machine's speed: the drafts' fate, over all prompts."""

    tokens: int
    """New tokens that one run makes."""
    drafted: int
    accepted: int
    steps: int
    """Passes of the main model after the prompts."""


def speculation(plan: Plan, threads: list[int]) -> tuple[list[Race], Drafts]:
    """Greedy text after held-out prompts of every domain, both ways; asserted to be the same."""
    model, corpus = load_trained(), load_corpus()
    windows = [corpus.windows(domain, PROMPT, plan.prompts) for domain in corpus.domains]
    prompts = torch.cat(windows)[:, :PROMPT]
    stats = []
    for prompt in prompts:
        text, fate = speculative.generate(model, prompt, plan.new_tokens)
        assert torch.equal(text, generate(model, prompt, plan.new_tokens)), "not the plain text"
        stats.append(fate)
    drafts = Drafts(
        len(prompts) * plan.new_tokens,
        *(sum(getattr(fate, name) for fate in stats) for name in ("drafted", "accepted", "steps")),
    )

    def run_all(how: str) -> None:
        for prompt in prompts:
            run = speculative.generate if how == SPECULATIVE else generate
            run(model, prompt, plan.new_tokens)

    entrants = {how: Entrant(partial(run_all, how)) for how in (SPECULATIVE, PLAIN)}
    races = []
    for count in threads:
        torch.set_num_threads(count)
        race = Race("greedy decoding", "trained model", drafts.tokens, "new tokens", count)
        races.append(run_race(race, entrants, plan.pace))
    return races, drafts
