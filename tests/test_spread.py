"""The job of four processes that notebook 11 begins; what it counts, notebook 11 compares."""

from __future__ import annotations

import pytest
import torch

from dsv3_mini.course import spread as job


def test_two_processes_hold_halves_and_train_as_one() -> None:
    result = job.spread(ranks=2)
    assert result.sent.keys() == set(job.LIMITS)
    whole = job.model(job.LIMITS[-1])
    experts = sum(p.nbytes for name, p in whole.named_parameters() if ".experts." in name)
    everything = sum(p.nbytes for p in whole.parameters())
    assert result.experts == [experts // 2] * 2
    assert sum(result.rest) == everything - experts
    assert len(result.losses) == job.SETTINGS.steps
    rows = (128 + 2 * 32) * 8  # a token, a gate and a mark for each expert there, in fp64
    for source in range(2):
        with torch.no_grad():
            routing = job.model(1).forward(job.tokens(source)).routing
        for target in range(2):
            sent = sum(
                int((layer.indices_BTK // 32 == target).any(dim=-1).sum()) for layer in routing
            )
            assert int(result.sent[1][:, source, target].sum()) == sent * rows


def test_a_job_that_takes_too_long_is_ended() -> None:
    with pytest.raises(RuntimeError, match="2 processes did not finish"):
        job.spread(ranks=2, timeout=2)


def test_a_job_that_fails_says_what_it_printed() -> None:
    with pytest.raises(RuntimeError, match="n_routed_experts 64 does not divide by 3 ranks"):
        job.spread(ranks=3)
