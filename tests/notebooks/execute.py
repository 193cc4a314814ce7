"""Re-execute notebooks in place, ready to commit: ``make notebooks``, or name some:

    python -m tests.notebooks.execute notebooks/03_mla.ipynb

Outputs and execution counts are kept; times of execution, widget state, the interpreter's version
and paths of this machine are not. A notebook is written beside its file and renamed; if a cell
raises without the tag raises-exception, the file stays as it was and the command fails.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

from dsv3_mini.course.hand_out import run, write
from tests.environment import NOTEBOOKS, ROOT, for_kernels, notebook_paths
from tests.notebooks.fingerprint import KEY, fingerprint
from tests.notebooks.health import put_install_cell

PYTHON_NAMES = {"python", "python3", f"python3.{sys.version_info.minor}", sys.executable}
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
WIDGET = "application/vnd.jupyter.widget-view+json"


def execute(path: Path) -> int:
    """Run the notebook at ``path``, write it back, return its number of code cells.

    Raises CellExecutionError where a cell raised unexpectedly; the file is then unchanged.
    """
    notebook = nbformat.read(path, as_version=4)
    put_install_cell(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    run(notebook, path.parent)
    clean(notebook)
    notebook.metadata[KEY] = fingerprint(notebook)
    write(notebook, path)
    return sum(cell.cell_type == "code" for cell in notebook.cells)


def clean(notebook: nbformat.NotebookNode) -> None:
    """Remove what differs between two machines, or two runs, that both work.

    Live widgets go because their identifiers are random and their state means nothing without a
    kernel; the text and the pictures beside them stay.
    """
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            output.get("data", {}).pop(WIDGET, None)
            if output.output_type == "error":
                output.traceback = [relative_paths(line) for line in output.traceback]


def relative_paths(line: str) -> str:
    """A line of a traceback with paths as seen from the repository; nbval ignores tracebacks."""
    home = str(Path.home())
    for folder, name in ((str(ROOT), ""), (sys.prefix, ".venv/"), (sys.base_prefix, "python/")):
        for written in (folder, folder.replace(home, "~", 1)):
            line = line.replace(written.rstrip("/") + "/", name)
    return line.replace(home + "/", "~/") if len(home) > 1 else line


def check_kernel() -> None:
    """Refuse to start where 'python3' is the kernel of another environment."""
    command = KernelSpecManager().get_kernel_spec("python3").argv[0]
    if command not in PYTHON_NAMES:
        sys.exit(
            f"The kernel 'python3' runs {command}, expected {sys.executable}: start this with the "
            "Python of the environment in .venv"
        )


def execute_all(paths: list[Path]) -> list[str]:
    """Execute in turn, say how long each took, return the names of those that failed."""
    failed = []
    for path in paths:
        start = time.perf_counter()
        name = os.path.relpath(path)
        print(name, end=" ", flush=True)
        try:
            cells = execute(path.resolve())
            print(f"{cells} cells in {time.perf_counter() - start:.1f} s", flush=True)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            failed.append(name)
            print(f"FAILED, file unchanged\n{error}", flush=True)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description="Re-execute notebooks in place.")
    parser.add_argument("paths", nargs="*", type=Path, help="default: all in notebooks/")
    paths: list[Path] = parser.parse_args().paths or notebook_paths(recurse=True)
    if not paths:
        sys.exit(f"No notebook in {NOTEBOOKS}")
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        sys.exit(f"Not a file: {', '.join(missing)}")
    with for_kernels():
        check_kernel()
        failed = execute_all(paths)
    print(f"{len(paths) - len(failed)} of {len(paths)} notebooks executed")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
