"""Many independent runs on all cores, one thread each.

Why: a comparison over seeds is made of runs that do not know of each other. Each takes a second or
two; in turn they would take a notebook's whole minute twice over. Results do not depend on how many
processes there are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

import torch

Job = TypeVar("Job")
Outcome = TypeVar("Outcome")


def run_all(
    run: Callable[[Job, int, int], Outcome], jobs: Mapping[str, Job], seeds: int, steps: int,
    workers: int | None = None,
) -> dict[str, list[Outcome]]:  # fmt: skip
    """``run(job, seed, steps)`` for every job and every seed 0 .. seeds - 1, by the job's name.

    ``run`` must be importable from a module: each process starts afresh. Default: all cores.
    """
    workers = workers or min(os.cpu_count() or 1, len(jobs) * seeds)
    context = get_context("spawn")  # a fork of a notebook's threads may hang
    with ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool:
        futures = {
            name: [pool.submit(run, job, seed, steps) for seed in range(seeds)]
            for name, job in jobs.items()
        }
        return {name: [future.result() for future in each] for name, each in futures.items()}
