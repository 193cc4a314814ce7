"""Every exercise and both of its notebooks, as a learner and as a school's nbgrader meet them."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from dsv3_mini.course import checking
from dsv3_mini.course.checking import Exercise, Verdict, judge, lines_of_code, outcome
from dsv3_mini.course.exercises import exercise, exercises, notebooks
from dsv3_mini.course.hand_out import HIDDEN, SOLUTION, STUB, hand_out, student, without
from dsv3_mini.viz.exercises import DRAW, bars, maps
from dsv3_mini.viz.style import png
from tests.environment import EXERCISES, ROOT, SOLUTIONS, for_kernels, notebook_paths
from tests.notebooks import health

EVERY = [each.identifier for notebook in notebooks() for each in exercises(notebook)]
SOURCES = notebook_paths(SOLUTIONS)
FRESH = range(1000, 1010)  # cases that no learner is shown
every_exercise = pytest.mark.parametrize("identifier", EVERY)
every_source = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@cache
def source_of(identifier: str) -> tuple[Path, str, str]:
    """The notebook with the solution of an exercise, its cell's source, and the function's name."""
    path = next(p for p in SOURCES if p.stem.startswith(identifier.partition(".")[0] + "_"))
    source = ""
    for cell in code_cells(health.read(path)):
        source = cell.source if SOLUTION[0] in cell.source else source
        if found := re.search(rf'check\("{re.escape(identifier)}", (\w+)\)', cell.source):
            return path, source, found.group(1)
    raise AssertionError(f'{path.name} has no cell with check("{identifier}", ...)')


def function(identifier: str, notebook: nbformat.NotebookNode) -> Callable[..., Any]:
    """What the cells of a notebook define for an exercise; its pictures and checks do not run."""
    names: dict[str, Any] = {}
    for cell in code_cells(notebook):
        if health.INSTALL in health.tags(cell):
            continue
        if not re.search(r"^show_result\(|check\(\"", cell.source, re.MULTILINE):
            exec(cell.source, names)
    made: Callable[..., Any] = names[source_of(identifier)[2]]
    return made


# ------------------------------------------------------------------------------- what a check says


@every_exercise
def test_the_solution_solves_it(identifier: str) -> None:
    asked, (path, source, _) = exercise(identifier), source_of(identifier)
    solution = function(identifier, health.read(path))
    assert judge(asked, solution) == Verdict("solved")
    assert judge(asked, solution, FRESH) == Verdict("solved")
    used = lines_of_code(source)
    assert used <= asked.lines, f"{used} lines, and the budget is {asked.lines}"


@every_exercise
def test_the_oracle_solves_it_and_is_not_the_solution(identifier: str) -> None:
    asked = exercise(identifier)
    assert judge(asked, asked.oracle).state == "solved"
    oracle, solution = (
        re.sub(r"(id|arg)='\w+'", "", ast.dump(ast.parse(textwrap.dedent(text)).body[0]))
        for text in (inspect.getsource(asked.oracle), source_of(identifier)[1])
    )
    body = "body=["
    assert oracle[oracle.index(body) :] != solution[solution.index(body) :]


@every_exercise
def test_the_stub_is_open(identifier: str) -> None:
    handed_out = student(health.read(source_of(identifier)[0]))
    assert judge(exercise(identifier), function(identifier, handed_out)).state == "open"


@every_exercise
@pytest.mark.parametrize(("seeds", "tolerance"), [(range(20), 1), (range(20), 10), (FRESH, 1)])
def test_each_wrong_answer_gets_its_own_message(
    identifier: str, seeds: range, tolerance: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where numbers may be ten times as far off: no two answers are close by chance."""
    if (seeds, tolerance) != (range(20), 1):  # there, each is asked again and again
        once = cache(lambda answer, seed: outcome(asked, answer, seed))
        monkeypatch.setattr(checking, "outcome", lambda _, answer, seed: once(answer, seed))
    asked = exercise(identifier)
    asked = replace(asked, tolerance=tolerance * asked.tolerance)
    assert len({wrong.message for wrong in asked.wrong}) == len(asked.wrong) >= 3
    for wrong in asked.wrong:
        expected = Verdict("not yet", f"This looks like: {wrong.message}")
        assert judge(asked, wrong.answer, seeds) == expected


# ----------------------------------------------------------------------------------- the notebooks


def test_every_notebook_with_exercises_has_a_source_and_the_other_way_round() -> None:
    stems = {path.stem for path in notebook_paths()}
    assert {path.stem.partition("_")[0] for path in SOURCES} == set(notebooks())
    assert {path.stem for path in SOURCES} <= stems, "not named as a notebook in notebooks/"
    assert [p.name for p in notebook_paths(EXERCISES)] == [p.name for p in SOURCES]


@every_source
def test_cards_and_cells_of_a_source(source: Path) -> None:
    """For each exercise, in order: its card, stub, picture and check, marked for nbgrader."""
    asked, solutions = exercises(source.stem.partition("_")[0]), health.read(source)
    assert 3 <= len(asked) <= 5
    numbers = [f"{source.stem.partition('_')[0]}.{n}" for n in range(1, len(asked) + 1)]
    assert [each.identifier for each in asked] == numbers
    assert f"about {sum(each.minutes for each in asked)} minutes" in solutions.cells[0].source
    cells = iter(solutions.cells)
    for each in asked:
        check_cells(each, source_of(each.identifier)[2], cells)


