"""The command ``python -m tests.faults``: kill training runs, or damage checkpoints, many times."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.kills import kill_and_resume

SHOWN = 5


def main() -> int:
    """Exit status 0 where nothing was lost and every input was loaded or refused by name."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults",
        description="Kill training (7 s each), damage files (25 s for 1,000), at random.",
    )
    parser.add_argument("--kills", type=int, default=0, help="how often to kill, then resume")
    parser.add_argument(
        "--fuzz", type=int, default=0, help="how many configs, and how many weights"
    )
    parser.add_argument("--seed", type=int, default=0, help="of moments and damages (default 0)")
    args = parser.parse_args()
    if min(args.kills, args.fuzz) < 0 or not args.kills + args.fuzz:
        parser.error("expected --kills or --fuzz or both, of at least 1")
    began, failures = time.monotonic(), []
    for run, count in ((kill, args.kills), (fuzz, args.fuzz)):
        with tempfile.TemporaryDirectory() as folder:
            failures += run(Path(folder), count, args.seed) if count else []
    print(*failures[:SHOWN], sep="\n")
    print(f"{len(failures)} failures, {time.monotonic() - began:.0f} s")
    return 1 if failures else 0


def kill(folder: Path, kills: int, seed: int) -> list[str]:
    """``kills.kill_and_resume``, with a line for what it counted."""
    report = kill_and_resume(folder, kills, seed)
    moments = ", ".join(f"{count} {moment}" for moment, count in sorted(report.moments.items()))
    print(f"{report.tried} kills ({moments}); {report.half} left a save half written")
    print(f"{report.resumed} went on from the newest complete save, {report.lost} lost; "
          f"{report.finished} finished runs compared with an uninterrupted one")  # fmt: skip
    return report.failures


def fuzz(folder: Path, cases: int, seed: int) -> list[str]:
    """``fuzz.fuzz`` of configs and of weights, with a line for what each counted."""
    from tests.faults import fuzz as fuzzing  # needs signals that Windows has not

    failures = []
    for what in ("config", "weights"):
        count = fuzzing.fuzz(folder / what, what, range(cases), seed)
        first = {end: count.outcomes[f"{what} {end}"] for end in ("loaded", "refused")}
        models = count.outcomes["load_pretrained loaded"]
        print(f"{what}: {cases:,} inputs, {first['refused']:,} refused at once, {models:,} still "
              f"load as a model, {len(count.failures)} failures; slowest {count.slowest:.2f} s, "
              f"peak memory grew by {count.megabytes:.0f} MB")  # fmt: skip
        failures += count.failures
    return failures


if __name__ == "__main__":
    sys.exit(main())
