"""The environment that tests and notebook kernels run in, so that numbers repeat.

Used by the test runner, by the conftest.py of this repository and by the notebook executor, so
that a notebook meets the same settings whether it is being written or compared.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
SOLUTIONS = NOTEBOOKS / "solutions"
EXERCISES = NOTEBOOKS / "exercises"  # written from solutions; test_exercises.py runs them

FIXED = {
    "OMP_NUM_THREADS": "1",  # two processes with two threads each get in each other's way
    "PYTHONHASHSEED": "0",  # the order of sets is then the same in every kernel
    "PYTHONUTF8": "1",
    "HF_HUB_OFFLINE": "1",  # no test may reach for the network
    "TOKENIZERS_PARALLELISM": "false",
}


def prepare() -> None:
    """Set what this process and its children run under. Call before torch is imported."""
    os.environ.update(FIXED)


@contextmanager
def for_kernels() -> Iterator[None]:
    """As ``prepare``, and also shut out the settings of whoever runs the notebooks.

    Their IPython start-up files and history stay untouched (IPYTHONDIR is an empty folder), figures
    go to the notebook (MPLBACKEND unset), and matplotlib's font cache is built now: built inside
    a cell, it may print a warning that no committed output has.
    """
    prepare()
    os.environ.pop("MPLBACKEND", None)
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
    import matplotlib.font_manager  # noqa: F401

    with tempfile.TemporaryDirectory(prefix="ipython-") as scratch:
        os.environ["IPYTHONDIR"] = scratch
        yield


def notebook_paths(folder: Path = NOTEBOOKS, *, recurse: bool = False) -> list[Path]:
    """The notebooks in ``folder`` in order; with ``recurse`` also those of exercises and so on."""
    found = folder.rglob("*.ipynb") if recurse else folder.glob("*.ipynb")
    inside = [(path, path.relative_to(folder).parts) for path in found]
    return sorted(path for path, parts in inside if not any(p.startswith(".") for p in parts))
