"""The teacher's guide agrees with the notebooks: minutes, order, links, claims, and every number.

An answer to an exam question says its numbers in bold and is followed by a block of Python. The
block is run here, and what it prints must be what is bold, line by line. Every other number of the
answer must stand in the question or in the block.
"""

from __future__ import annotations

import ast
import contextlib
import io
import re
from functools import cache
from pathlib import Path

import nbformat
import pytest

from dsv3_mini.course import exercises
from dsv3_mini.course.claims import CLAIMS, claim
from tests.environment import NOTEBOOKS, ROOT

GUIDE = ROOT / "docs" / "teaching.md"
PAGES = sorted((ROOT / "docs" / "teaching").glob("*.md"))
STEMS = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
LINK = re.compile(r"\]\(([^)\s]+)\)")
NUMBER = re.compile(r"(?<![\w.,])\d[\d,_]*(?:\.\d+)?")
REFERENCE = re.compile(r"\b(?:eqs?|[Ee]quations?|notebooks?|claims?|Tables?) [\d, to-]+")
QUESTION = re.compile(r"^### Question (\S+)\n(.*?)<details>(.*?)</details>", re.M | re.S)
CODE = re.compile(r"```python\n(.*?)```", re.S)
BOLD = re.compile(r"\*\*(.+?)\*\*", re.S)


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@cache
def notebook(stem: str) -> tuple[str, str, str]:
    """Its first cell, its Markdown, and all its text but outputs that change from run to run."""
    cells = nbformat.read(NOTEBOOKS / f"{stem}.ipynb", as_version=4).cells
    shown = [cell.source for cell in cells]
    fixed = [c for c in cells if "nbval-ignore-output" not in c.metadata.get("tags", [])]
    for output in [output for cell in fixed for output in cell.get("outputs", [])]:
        shown += [output.get("text", ""), output.get("data", {}).get("text/plain", "")]
    markdown = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    return cells[0].source, markdown, "\n".join(shown)


def promise(stem: str) -> str:
    """'About 15 minutes; ... Read 00 first.', from the first cell."""
    return next(line for line in notebook(stem)[0].splitlines() if line.startswith("About "))


def minutes(stem: str) -> int:
    found = re.match(r"About (\d+) minutes", promise(stem))
    assert found, f"{stem} does not say how long it takes"
    return int(found[1])


def stems_in(text: str) -> list[str]:
    """The notebooks that a text links to, in its order."""
    return [Path(link).stem for link in LINK.findall(text) if ".ipynb" in link]


