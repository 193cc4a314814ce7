"""Measure and write: ``python -m tests.bench``, about 25 minutes; ``--quick``, a minute.

The whole of it holds up to 12 GB: three sets of weights with their optimizers train side by side.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from tests.environment import ROOT, prepare

prepare()  # before torch is imported; threads are set by each measurement

from dsv3_mini.viz.style import png  # noqa: E402
from tests.bench import report  # noqa: E402
from tests.bench.figure import draw  # noqa: E402
from tests.bench.measure import measure  # noqa: E402
from tests.bench.notebooks import run_notebooks  # noqa: E402
from tests.bench.plan import FULL, QUICK  # noqa: E402
from tests.bench.results import Results  # noqa: E402
from tests.bench.timing import say  # noqa: E402


def write(results: Results, out: Path) -> None:
    """bench.json, bench.md and bench.png, each beside its target and then renamed."""
    out.mkdir(parents=True, exist_ok=True)
    contents = {
        "bench.json": results.json().encode(),
        "bench.md": report.markdown(results).encode(),
        "bench.png": png(draw(results), dpi=110),
    }
    for name, content in contents.items():
        beside = out / f".{name}.writing"
        beside.write_bytes(content)
        os.replace(beside, out / name)


def main() -> int:
    """Parse, measure, write, publish."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="mini only, fewer points and rounds")
    parser.add_argument("--threads", type=int, nargs="+", help="default: 1 2; with --quick: 1")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "build/bench", help="default: build/bench"
    )
    parser.add_argument("--notebooks", action="store_true", help="also time the notebooks")
    parser.add_argument("--publish", action="store_true", help="also write README.md and figures/")
    words = parser.parse_args()
    threads = words.threads or ([1] if words.quick else [1, 2])
    if min(threads) < 1:
        parser.error(f"--threads {min(threads)}; expected 1 or more")
    if words.publish:
        report.put_between_markers((ROOT / "README.md").read_text(encoding="utf-8"), "")
    results = measure(QUICK if words.quick else FULL, threads)
    if words.notebooks:
        results.notebooks = run_notebooks()
    write(results, words.out)
    say(f"wrote {words.out}/bench.json, bench.md and bench.png")
    if words.publish:
        report.publish(results, words.out, ROOT)
        say("published to README.md and figures/")
    print(report.summary(results))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except report.MarkerError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped; nothing was written")
