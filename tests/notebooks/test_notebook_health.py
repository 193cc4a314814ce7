"""Every notebook keeps the rules of health.py, and every rule sees what it is there for."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tests.environment import NOTEBOOKS, notebook_paths
from tests.notebooks import fingerprint, health


def test_the_folder_holds_notebooks() -> None:
    if NOTEBOOKS.is_dir():
        assert notebook_paths(), f"{NOTEBOOKS} exists but holds no notebook, so nothing is compared"


@pytest.mark.parametrize("path", notebook_paths(), ids=lambda path: path.stem)
def test_notebook_keeps_the_rules(path: Path) -> None:
    notebook = health.read(path)
    wrong = [message for rule in health.RULES for message in rule(notebook)]
    assert not wrong, f"{path.name}:\n  " + "\n  ".join(wrong)


IGNORED = "nbval-ignore-output"
KERNEL = {"name": "python3", "display_name": "Python 3"}


def shown(text: str) -> nbformat.NotebookNode:
    return new_output("stream", name="stdout", text=text)


def raised(traceback: str) -> nbformat.NotebookNode:
    return new_output("error", ename="ValueError", evalue="no", traceback=[traceback])


def cell(source: str, *outputs: nbformat.NotebookNode, tag: str = "") -> nbformat.NotebookNode:
    metadata = {"tags": [tag]} if tag else {}
    return new_code_cell(source, outputs=list(outputs), metadata=metadata)


def notebook(*cells: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A notebook with a title and ``cells``, executed in order by the package as it is."""
    title = new_markdown_cell("# A title")
    made = new_notebook(cells=[title, *cells], metadata={"kernelspec": KERNEL})
    health.put_install_cell(made)
    for count, (_, code) in enumerate(health.code_cells(made), start=1):
        code.execution_count = count
    made.metadata[fingerprint.KEY] = fingerprint.fingerprint(made)
    return made


def test_a_good_notebook_breaks_no_rule() -> None:
    good = notebook(
        cell("print(1)", shown("1\n")),
        cell("print(2)", shown("2\n")),
        new_markdown_cell("The work is at https://example.org/home/work/ and in notebooks/."),
        cell("time()", shown("0.3 s"), tag="nbval-ignore-output"),
        cell("assert fast"),
        cell("1 / 0", raised("Cell In[6], line 1"), tag="raises-exception"),
    )
    assert [message for rule in health.RULES for message in rule(good)] == []


def unexecuted() -> nbformat.NotebookNode:
    made = notebook(cell("print(1)", shown("1\n")), cell("x = 1"))
    made.cells[2].execution_count = None
    return made


def out_of_order() -> nbformat.NotebookNode:
    made = notebook(cell("x = 1"), cell("x = 2"))
    made.cells[1].execution_count = 7
    return made


def with_metadata(**metadata: object) -> nbformat.NotebookNode:
    made = notebook(cell("x = 1"))
    made.metadata.update(nbformat.from_dict(metadata))
    return made


def uncompared_full_width() -> nbformat.NotebookNode:
    made = notebook(new_markdown_cell("## At full width"), cell("time()", tag=health.FULL_WIDTH))
    made.cells[3].metadata["tags"].append(IGNORED)
    return made


def edited_later() -> nbformat.NotebookNode:
    made = notebook(cell("from dsv3_mini.rope import frequencies\nfrequencies(4)"))
    made.cells[2].source += "\nfrequencies(8)"
    return made


def of_another_repository() -> nbformat.NotebookNode:
    made = notebook(cell("x = 1"))
    made.cells[1].source = made.cells[1].source.replace("dsv3_mini.git", "elsewhere.git")
    return made