def slug(heading: str) -> str:
    """The anchor of a heading, as code hosts and the site make it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    text = notebook(path.stem)[1] if path.suffix == ".ipynb" else read(path)
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.M)}


def section(text: str, name: str) -> str:
    found = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    assert found, f"no section {name}"
    return found[1]


def table(text: str) -> list[list[str]]:
    """The rows of a table below its head, as cells."""
    rows = [line.strip().strip("|").split("|") for line in text.splitlines() if line[:1] == "|"]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def numbers(text: str) -> set[str]:
    """Those that are no references, each in one spelling: 2,304 as 2304, and 488.00 as 488."""
    plain = [re.sub("[,_]", "", n) for n in NUMBER.findall(REFERENCE.sub("", text))]
    return {n.rstrip("0").rstrip(".") if "." in n else n for n in plain}


def whole(cell: str) -> int:
    return int(cell.replace(",", ""))


QUESTIONS = {found[1]: (found[2], found[3]) for p in PAGES for found in QUESTION.finditer(read(p))}
PLANS = {name: table(section(read(GUIDE), name)) for name in ("One day", "Four weeks", "Ten weeks")}


def test_every_notebook_has_a_page() -> None:
    assert [path.stem for path in PAGES] == STEMS
    assert len(read(GUIDE).splitlines()) < 250


def test_the_list_of_notebooks_is_true() -> None:
    *rows, total = table(section(read(GUIDE), "The notebooks"))
    assert [stems_in(row[0]) for row in rows] == [[stem] for stem in STEMS]
    for (_, reading, before, page), stem in zip(rows, STEMS, strict=True):
        assert whole(reading) == minutes(stem), stem
        assert stems_in(before) == stems_in(promise(stem)), stem
        assert page == f"[to {stem.partition('_')[0]}](teaching/{stem}.md)"
    assert whole(total[1]) == sum(map(minutes, STEMS))


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_adds_up(name: str) -> None:
    *rows, total = PLANS[name]
    seen: list[str] = []
    for session, notebooks, _, *cells in rows:
        reading, in_class, homework = map(whole, cells)
        now = stems_in(notebooks)
        assert reading == sum(map(minutes, now)), f"{name}, {session}"
        assert in_class + homework >= reading, f"{name}, {session}: not even time to read"
        for stem in now:
            assert set(stems_in(promise(stem))) <= {*seen, *now}, f"{stem} comes too early"
        seen += now
        numbers_of = {stem.partition("_")[0] for stem in now} & set(exercises.notebooks())
        cards = [each.minutes for number in numbers_of for each in exercises.exercises(number)]
        assert not (homework and cards) or min(cards) <= homework, f"{name}, {session}"
    assert sorted(seen) == STEMS
    sums = [sum(whole(row[column]) for row in rows) for column in (3, 4, 5)]
    assert list(map(whole, total[3:])) == sums


def test_lengths_in_words_agree_with_the_plans() -> None:
    text = read(GUIDE)
    opens, shuts = re.findall(r"(\d+):(\d\d)", section(text, "One day"))
    lasts = 60 * int(shuts[0]) + int(shuts[1]) - 60 * int(opens[0]) - int(opens[1])
    assert lasts == whole(PLANS["One day"][-1][4]) + 60 + 3 * 15
    for name in ("Four weeks", "Ten weeks"):
        length = re.search(r"sessions? of (\d+) minutes", section(text, name))
        assert length
        assert {row[4] for row in PLANS[name][:-1]} == {length[1]}
    assert len(PLANS["Four weeks"]) == 4 * 2 + 1
    assert len(PLANS["Ten weeks"]) == 10 + 1


@pytest.mark.parametrize("path", [GUIDE, *PAGES], ids=lambda path: path.stem)
def test_links_lead_to_files_and_headings(path: Path) -> None:
    links = LINK.findall(re.sub(r"```.*?```", "", read(path), flags=re.S))
    assert len(links) > 3
    for link in links:
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve()
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_page_is_complete(path: Path) -> None:
    text = read(path)
    head = text.partition("## Goals")[0]
    assert f"{minutes(path.stem)} minutes of reading" in head
    before = re.search(r"Before it:(.*?)\.\s\[Plans", head, re.S)
    assert stems_in(before[1] if before else "") == stems_in(promise(path.stem))
    assert len(section(text, "Goals").split()) >= 25
    rows = table(section(text, "Misconceptions"))
    assert len(rows) >= 3
    assert all(len(row) == 3 and all(row) and stems_in(row[2]) == [path.stem] for row in rows)
    assert all("#" in LINK.findall(row[2])[0] for row in rows), "link to the section"
    talk = section(text, "Discussion")
    assert 2 <= talk.count("\nA good answer") == len(BOLD.findall(talk)) <= 4
    asked = re.findall(r"^### Question (\S+)$", text, re.M)
    assert asked == [f"{path.stem.partition('_')[0]}.{n}" for n in range(1, len(asked) + 1)]
    assert 2 <= len(asked) <= 3
    assert set(asked) <= set(QUESTIONS), "a question without an answer"


def test_every_claim_that_does_not_hold_is_put_right_where_it_is_voted_on() -> None:
    treated: set[int] = set()
    for path in PAGES:
        votes = re.findall(r"\bVote\(([\d, ]+)\)", notebook(path.stem)[2])
        here = {int(n) for vote in votes for n in vote.split(",")}
        for number in map(int, re.findall(r"\(claim (\d+)\)", read(path))):
            assert number in here, f"claim {number} is not voted on in {path.stem}"
            treated.add(number)
    assert treated == {each.number for each in CLAIMS if each.verdict != "correct"}
    assert claim(14).verdict == "wrong"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_numbers_to_discuss_stand_in_the_notebook(path: Path) -> None:
    said = section(read(path), "Misconceptions") + section(read(path), "Discussion")
    said = re.sub(r"\]\(\S+\)", "]", said)
    assert numbers(said) - numbers(notebook(path.stem)[2]) == set()


@pytest.mark.parametrize("name", QUESTIONS)
def test_an_answer_is_what_the_package_computes(name: str) -> None:
    question, answer = QUESTIONS[name]
    (code,) = CODE.findall(answer)
    said = CODE.sub("", answer)
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
            names = [n for arg in node.args for n in ast.walk(arg) if isinstance(n, ast.Name)]
            computed = [n for arg in node.args for n in ast.walk(arg) if isinstance(n, ast.BinOp)]
            assert names or computed, "a number is printed that nothing computed"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, f"answer {name}", "exec"), {})
    lines = printed.getvalue().splitlines()
    assert lines
    assert lines == BOLD.findall(said)
    known = numbers(question) | numbers(code) | numbers(" ".join(lines))
    small = set("0123456789")  # factors of formulas, and places in a list
    assert numbers(said) - known - small == set(), "neither given nor computed"


def test_commands_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", read(ROOT / "Makefile"), re.M))
    text = read(GUIDE)
    assert set(re.findall(r"\bmake ([a-z]+)\b(?=`|$)", text, re.M)) <= targets
    for named in re.findall(r"`((?:notebooks|tests)/[\w/]*)`", text):
        assert (ROOT / named).is_dir(), named
