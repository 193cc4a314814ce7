"""Training runs that are killed -9 at random moments, resumed, and compared with one that was not.

The moments are of three kinds: soon after the start (while it imports, loads text or a save, cleans
up), while a save is half written, and at any time between saves. Polling sees a save of a few
milliseconds begin, and a random wait then spreads the kills over it.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.environment import FIXED, ROOT

STEPS = 300
COMMAND = [
    *(sys.executable, "-m", "dsv3_mini.train", "--preset", "tiny", "--steps", str(STEPS)),
    *("--save-every", "2", "--batch-size", "4", "--seq-len", "16", "--characters", "4000"),
]
MOMENTS = ("at the start", "in a save", "between saves")
FILES = ("model.safetensors", "optimizer.safetensors")


@dataclass
class Report:
    """What was tried and what became of it: in the end each kill is ``resumed`` or ``lost``.

    ``waiting`` are those after which no process has yet come to its first step.
    """

    tried: int = 0
    half: int = 0
    waiting: int = 0
    resumed: int = 0
    lost: int = 0
    finished: int = 0
    moments: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


def kill_and_resume(folder: Path, kills: int, seed: int = 0) -> Report:
    """Kill so many times, over as many runs as it takes; each is then left to finish."""
    chance, report = random.Random(seed), Report()
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    process = _start(folder / "whole")
    while not (folder / "whole").exists():
        assert process.poll() is None
        time.sleep(0.001)
    startup = 1.5 * (time.monotonic() - began)
    assert process.wait() == 0
    while report.tried < kills:
        run, newest = folder / f"run {report.finished}", 0
        process = _start(run)
        while report.tried < kills:
            moment = chance.choice(MOMENTS)
            _wait(process, run, moment, chance, startup)
            if process.poll() is not None:
                break
            process.send_signal(signal.SIGKILL)
            process.wait()
            report.tried += 1
            report.moments[moment] += 1
            report.half += moment != MOMENTS[0] and any(run.glob(".*step-*"))
            newest = _check(run, newest, f"before kill {report.tried}, {moment}", report)
            report.waiting += 1
            process = _start(run)
        if process.wait():
            report.failures.append(f"{run.name} did not finish: {_said(run)[-500:]}")
        _check(run, newest, f"at the end of {run.name}", report)
        report.failures += _differences(folder / "whole", run)
        report.finished += 1
    return report


def _start(run: Path) -> subprocess.Popen[bytes]:
    with run.with_suffix(".said").open("wb") as said:
        return subprocess.Popen(
            [*COMMAND, "--out", str(run)], cwd=ROOT, env={**os.environ, **FIXED},
            stdout=subprocess.DEVNULL, stderr=said,
        )  # fmt: skip


def _said(run: Path) -> str:
    return run.with_suffix(".said").read_text(encoding="utf-8", errors="replace")


def _newest(run: Path) -> int:
    return max((int(path.name[5:]) for path in run.glob("step-*")), default=0)


def _wait(
    process: subprocess.Popen[bytes], run: Path, moment: str, chance: random.Random, startup: float
) -> None:
    """Until the moment to kill has come, or the process has ended."""
    if moment == "at the start":
        time.sleep(chance.uniform(0, startup))
        return
    first = _newest(run) + 2 * chance.randrange(1, 6)
    while process.poll() is None and _newest(run) < first:
        time.sleep(0.001)
    if moment == "between saves":
        time.sleep(chance.uniform(0, 0.1))
        return
    while process.poll() is None and not any(run.glob(".step-*.writing")):
        pass
    time.sleep(chance.uniform(0, 0.02))


def _check(run: Path, newest: int, when: str, report: Report) -> int:
    """Compare where the process began with the newest save before it; gives the newest one now."""
    bars = re.findall(rf"(\d+)/{STEPS} ", _said(run))
    if bars:
        if int(bars[0]) == newest:
            report.resumed += report.waiting
        else:
            report.lost += report.waiting
            report.failures.append(f"{when}: began at {bars[0]}, the newest save was {newest}")
        report.waiting = 0
    if "rror" in _said(run):
        report.failures.append(f"{when}: {_said(run)[-500:]}")
    if _newest(run) < newest:
        report.failures.append(f"{when}: the save of step {newest} is gone")
    return _newest(run)


def _differences(whole: Path, run: Path) -> list[str]:
    wrong = []
    names = sorted(path.name for path in run.iterdir())
    if names != ["log.jsonl", f"step-{STEPS:06d}"]:
        return [f"{run.name} holds {names}"]
    for file in FILES:
        ours, theirs = (load_file(each / names[1] / file) for each in (run, whole))
        same = ours.keys() == theirs.keys()
        if not same or not all(torch.equal(ours[name], theirs[name]) for name in ours):
            wrong.append(f"{run.name}: {file} differs from the uninterrupted run's")
    records, expected = _log(run), _log(whole)
    if [r["step"] for r in records] != list(range(1, STEPS + 1)) or records != expected:
        wrong.append(f"{run.name}: its log differs from the uninterrupted run's")
    return wrong


def _log(run: Path) -> list[dict[str, Any]]:
    lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]