def check_cells(asked: Exercise, name: str, cells: Any) -> None:
    tail = asked.identifier.replace(".", "-")
    card = next((c for c in cells if c.source.startswith(f"## {asked.identifier} ")), None)
    assert card, f"no cell begins with\n{asked.card()}"
    assert card.source.startswith(asked.card() + "\n"), f"expected the card\n{asked.card()}"
    assert "<summary>Hint 1</summary>\n\n" in card.source
    stub, picture, check = next(cells), next(cells), next(cells)
    base = {"locked": False, "schema_version": 3, "task": False}
    id_ = f"exercise-{tail}"
    assert stub.metadata.nbgrader == base | {"grade": False, "solution": True, "grade_id": id_}
    assert re.search(rf"^def {name}\(.*\n( .*\n)*?    {SOLUTION[0]}\n", stub.source, re.M)
    assert picture.source == f'show_result("{asked.identifier}", {name})'
    lines = f'solved = check("{asked.identifier}", {name})', HIDDEN[0], "assert solved", HIDDEN[1]
    assert check.source.splitlines() == list(lines)
    graded = {"grade": True, "solution": False, "locked": True, "grade_id": f"check-{tail}"}
    assert check.metadata.nbgrader == base | graded | {"points": asked.difficulty}


@pytest.mark.parametrize(
    "path", SOURCES + notebook_paths(EXERCISES), ids=lambda p: "/".join(p.parts[-2:])
)
def test_both_notebooks_keep_the_rules(path: Path) -> None:
    rules = set(health.RULES)
    if path.parent == EXERCISES:
        rules.remove(health.is_made_by_this_package)  # made anew and compared below
    wrong = [message for rule in rules for message in rule(health.read(path))]
    assert not wrong, f"{path.name}:\n  " + "\n  ".join(wrong)


def texts(cell: nbformat.NotebookNode) -> list[str]:
    """The outputs of a cell without pixels, which differ where another font is installed."""
    return [o.get("text") or sorted(o.get("data", {})) for o in cell.outputs]


@every_source
def test_run_all_on_the_handed_out_notebook(source: Path, tmp_path: Path) -> None:
    """To its end, every check open; and the committed notebook is what the command writes."""
    with for_kernels():
        hand_out(source, tmp_path / source.name)
    made, committed = health.read(tmp_path / source.name), health.read(EXERCISES / source.name)
    raised = [o for cell in code_cells(made) for o in cell.outputs if o.output_type == "error"]
    assert not raised
    said = [texts(c)[0] for c in code_cells(made) if "= check(" in c.source]
    identifiers = [each.identifier for each in exercises(source.stem.partition("_")[0])]
    assert [" ".join(line.split()[:2]) for line in said] == [f"{i} open." for i in identifiers]
    how = "run make exercises"
    assert [(c.id, c.source) for c in made.cells] == [(c.id, c.source) for c in committed.cells], (
        how
    )
    assert [*map(texts, code_cells(made))] == [*map(texts, code_cells(committed))], how


# ----------------------------------------------------------------- writing the student's notebook


def test_a_solution_becomes_a_stub_and_folded_text() -> None:
    begin, end = SOLUTION
    solutions = new_notebook(cells=[
        new_code_cell(f"def f(x):\n    {begin}\n    return 2 * x\n    {end}\n\n\ny = 3", id="a"),
        new_code_cell("\n".join(['check("00.1", f)', HIDDEN[0], "assert x", HIDDEN[1]]), id="b"),
    ])  # fmt: skip
    stub, check, folded = student(solutions).cells
    body = textwrap.indent(STUB, "    ")
    assert stub.source == f"def f(x):\n{body}\n\n\ny = 3"
    assert check.source == 'check("00.1", f)'
    assert folded.cell_type == "markdown"
    assert (
        "\n\n```python\ndef f(x):\n    return 2 * x\n\n\ny = 3\n```\n\n</details>" in folded.source
    )
    assert begin in solutions.cells[0].source, "the source was changed"


@pytest.mark.parametrize("lines", [(0,), (1,), (0, 0, 1), (0, 1, 1)])
def test_a_marker_without_its_partner_is_refused(lines: tuple[int, ...]) -> None:
    source = "\n".join(SOLUTION[each] for each in lines)
    with pytest.raises(ValueError, match=r"SOLUTION' (without its partner|is never closed)"):
        without(source, SOLUTION, STUB)


def test_the_course_brings_no_picture_along() -> None:
    program = (
        "import sys\nfrom dsv3_mini.course import exercises, hand_out\n"
        "[exercises.exercises(notebook) for notebook in exercises.notebooks()]\n"
        "sys.exit(', '.join({'matplotlib', 'ipywidgets', 'IPython'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.PIPE)
    assert result.returncode == 0, result.stderr.decode()


def test_kinds_of_drawings() -> None:
    figures = [bars({"a": 3, "b": 0.25}, "height (m)"), maps({"one": [[1, 2]]}, "r", "c", "u", "r")]
    assert all(png(figure) for figure in figures)
    assert [text.get_text() for text in figures[0].axes[0].texts] == ["3", "0.25"]
    every = [exercise(each) for each in EVERY]
    assert {each.picture(each.oracle).kind for each in every} <= set(DRAW)


def test_every_published_mistake_has_a_message_of_its_own() -> None:
    """26 of them are numbered; most are named by several wrong answers."""
    wrong = [each for identifier in EVERY for each in exercise(identifier).wrong]
    assert {each.mistake for each in wrong} - {None} == set(range(1, 27))


def test_every_notebook_from_01_to_11_has_three_to_five() -> None:
    assert list(notebooks()) == [f"{number:02d}" for number in range(1, 12)]
    assert all(3 <= len(exercises(notebook)) <= 5 for notebook in notebooks())
