"""The comparison itself: right notebooks pass, wrong ones fail, and writing them is safe.

Each test works on a small repository in a temporary folder whose name has a space, with this
repository's own settings in it, and runs the commands that people run.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from tests.environment import ROOT
from tests.notebooks import health

SOURCES = [
    "import sys\nimport warnings\n\nprint('two', 2)",
    "hidden = [1, 2, 3]\nhidden;",
    "object()",
    "warnings.warn('look out', stacklevel=1)",
    f"assert sys.prefix == {sys.prefix!r}\n[set('abc'), 1 / 3]",
    "import matplotlib.pyplot as plt\n\nplt.plot([1, 2])\nplt.show()",
    "import ipywidgets\n\nipywidgets.IntSlider(value=3)",
    "raise ValueError('on purpose')",
]


def make_notebook(path: Path) -> None:
    cells = [new_markdown_cell("# A title"), *[new_code_cell(source) for source in SOURCES]]
    cells[-1].metadata["tags"] = ["raises-exception"]
    nbformat.write(new_notebook(cells=cells), path)


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"MPLBACKEND": "Agg", "PYTHONDONTWRITEBYTECODE": "1"},
    )


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with one notebook, executed by ``python -m tests.notebooks.execute``."""
    folder = tmp_path_factory.mktemp("with a space")
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "notebooks").mkdir()
    make_notebook(folder / "notebooks/00_right.ipynb")
    result = run(folder, "tests.notebooks.execute")
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_executed_notebook_is_ready_to_commit(executed: Path) -> None:
    notebook = health.read(executed / "notebooks/00_right.ipynb")
    wrong = [
        message
        for rule in health.RULES
        if rule is not health.is_free_of_machine_paths  # the cell on sys.prefix names one
        for message in rule(notebook)
    ]
    assert not wrong
    assert str(executed) not in nbformat.writes(notebook)
    assert not notebook.cells[3].outputs, "a trailing ; did not hide the value"
    assert "image/png" in notebook.cells[7].outputs[0].data
    assert list(notebook.cells[8].outputs[0].data) == ["text/plain"]
    assert [p.name for p in (executed / "notebooks").iterdir()] == ["00_right.ipynb"]


def test_executing_twice_gives_the_same_bytes(executed: Path) -> None:
    path = executed / "notebooks/00_right.ipynb"
    before = path.read_bytes()
    assert run(executed, "tests.notebooks.execute", str(path)).returncode == 0
    noise = re.compile(rb"0x[0-9a-f]+|ipykernel_\d+/\d+")
    assert noise.sub(b"", path.read_bytes()) == noise.sub(b"", before)


def test_a_cell_that_raises_leaves_the_file_alone(executed: Path) -> None:
    path = executed / "raises.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("print(1)"), new_code_cell("1 / 0")]), path)
    before = path.read_bytes()
    result = run(executed, "tests.notebooks.execute", str(path))
    assert result.returncode == 1
    assert "ZeroDivisionError" in result.stdout
    assert path.read_bytes() == before
    assert not list(executed.glob(".*writing"))


def changed_number(notebook: nbformat.NotebookNode) -> None:
    notebook.cells[2].outputs[0].text = "two 3\n"


def wrong_assertion(notebook: nbformat.NotebookNode) -> None:
    notebook.cells[3].source += "\nassert sum(hidden) == 7"


def other_error(notebook: nbformat.NotebookNode) -> None:
    notebook.cells[9].source = "raise ValueError('by accident')"


def missing_output(notebook: nbformat.NotebookNode) -> None:
    notebook.cells[6].outputs = []


def nothing(notebook: nbformat.NotebookNode) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "failed_cell"),
    [
        (nothing, None),
        (changed_number, 1),
        (wrong_assertion, 2),
        (missing_output, 5),
        (other_error, 8),
    ],
)
def test_nbval_sees_the_change(
    executed: Path,
    tmp_path: Path,
    change: Callable[[nbformat.NotebookNode], None],
    failed_cell: int | None,
) -> None:
    notebook = health.read(executed / "notebooks/00_right.ipynb")
    change(notebook)
    path = executed / f"{change.__name__}.ipynb"
    nbformat.write(notebook, path)
    result = run(executed, "pytest", "--nbval", "--color=no", path.name)
    failed = re.findall(r"^FAILED \S+::Cell (\d+)", result.stdout, re.MULTILINE)
    assert failed == ([] if failed_cell is None else [str(failed_cell)]), result.stdout
    assert result.returncode == (failed_cell is not None), result.stdout
