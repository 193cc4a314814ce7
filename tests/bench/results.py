"""Everything measured, as one object: what ``bench.json`` holds, with all samples."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers

from tests.bench.growth import Curve
from tests.bench.memory import Held
from tests.bench.notebooks import NotebookTimes
from tests.bench.speculation import Drafts
from tests.bench.timing import Race


@dataclass(frozen=True)
class Machine:
    """Where and with what the times were taken."""

    cpu: str
    cores: int
    torch: str
    transformers: str
    python: str
    system: str
    date: str

    def line(self) -> str:
        """All of it in a sentence's part."""
        return (
            f"{self.cpu}, {self.cores} cores; torch {self.torch}, transformers "
            f"{self.transformers}, Python {self.python}; {self.date}"
        )


def this_machine() -> Machine:
    """The present one."""
    return Machine(
        cpu=cpu_model(),
        cores=len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1,
        torch=torch.__version__,
        transformers=transformers.__version__,
        python=platform.python_version(),
        system=platform.platform(),
        date=datetime.date.today().isoformat(),
    )


def cpu_model() -> str:
    """The name that the CPU gives itself, where Linux tells."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _lines(part: object) -> str:
    if not isinstance(part, list):
        return json.dumps(part)
    return "[\n" + ",\n".join(json.dumps(record) for record in part) + "\n]"


@dataclass
class Results:
    """Samples, and what was counted; tables and figures are made from this alone."""

    machine: Machine
    active: dict[str, dict[str, int]] = field(default_factory=dict)
    """By size: weights at work on a token, ours and the Llama's."""
    races: list[Race] = field(default_factory=list)
    held: list[Held] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    drafts: Drafts | None = None
    notebooks: NotebookTimes | None = None

    def json(self) -> str:
        """All of it, with every sample; a race is a line, so that two files can be compared."""
        parts = [f'"{name}": {_lines(part)}' for name, part in dataclasses.asdict(self).items()]
        return "{\n" + ",\n".join(parts) + "\n}\n"

    @property
    def most_threads(self) -> int:
        """The largest number of threads measured: that of summary and figure."""
        return max((race.threads for race in self.races), default=1)