BAD = {
    "no install cell": (health.installs_the_package, new_notebook(cells=[new_markdown_cell("#")])),
    "another repository": (health.installs_the_package, of_another_repository()),
    "edited after it was executed": (health.is_made_by_this_package, edited_later()),
    "no cell at all": (health.opens_with_title, new_notebook()),
    "a title too small": (health.opens_with_title, new_notebook(cells=[new_markdown_cell("## A")])),
    "41 cells": (health.is_short, notebook(*[cell("x = 1") for _ in range(40)])),
    "16 lines": (health.is_short, notebook(cell("x = 1\n" * 16))),
    "a cell not executed": (health.is_executed_in_order, unexecuted()),
    "executed out of order": (health.is_executed_in_order, out_of_order()),
    "an unexpected error": (
        health.has_only_expected_errors,
        notebook(cell("f()", raised("in f"))),
    ),
    "an expected error that did not come": (
        health.has_only_expected_errors,
        notebook(cell("f()", tag="raises-exception")),
    ),
    "half compared": (
        health.is_mostly_compared,
        notebook(cell("1", shown("1")), cell("2", shown("2"), tag=IGNORED)),
    ),
    "ignored and not asserted": (
        health.asserts_what_is_not_compared,
        notebook(cell("t()", tag=IGNORED), cell("x = 1"), cell("y = 1"), cell("assert x")),
    ),
    "ignored, the assertion skipped": (
        health.asserts_what_is_not_compared,
        notebook(cell("t()", tag=IGNORED), cell("assert x", tag="nbval-skip")),
    ),
    "a full width that nothing runs": (
        health.runs_its_full_width,
        notebook(new_markdown_cell("Text.\n\n## At full width\n\nMore."), cell("layer(x)")),
    ),
    "a full width that is not compared": (health.runs_its_full_width, uncompared_full_width()),
    "a comment for nbval": (
        health.uses_tags_for_nbval,
        notebook(cell("# NBVAL_IGNORE_OUTPUT\nt()")),
    ),
    "a home folder": (
        health.is_free_of_machine_paths,
        notebook(cell("p", shown("/home/someone/notes.txt"))),
    ),
    "a coloured path": (
        health.is_free_of_machine_paths,
        notebook(cell("f()", raised("File \x1b[32m/root/a.py:1\x1b[39m"), tag="raises-exception")),
    ),
    "a path in the source": (health.is_free_of_machine_paths, notebook(cell("open('/Users/a/b')"))),
    "the repository's path": (
        health.is_free_of_machine_paths,
        notebook(cell("p", shown(f"{NOTEBOOKS}/x.png"))),
    ),
    "a build string": (
        health.is_free_of_build_strings,
        notebook(cell("torch.__version__", shown("2.13.0+cpu"))),
    ),
    "another kernel": (health.has_plain_metadata, with_metadata(kernelspec={"name": "mine"})),
    "widget state": (health.has_plain_metadata, with_metadata(widgets={"state": {}})),
}


@pytest.mark.parametrize("name", BAD)
def test_each_rule_sees_what_it_is_there_for(name: str) -> None:
    rule, bad = BAD[name]
    assert rule(bad)


def test_a_fingerprint_follows_what_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "dsv3_mini").mkdir()
    monkeypatch.setattr(fingerprint, "ROOT", tmp_path)

    def prints_of(**sources: str) -> list[str]:
        fingerprint._module.cache_clear()
        for name, source in sources.items():
            (tmp_path / "dsv3_mini" / f"{name}.py").write_text(source)
        both = ["from dsv3_mini.far import f", "import dsv3_mini.near as near"]
        return [fingerprint.fingerprint(new_notebook(cells=[cell(source)])) for source in both]

    first = prints_of(near="x = 1", far="from dsv3_mini.near import x\ndef f(): return x")
    reworded = prints_of(near='"""Why."""\nx = 1  # one')
    assert reworded == first
    assert [a != b for a, b in zip(prints_of(near="x = 2"), first, strict=True)] == [True, True]
    changed = prints_of(near="x = 1", far="from dsv3_mini.near import x\ndef f(): return -x")
    assert [a != b for a, b in zip(changed, first, strict=True)] == [True, False]
    fingerprint._module.cache_clear()


def test_every_rule_has_a_bad_example() -> None:
    assert {rule for rule, _ in BAD.values()} == set(health.RULES)


def test_paths_in_base64_pictures_are_not_read() -> None:
    picture = new_output("display_data", data={"image/png": "iVBO\n/home/A/root/+cpu"})
    assert health.is_free_of_machine_paths(notebook(cell("plot()", picture))) == []


def test_comparison_counts_pictures_apart() -> None:
    picture = new_output("display_data", data={"image/png": "iVBO"})
    made = notebook(
        cell("x = 1"),
        cell("plot()", picture),
        cell("print(x)", shown("1")),
        cell("clock()", shown("now"), tag=IGNORED),
    )
    assert health.comparison(made) == (3, 2, 1)
