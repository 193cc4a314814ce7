"""Races of whole models: a prompt, the next token at a context, a training step."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from dsv3_mini.config import ModelConfig
from dsv3_mini.model import Transformer
from tests.bench.implementations import (
    DEFAULT,
    EAGER,
    OURS,
    Implementation,
    Ours,
    Theirs,
    assert_same,
)
from tests.bench.plan import Plan, scaled
from tests.bench.products import PRODUCTS, products_alone
from tests.bench.timing import Entrant, Race, run_race, say

CHUNK = 512
"""Tokens of a prompt at once, where a long cache is filled."""
STEPS = 8
"""Tokens decoded in a row."""

Team = dict[str, Implementation]


def random_tokens(config: ModelConfig, batch: int, length: int) -> Tensor:
    """Tokens (batch, length): times do not depend on which they are."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(config.vocab_size, (batch, length), generator=generator)


@torch.no_grad()
def prefill(team: Team, size: str, config: ModelConfig, plan: Plan, threads: int) -> list[Race]:
    """A prompt of each length into a new cache, logits of every position."""
    torch.set_num_threads(threads)
    tokens = random_tokens(config, 1, max(plan.prefill))
    agree(team, tokens[:, :64], f"{size}: logits of 64 tokens")
    races = []
    for length in plan.prefill:
        entrants = {
            name: Entrant(partial(one.prefill, tokens[:, :length]), one.choose)
            for name, one in team.items()
        }
        entrants[PRODUCTS], launches = products_alone(entrants[OURS])
        race = Race("prefill", size, length, "tokens", threads, launches=launches)
        races.append(run_race(race, entrants, plan.pace))
    return races


def agree(team: Team, tokens: Tensor, what: str) -> None:
    """Prompt logits of ours and of both of transformers' paths are the same."""
    ours = team[OURS].prefill(tokens)
    for name in (DEFAULT, EAGER):
        team[name].choose()
        assert_same(ours, team[name].prefill(tokens), f"{what}, {name}")


@torch.no_grad()
def decode(
    team: Team, size: str, config: ModelConfig, plan: Plan, threads: list[int]
) -> tuple[list[Race], dict[int, dict[str, int]]]:
    """New tokens at each context, for every number of threads; also bytes of the caches.

    The cache is filled once, in chunks: ours and the Llama's by running them, transformers' by
    copying the latents of ours, which the agreement of the next logits then proves right.
    """
    tokens = random_tokens(config, 1, max(plan.decode) + 1)
    for one in team.values():
        one.open(max(plan.decode) + STEPS)
    races, held = [], {}
    filled = 0
    for context in plan.decode:
        say(f"{size}: filling the caches up to {context:,} tokens")
        torch.set_num_threads(max(threads))
        fill(team, tokens[:, filled:context])
        filled, new = context, tokens[:, context : context + 1]
        held[context] = {name: one.cache_bytes for name, one in team.items()}
        next_logits = team[OURS].extend(new)
        for name in (DEFAULT, EAGER):
            team[name].choose()
            assert_same(next_logits, team[name].extend(new), f"{size}: {name} at {context:,}")
        entrants = {
            name: Entrant(partial(one.extend, new), partial(ready, one, context), STEPS)
            for name, one in team.items()
        }
        team[OURS].put_back(context)
        entrants[PRODUCTS], launches = products_alone(entrants[OURS])
        for count in threads:
            torch.set_num_threads(count)
            race = Race("decode", size, context, "tokens", count, launches=launches)
            races.append(run_race(race, entrants, plan.pace))
        for one in team.values():
            one.put_back(context)
    return races, held


def ready(one: Implementation, context: int) -> None:
    """Its own path, and a cache of exactly ``context`` tokens."""
    one.choose()
    one.put_back(context)


def fill(team: Team, tokens: Tensor) -> None:
    """Append tokens (1, T) to every cache."""
    ours = team[OURS]
    assert isinstance(ours, Ours)
    for one in team.values():
        if one.name in (DEFAULT, EAGER) and isinstance(one, Theirs):
            one.copy_cache(ours)
            continue
        for chunk in tokens.split(CHUNK, dim=1):
            one.extend(chunk)


def training(team: Team, size: str, config: ModelConfig, plan: Plan, threads: int) -> Race:
    """Forward, cross-entropy, backward, clipping at 1, fused AdamW. It changes the weights."""
    torch.set_num_threads(threads)
    batch, length = plan.train
    tokens = random_tokens(config, batch, length + 1)
    entrants = {name: Entrant(partial(one.train, tokens), one.choose) for name, one in team.items()}
    entrants[PRODUCTS], launches = products_alone(entrants[OURS])
    race = Race("training step", size, batch, "sequences", threads, launches=launches)
    run_race(race, entrants, plan.slow)
    for one in team.values():
        one.forget_gradients()
    return race


def steps_by_batch(size: str, config: ModelConfig, plan: Plan, threads: int) -> list[Race]:
    """Our training step against the number of sequences."""
    ours = Ours(Transformer(config))
    races = []
    for batch in plan.batches:
        race = Race("training step", f"{size}, by batch", batch, "sequences", threads)
        races.append(step(ours, race, batch, plan))
    return races


def steps_by_width(size: str, config: ModelConfig, plan: Plan, threads: int) -> list[Race]:
    """Our training step against the hidden width, all other widths in proportion."""
    races = []
    for hidden in plan.widths:
        race = Race("training step", f"{size}, by width", hidden, "wide", threads)
        ours = Ours(Transformer(scaled(config, hidden)))
        races.append(step(ours, race, plan.train[0], plan))
    return races


def step(ours: Ours, race: Race, batch: int, plan: Plan) -> Race:
    """A race of ours alone."""
    torch.set_num_threads(race.threads)
    tokens = random_tokens(ours.model.config, batch, plan.train[1] + 1)
    entrants = {OURS: Entrant(partial(ours.train, tokens))}
    return run_race(race, entrants, plan.slow)
