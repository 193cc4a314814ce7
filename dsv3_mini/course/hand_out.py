"""Write the student's notebooks: ``make exercises``, or ``python -m dsv3_mini.course.hand_out``.

Why: one source. ``notebooks/solutions/NN_name.ipynb`` holds cards, stubs, checks and solutions,
with nbgrader's markers and cell metadata. From it comes ``notebooks/exercises/NN_name.ipynb``:
- a solution between its markers becomes a ``raise NotImplementedError()``,
- hidden tests vanish, and after the check stands the solution, as text and folded,
- all cells are executed, so that pictures of the result can be seen and each check says open.
nbgrader makes the same stubs of the same source, without the folded solutions.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import textwrap
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

CELL_TIMEOUT = 120
SOLUTION = ("### BEGIN SOLUTION", "### END SOLUTION")
HIDDEN = ("### BEGIN HIDDEN TESTS", "### END HIDDEN TESTS")
STUB = "# YOUR CODE HERE\nraise NotImplementedError()"  # word for word nbgrader's
FOLDED = """<details>
<summary>Solution of {identifier}: to compare with yours, or when you are stuck</summary>

```python
{code}
```

</details>"""


def without(source: str, markers: tuple[str, str], replacement: str | None = None) -> str:
    """``source`` with each marked region replaced, indented as its first marker was.

    Without a replacement the markers go and the region stays. ValueError if one is never closed.
    """
    kept, inside, (begin, end) = [], False, markers
    for line in source.splitlines():
        if line.strip() == begin and not inside:
            inside = True
            if replacement:
                kept += textwrap.indent(replacement, line[: line.index("#")]).splitlines()
        elif line.strip() == end and inside:
            inside = False
        elif line.strip() in markers:
            raise ValueError(f"{line.strip()!r} without its partner in the cell:\n{source}")
        elif not inside or replacement is None:
            kept.append(line)
    if inside:
        raise ValueError(f"{begin!r} is never closed in the cell:\n{source}")
    return "\n".join(kept).rstrip()


def student(solutions: NotebookNode) -> NotebookNode:
    """The student's notebook, not executed, from the notebook with the solutions."""
    handed_out, code = copy.deepcopy(solutions), ""
    handed_out.cells = []
    for cell in copy.deepcopy(solutions.cells):
        handed_out.cells.append(cell)
        if cell.cell_type != "code":
            continue
        cell.outputs, cell.execution_count = [], None
        if SOLUTION[0] in cell.source:
            code = without(cell.source, SOLUTION)
            cell.source = without(cell.source, SOLUTION, STUB)
        if HIDDEN[0] in cell.source:
            cell.source = without(cell.source, HIDDEN, "")
            identifier = cell.source.partition('check("')[2].partition('"')[0]
            text = FOLDED.format(identifier=identifier, code=code)
            name = f"solution-{identifier.replace('.', '-')}"
            handed_out.cells.append(nbformat.v4.new_markdown_cell(text, id=name))
    return handed_out


def hand_out(source: Path, target: Path) -> None:
    """Write the executed student's notebook of ``source``; ``target`` appears whole or not at all.

    CellExecutionError if a cell raises, ValueError for a marker without its partner.
    """
    notebook = student(nbformat.read(source, as_version=4))
    metadata = copy.deepcopy(notebook.metadata)
    metadata.pop("dsv3_mini", None)  # the fingerprint of the solutions' cells
    run(notebook, target.parent)
    notebook.metadata = metadata  # without the interpreter's version
    write(notebook, target)


def run(notebook: NotebookNode, folder: Path) -> None:
    """Execute all cells in place, as if started in ``folder``. CellExecutionError if one raises."""
    NotebookClient(
        notebook, kernel_name="python3", timeout=CELL_TIMEOUT, record_timing=False,
        store_widget_state=False, coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"],  # else each kernel warns that it uses loopback TCP
        resources={"metadata": {"path": str(folder)}},
    ).execute()  # fmt: skip


def write(notebook: NotebookNode, path: Path) -> None:
    """Write beside ``path``, then rename, so that no half-written notebook can remain."""
    beside = path.with_name(f".{path.name}.writing")
    try:
        nbformat.validate(notebook)
        beside.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def main() -> None:
    """Hand out all notebooks with solutions, or those that are named."""
    parser = argparse.ArgumentParser(description="Write the student's notebooks.")
    parser.add_argument("sources", nargs="*", type=Path, help="default: notebooks/solutions/*")
    sources: list[Path] = parser.parse_args().sources or sorted(
        Path("notebooks/solutions").glob("*.ipynb")
    )
    if not sources:
        sys.exit("no notebook in notebooks/solutions: start this in the repository's folder")
    for source in sources:
        target = source.resolve().parent.parent / "exercises" / source.name
        target.parent.mkdir(exist_ok=True)
        try:
            hand_out(source, target)
        except (CellExecutionError, ValueError) as error:
            sys.exit(f"{source}: nothing written\n{error}")
        print(f"{source} -> notebooks/exercises/{source.name}")


if __name__ == "__main__":
    main()
