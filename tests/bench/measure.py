"""All measurements of a plan, one after the other, in this process (but for peak memory)."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from tests.bench import layers, whole
from tests.bench.growth import curves
from tests.bench.implementations import active_parameters, load_all, write_model
from tests.bench.memory import Held, peaks
from tests.bench.plan import Plan
from tests.bench.results import Results, this_machine
from tests.bench.speculation import speculation
from tests.bench.timing import say

CACHE = "cache"


def measure(plan: Plan, threads: list[int]) -> Results:
    """Run everything. Raises AssertionError where implementations disagree."""
    results = Results(this_machine())
    before = torch.get_num_threads()
    try:
        for size in plan.sizes:
            _one_size(results, size, plan, threads)
        size, config = next(iter(plan.sizes.items()))
        most = max(threads)
        results.races += whole.steps_by_batch(size, config, plan, most)
        results.races += whole.steps_by_width(size, config, plan, most)
        results.races += layers.moe_races(plan, threads)
        results.races += layers.mla_races(plan, threads)
        if plan.prompts:
            races, results.drafts = speculation(plan, threads)
            results.races += races
    finally:
        torch.set_num_threads(before)
    results.curves = curves(results.races, plan)
    return results


def _one_size(results: Results, size: str, plan: Plan, threads: list[int]) -> None:
    config = plan.sizes[size]
    results.active[size] = active_parameters(config)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / size
        say(f"{size}: writing a random model, and reading it with every implementation")
        write_model(config, folder)
        results.held += peaks(folder, size, plan, max(threads))
        team = load_all(folder)
    for count in threads:
        results.races += whole.prefill(team, size, config, plan, count)
    races, held = whole.decode(team, size, config, plan, threads)
    results.races += races
    results.held += [
        Held(CACHE, size, context, "tokens", "live tensors", nbytes)
        for context, nbytes in held.items()
    ]
    for one in team.values():
        one.open(1)
    for count in threads:  # last: it changes the weights
        results.races.append(whole.training(team, size, config, plan, count))
