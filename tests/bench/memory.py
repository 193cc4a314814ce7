"""Peak memory, each figure in a process of its own: ``python -m tests.bench.memory FOLDER ...``.

Why a process: an allocator keeps what it has freed, so a second measurement would not see what the
first one had already taken. Reported is the peak of the resident set during the run, less what was
resident just before it, when weights and optimizer state existed and nothing else did: activations,
gradients, logits, the cache. Where Linux lets a process reset its own peak (/proc/self/clear_refs)
the peak is that of the run; elsewhere ru_maxrss is the peak since the start, which loading the
model may have set, and the result then says so.

What the system's allocator does with freed memory moves that peak by a tenth from one process to
the next: a training step's, ours and theirs, is the median of three. What torch itself had handed
out at most, ``LIVE``, is the same every time; only these two, since to count it takes memory, too.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import platform
import statistics
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from dsv3_mini.config import ModelConfig
from tests.allocations import held
from tests.bench.implementations import DEFAULT, EAGER, LLAMA, OURS, Implementation, Theirs, load
from tests.bench.plan import Plan
from tests.bench.timing import say
from tests.bench.whole import random_tokens
from tests.environment import ROOT

STATUS = Path("/proc/self/status")
TRAINING, PREFILL = "peak memory, training step", "peak memory, prefill"
LIVE = "live tensors, training step"


@dataclass(frozen=True)
class Held:
    """Bytes by implementation; the first is ours. ``how`` says how they were read."""

    what: str
    size: str
    at: int
    unit: str
    how: str
    nbytes: dict[str, int] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """What was held, at how much of what, and by which model."""
        return f"{self.what}, {self.at:,} {self.unit}, {self.size}"

    def ratio(self, name: str) -> float:
        """Bytes of ``name`` over the first's."""
        ours = next(iter(self.nbytes.values()))
        return self.nbytes[name] / max(ours, 1)  # a tiny model may need no further page


def peaks(folder: Path, size: str, plan: Plan, threads: int) -> list[Held]:
    """Peaks of a training step, both ways, and, in a full plan, of the longest prefill."""
    names = [OURS, DEFAULT, EAGER, LLAMA] if plan.all_peaks else [OURS, DEFAULT]
    wanted = {TRAINING: plan.train, LIVE: plan.train}
    if plan.all_peaks:
        wanted[PREFILL] = (1, max(plan.prefill))
    found = []
    for what, (batch, length) in wanted.items():
        answers = {
            name: [
                ask(folder, name, what, batch, length, threads)
                for _ in range(3 if what == TRAINING and name in names[:2] else 1)
            ]
            for name in (names[:2] if what == LIVE else names)
        }
        how = ", ".join(sorted({str(one["how"]) for ones in answers.values() for one in ones}))
        nbytes = {
            name: int(statistics.median(int(one["nbytes"]) for one in ones))
            for name, ones in answers.items()
        }
        at, unit = (length, "tokens") if what == PREFILL else (batch, "sequences")
        found.append(Held(what, size, at, unit, how, nbytes))
        say(f"{size}: {what}: " + ", ".join(f"{n} {b / 2**20:,.0f} MiB" for n, b in nbytes.items()))
    return found


def ask(
    folder: Path, name: str, what: str, batch: int, length: int, threads: int
) -> dict[str, str | int]:
    """Measure in a fresh process. Raises RuntimeError with what that process said."""
    words = [str(folder), name, what, str(batch), str(length), str(threads)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.memory", *words],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"peak memory of {name}, {what}, failed:\n{done.stderr[-2000:]}")
    answer: dict[str, str | int] = json.loads(done.stdout.splitlines()[-1])
    return answer


def measure(folder: Path, name: str, what: str, batch: int, length: int) -> dict[str, str | int]:
    """The peak in this process, which should have done nothing else."""
    one = load(folder, name)
    if name == EAGER:
        assert isinstance(one, Theirs)
        one.choose()
    own_all_weights(one)
    config = ModelConfig.from_hf(folder)
    tokens = random_tokens(config, batch, length + 1)
    with torch.set_grad_enabled(what != PREFILL):
        run = one.prefill if what == PREFILL else one.train
        run(tokens[:1, :9])  # makes the optimizer's state
        one.forget_gradients()
        one.open(1)
        give_back_freed()
        if what == LIVE:
            return {"how": "torch's own count", "nbytes": max(held(partial(run, tokens)))}
        resettable = reset_peak()
        before = status("VmRSS")
        run(tokens[:, :length] if what == PREFILL else tokens)
    how = "VmHWM, reset before the run" if resettable else "ru_maxrss since the start"
    return {"how": how, "nbytes": peak() - before}


def own_all_weights(one: Implementation) -> None:
    """Copy every weight: a page of a mapped file would count only once the run has touched it."""
    for parameter in one.model.parameters():
        parameter.data = parameter.data.clone()


def give_back_freed() -> None:
    """Return freed memory to the system, so that it counts again when the run takes it."""
    gc.collect()
    with suppress(OSError, AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def reset_peak() -> bool:
    """Whether the kernel let this process set its peak to what is resident now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return status("VmHWM") < 1.02 * status("VmRSS")


def peak() -> int:
    """Bytes of the largest resident set."""
    if STATUS.exists():
        return status("VmHWM")
    import resource  # not on Windows

    # Kilobytes, but bytes on a Mac.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if platform.system() == "Darwin" else 1024
    )


def status(name: str) -> int:
    """Bytes under ``name`` in /proc/self/status; without that file the peak, for want of better."""
    if not STATUS.exists():
        return peak()
    line = next(one for one in STATUS.read_text().splitlines() if one.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def main() -> None:
    """One figure as a line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.memory")
    parser.add_argument("folder", type=Path, help="a checkpoint in the official layout")
    parser.add_argument("name", help="one of the implementations")
    parser.add_argument("what", choices=[TRAINING, LIVE, PREFILL])
    for number in ("batch", "length", "threads"):
        parser.add_argument(number, type=int)
    words = parser.parse_args()
    torch.set_num_threads(words.threads)
    print(json.dumps(measure(words.folder, words.name, words.what, words.batch, words.length)))


if __name__ == "__main__":
    main()
