"""Every claim is voted on, settled and tied to a cell; the game keeps verdicts and counts right."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import pytest

from dsv3_mini.course import settled
from dsv3_mini.course.claims import CLAIMS, claim
from dsv3_mini.course.vote import Vote
from dsv3_mini.viz.claims_game import TOPICS, ClaimsGame, Round, claims_table, links
from tests.environment import NOTEBOOKS
from tests.test_claims import everything

NUMBERS = range(1, 64)

# ------------------------------------------------------------------- what the notebooks say


def test_every_claim_is_voted_on_and_settled_in_a_notebook_and_named_by_an_assertion() -> None:
    voted, done, named = settled.votes(), settled.settled(), settled.asserted()
    assert [n for n in NUMBERS if n not in voted] == [], "no notebook has them in a Vote(...)"
    assert [n for n in NUMBERS if n not in done] == [], "no vote.settle() settles them"
    assert [n for n in NUMBERS if n not in named] == [], "no message of an assertion names them"
    assert set(voted) == set(done) == set(named) == set(NUMBERS)
    for number in NUMBERS:
        assert set(done[number]) <= set(voted[number]), f"{number} is settled without a vote"
        assert not any(name.startswith("12") for name in voted[number])


def test_the_record_is_the_present_one() -> None:
    present = settled.RECORD.read_text(encoding="utf-8") == settled.record()
    assert present, "run python -m dsv3_mini.course.settled --write"


def test_places_are_cells_of_notebooks() -> None:
    for number in NUMBERS:
        for place in settled.places(number):
            cells = json.loads((NOTEBOOKS / place.notebook).read_text("utf-8"))["cells"]
            code = [cell for cell in cells if cell["cell_type"] == "code"]
            assert code[place.number - 1]["id"] == place.identifier
            assert re.search(rf"\b{number}\b", "".join(code[place.number - 1]["source"]))
            above = cells[: cells.index(code[place.number - 1])]
            assert any(f"# {place.section}" in "".join(cell["source"]) for cell in above)
    assert settled.places(64) == []


def notebook(folder: Path, name: str, *sources: str) -> None:
    """Markdown where a source begins with '#', else code."""
    cells = [
        {"cell_type": "markdown" if s.startswith("#") else "code", "source": [s], "id": f"i{n}"}
        for n, s in enumerate(sources)
    ]
    (folder / name).write_text(json.dumps({"cells": cells}))


def test_notebooks_are_read_as_they_are_meant(tmp_path: Path) -> None:
    notebook(
        tmp_path, "02_b.ipynb",
        "# Title\n\n## One", "vote = Vote(4, 5)", "x = 1\nassert x, '4'", "## Two\ntext",
        "assert x == 1, (\n    '5, 7: as '\n    'seen'\n)\nassert x, 'claims 8 and 9: so'\n"
        "vote.settle(5)",
    )  # fmt: skip
    notebook(
        tmp_path, "03_c.ipynb",
        "# C", "%time\nvote = Vote(6)\nvote.settle()\nassert 1, '4'\nassert 1, '4: again'",
        "assert 2, 'no 10 here'\nassert 3\n# 11\nassert 1, '12 tokens'", "other.settle(4)",
    )  # fmt: skip
    assert settled.votes(tmp_path) == {
        4: ["02_b.ipynb"], 5: ["02_b.ipynb"], 6: ["03_c.ipynb"],
    }  # fmt: skip
    assert settled.settled(tmp_path) == {5: ["02_b.ipynb"], 6: ["03_c.ipynb"]}
    one = settled.Place("02_b.ipynb", "One", 2, "i2")
    two = settled.Place("02_b.ipynb", "Two", 3, "i4")
    title = settled.Place("03_c.ipynb", "C", 1, "i1")
    named = {4: [one, title], 5: [two], 7: [two], 8: [two], 9: [two]}
    assert settled.asserted(tmp_path) == named
    assert (str(two), two.link) == ("02, Two, code cell 3", "02_b.ipynb#cell-id=i4")


def test_a_folder_without_notebooks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no notebook; expected the repository's notebooks"):
        settled.votes(tmp_path)


# -------------------------------------------------------------------------------------- the game


def play(round: Round, **votes: str) -> None:
    """``play(round, c15="wrong")`` votes on claim 15 and settles."""
    for name, verdict in votes.items():
        round.vote.buttons[int(name[1:])].value = verdict
    round.button.click()


def answer(round: Round, number: int) -> str:
    outputs = round.verdicts[number].outputs
    return str(outputs[0]["data"]["text/markdown"]) if outputs else ""


def test_every_claim_has_its_topic() -> None:
    game = ClaimsGame()
    numbers = [number for topic in TOPICS for number in game[topic].claims]
    assert sorted(numbers) == list(NUMBERS)
    assert all(claim(n).topic == topic for topic in TOPICS for n in game[topic].claims)
    with pytest.raises(ValueError, match="topic 'cost' has no claim; expected one of overview"):
        game["cost"]


def test_nothing_is_given_away_before_a_vote() -> None:
    game = ClaimsGame()
    shown = "".join(everything(game[topic]) + repr(game[topic]) for topic in TOPICS)
    shown += everything(game.board) + repr(game.board)
    for each in CLAIMS:
        assert each.text.split(";")[0] in shown
        assert each.truth not in shown
        assert f"is {each.verdict}" not in shown
    for topic in TOPICS:
        play(game[topic])
        assert not any(answer(game[topic], n) for n in game[topic].claims)
        assert not game[topic].button.disabled


def test_only_what_was_voted_on_is_settled_and_then_it_stands() -> None:
    rope = ClaimsGame()["rope"]
    play(rope, c15="wrong", c10="imprecise")
    assert answer(rope, 15) == (
        f"**15 is wrong; you were right.** {claim(15).truth} [{claim(15).source}]  \n"
        f"Settled in {links(15)}"
    )
    assert answer(rope, 10).startswith("**10 is correct; you said imprecise.** Each head's")
    assert [answer(rope, n) for n in (11, 21)] == ["", ""]
    assert [rope.vote.buttons[n].disabled for n in (10, 11, 15, 21)] == [True, False, True, False]
    rope.vote.buttons[10].value = "correct"  # as no front end can
    rope.button.click()
    assert rope.settled == {15: "wrong", 10: "imprecise"}
    play(rope, c11="correct", c21="correct")
    assert rope.button.disabled
    assert rope.right == [15, 11, 21]


def test_scores() -> None:
    game = ClaimsGame()
    play(game["rope"], c15="wrong", c10="correct", c11="wrong")
    play(game["routing"], c54="correct", c53="correct")
    rows = {topic: tuple(counts) for topic, *counts in game.board.rows()}
    expected = dict.fromkeys(TOPICS, (0, 0)) | {"rope": (2, 3), "routing": (1, 2), "all": (3, 5)}
    assert {topic: counts[:2] for topic, counts in rows.items()} == expected
    assert [rows[topic][2] for topic in (*TOPICS, "all")] == [3, 18, 4, 4, 10, 16, 2, 6, 63]
    assert game["fp8"].line.value == (
        "<div>fp8: 0 of 0 right, 6 open. All topics: 3 of 5 right.</div>"
    )
    assert "rope: 2 of 3 right, 1 open. All topics: 3 of 5 right." in game["rope"].line.value
    assert game.board.believed() == [54]
    assert "imprecise or wrong: 54." in game.board.value
    cells = re.findall(r"<td[^>]*>(\d+)</td>", game.board.value)
    assert list(map(int, cells)) == [count for _, *counts in game.board.rows() for count in counts]


def test_a_perfect_and_a_credulous_reader() -> None:
    for verdict, right, believed in ((None, 63, 0), ("correct", 33, 30)):
        game = ClaimsGame()
        for each in CLAIMS:
            game[each.topic].vote.buttons[each.number].value = verdict or each.verdict
        for topic in TOPICS:
            game[topic].button.click()
        assert game.board.rows()[-1] == ("all", right, 63, 63)
        assert len(game.board.believed()) == believed


def test_a_static_page_shows_the_claims_whole_and_no_score() -> None:
    game = ClaimsGame()
    every: list[Any] = [*game.rounds.values(), game.board]
    for shown in every:
        bundle = shown._repr_mimebundle_()
        assert bundle["text/plain"] == repr(shown)
        assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == shown.model_id
    assert repr(game["rope"]) == repr(Vote(10, 11, 15, 21))
    assert repr(game.board).splitlines()[-2:] == [
        "all         0 right of  0 settled of 63",
        "Taken for correct, and imprecise or wrong: none.",
    ]


def labels(widget: Any) -> list[str]:
    """What a screen reader or the keyboard meets, in order."""
    if isinstance(widget, widgets.ToggleButtons):
        return list(widget.tooltips)
    if isinstance(widget, widgets.Button):
        return [widget.description]
    return [label for child in getattr(widget, "children", ()) for label in labels(child)]


def test_the_order_of_the_keyboard() -> None:
    *votes, last = labels(ClaimsGame()["routing"])
    verdicts = ("correct", "imprecise", "wrong")
    assert votes == [f"claim {number}: {verdict}" for number in (53, 54) for verdict in verdicts]
    assert last == "Settle what I voted on"


# ------------------------------------------------------------------------------------- the table


def test_the_table_has_every_claim_and_links_to_notebooks() -> None:
    table = claims_table()
    assert table._repr_markdown_() == repr(table)
    head, rule, *rows = repr(table).splitlines()
    assert rule.count("---") == head.count("|") - 1 == 5
    for each, row in zip(CLAIMS, rows, strict=True):
        number, text, verdict, truth, where = (cell.strip() for cell in row.split("|")[1:-1])
        assert (int(number), text, verdict) == (each.number, each.text, each.verdict)
        assert truth == f"{each.truth} [{each.source}]"
        targets = re.findall(r"\]\(([^)]*)\)", where)
        assert targets == [place.notebook for place in settled.places(each.number)]
        assert targets
        assert all((NOTEBOOKS / target).is_file() for target in targets)
