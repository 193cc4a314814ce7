"""Five hundred damaged configs and as many damaged weights; 10,000 by python -m tests.faults."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("resource")  # Windows has none, and no time limit by signals

from dsv3_mini.checkpoint import load_pretrained
from dsv3_mini.config import ConfigError
from dsv3_mini.inspect_command import inspect
from dsv3_mini.shards import INDEX, CheckpointError
from tests.faults import fuzz


@pytest.mark.parametrize("what", ["config", "weights"])
def test_a_damaged_checkpoint_loads_or_is_refused_by_name(tmp_path: Path, what: str) -> None:
    count = fuzz.fuzz(tmp_path, what, range(500))
    assert count.failures == []
    first = count.outcomes[f"{what} loaded"], count.outcomes[f"{what} refused"]
    assert sum(first) == 500
    assert min(first) >= 20, "mutations that are all alike show little"
    assert count.outcomes["load_pretrained loaded"] >= 10


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", {"num_hidden_layers": 10**9}),  # named one by one, they would take hours
        ("config.json", {"num_nextn_predict_layers": 10**9}),
        ("config.json", {"n_routed_experts": 4 * 10**9}),
        ("config.json", {"hidden_size": 2**62}),  # more bytes than 64 bits count
        ("config.json", {"vocab_size": 10**400}),  # no float
        ("config.json", {"x": "@deep@"}),
        (INDEX, {"weight_map": "@deep@"}),
        (INDEX, {"weight_map": {"lm_head.weight": "a" * 5000}}),  # no system has such a name
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
def test_what_once_took_hours_or_came_as_another_error(
    tmp_path: Path, file: str, change: dict[str, Any]
) -> None:
    bench = fuzz.Bench(tmp_path)
    path = bench.good[1] / file
    changed = json.dumps({**json.loads(path.read_bytes()), **change})
    path.write_text(changed.replace('"@deep@"', fuzz.DEEP))
    for load in (load_pretrained, partial(load_pretrained, mtp=False), inspect):
        with fuzz.at_most(fuzz.SECONDS), pytest.raises((ConfigError, CheckpointError)):
            load(bench.good[1])


def endless() -> None:
    while True:
        pass


def hungry() -> None:
    assert bytearray(2 * fuzz.MEGABYTES * 2**20).count(0)


def wrong() -> None:
    raise KeyError("weight_map")


@pytest.mark.parametrize(
    ("fault", "report"),
    [(endless, "processor time"), (hungry, "the peak grew"), (wrong, "KeyError: 'weight_map'")],
)
def test_what_should_not_happen_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[], None], report: str
) -> None:
    calls: list[Path] = []

    def attempts(bench: fuzz.Bench, what: str) -> dict[str, Callable[[], object]]:
        calls.append(bench.place)
        return {"fault": fault} if len(calls) > 2 else {}  # two good folders come first

    monkeypatch.setattr(fuzz.Bench, "attempts", attempts)
    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    [failure] = fuzz.fuzz(tmp_path, "config", range(1)).failures
    assert "config 0 (config.json, fault)" in failure
    assert report in failure
