"""Settings that ``pytest --nbval notebooks/`` needs; the unit tests' own are in tests/."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import environment

environment.prepare()

import nbval.kernel  # noqa: E402
import nbval.plugin  # noqa: E402


def execute_with_history(
    kernel: nbval.kernel.RunningKernel, source: str, allow_stdin: bool | None = None
) -> str:
    """Execute a cell as Jupyter does.

    nbval leaves out the history. IPython then looks for a trailing ``;`` in the wrong cell and
    shows a value that the notebook hides, and execution counts stand still.
    """
    return kernel.kc.execute(
        source, store_history=True, allow_stdin=allow_stdin, stop_on_error=False
    )


nbval.kernel.RunningKernel.execute_cell_input = execute_with_history


def pytest_configure(config: pytest.Config) -> None:
    """Give nbval the sanitiser of this repository, whatever folder pytest was started in."""
    if config.option.nbval_sanitize_with is None:
        here = Path(__file__).parent
        config.option.nbval_sanitize_with = str(here / "tests/notebooks/sanitize.cfg")


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Iterator[None]:
    """Shut the user's own settings out of the kernels, for as long as notebooks run."""
    cells = [item for item in session.items if isinstance(item, nbval.plugin.IPyNbCell)]
    for cell in cells:
        cell.output_timeout = 30  # nbval's 5 s are too short for a busy machine
    if not cells:
        return (yield)
    with environment.for_kernels():
        return (yield)
