"""The 63 claims are complete, and a vote keeps their verdicts to itself until it is settled."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from typing import Any

import ipywidgets as widgets
import pytest

from dsv3_mini.course.claims import CLAIMS, SOURCES, VERDICTS, Claim, claim
from dsv3_mini.course.vote import Vote, verdict_text
from tests.environment import ROOT

WRONG = [14, 15, 20, 23, 31, 41, 50, 54, 60]
FP8_63 = (
    "63 IMPRECISE: Each group of numbers has its own scale, so that an outlier affects only its own"
    "\n   group. [report 3.3.2]\n"
)


def everything(widget: widgets.Widget) -> str:
    """All that the front end receives of a widget and of what it contains, as text."""
    text = json.dumps(widget.get_state(), default=lambda inner: type(inner).__name__)
    for value in [getattr(widget, key) for key in widget.keys]:
        for part in value if isinstance(value, tuple) else [value]:
            if isinstance(part, widgets.Widget):
                text += everything(part)
    return text


def test_numbers_run_from_1_to_63() -> None:
    assert [each.number for each in CLAIMS] == list(range(1, 64))


def test_verdicts_are_those_of_the_record() -> None:
    counts = Counter(each.verdict for each in CLAIMS)
    assert counts == {"correct": 33, "imprecise": 21, "wrong": 9}
    assert [each.number for each in CLAIMS if each.verdict == "wrong"] == WRONG


def test_topics_are_few() -> None:
    assert {each.topic for each in CLAIMS} == {
        "overview", "attention", "rope", "experts", "balance", "mtp", "routing", "fp8",
    }  # fmt: skip


@pytest.mark.parametrize("each", CLAIMS, ids=lambda each: str(each.number))
def test_a_claim_is_complete(each: Claim) -> None:
    assert 25 <= len(each.text) <= 120
    assert 40 <= len(each.truth) <= 220
    assert 8 <= len(each.source) <= 60
    for sentence in (each.text, each.truth):
        assert sentence.endswith(".")
        assert sentence == " ".join(sentence.split())
        assert sentence.isascii()
    for part in each.source.split("; "):
        assert any(part == name or part.startswith((name + " ", name + ",")) for name in SOURCES)


def test_no_two_claims_are_the_same() -> None:
    assert len({each.text for each in CLAIMS}) == 63


def test_a_claim_is_found_by_its_number() -> None:
    assert [claim(number) for number in range(1, 64)] == list(CLAIMS)


@pytest.mark.parametrize("number", [0, 64, -1, "4"])
def test_a_claim_that_does_not_exist(number: Any) -> None:
    with pytest.raises(ValueError, match=f"claim {number!r} does not exist.*from 1 to 63"):
        claim(number)


def test_the_data_alone_brings_no_notebook_package() -> None:
    program = (
        "import sys\n"
        "import dsv3_mini.course.claims\n"
        "brought = {'ipywidgets', 'matplotlib', 'IPython'} & set(sys.modules)\n"
        "sys.exit(', '.join(brought) or None)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_nothing_shown_gives_a_verdict_away() -> None:
    vote = Vote(*range(1, 64))
    shown = everything(vote) + repr(vote)
    for each in CLAIMS:
        assert each.text.split(";")[0] in shown
        assert each.truth not in shown
        assert f"[{each.source}]" not in shown
    labels = [child.value for child in vote.children if isinstance(child, widgets.HTML)]
    assert len(labels) == 63
    for text in [*labels, *repr(vote).splitlines()[1:]]:
        assert not any(verdict in text.lower() for verdict in VERDICTS)
    states = [everything(vote.buttons[number]) for number in (1, 2, 14)]  # one of each verdict
    assert len({re.sub(r"IPY_MODEL_\w+|claim \d+", "", state) for state in states}) == 1


def test_everything_sees_into_the_children() -> None:
    assert "hidden text" in everything(widgets.VBox([widgets.HBox([widgets.HTML("hidden text")])]))


def test_nothing_is_chosen_at_first() -> None:
    vote = Vote(14, 4)
    assert vote.votes == {14: None, 4: None}
    assert all(buttons.options == VERDICTS for buttons in vote.buttons.values())


def test_a_choice_is_a_vote() -> None:
    vote = Vote(14, 4)
    vote.buttons[14].value = "imprecise"
    assert vote.votes == {14: "imprecise", 4: None}
    vote.buttons[14].value = "wrong"
    vote.buttons[4].value = "correct"
    assert vote.votes == {14: "wrong", 4: "correct"}


def test_signs_of_html_in_a_claim_are_shown_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    odd = Claim(1, "overview", "a < b & c", "correct", "", "")
    monkeypatch.setattr("dsv3_mini.course.vote.claim", lambda number: odd)
    assert "a &lt; b &amp; c" in Vote(1).children[0].value


def test_a_static_page_shows_every_claim_whole() -> None:
    vote = Vote(14, 8, 1)
    plain = (
        "correct, imprecise or wrong?\n"
        "  14  MLA has two latents: a content latent and a key-value latent.\n"
        "   8  MLA uses low-rank joint compression of keys and values.\n"
        "   1  DeepSeek-V3 has 671 billion parameters."
    )
    assert repr(vote) == plain
    bundle = vote._repr_mimebundle_()
    assert bundle["text/plain"] == plain
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == vote.model_id


def test_settling_without_a_vote(capsys: pytest.CaptureFixture[str]) -> None:
    Vote(14, 63).settle(63)
    assert capsys.readouterr().out == FP8_63


def test_settling_with_a_vote(capsys: pytest.CaptureFixture[str]) -> None:
    vote = Vote(14, 63)
    vote.buttons[63].value = "correct"
    vote.settle(63)
    assert capsys.readouterr().out == FP8_63 + "   you said: correct\n"


def test_settling_takes_all_claims_unless_told(capsys: pytest.CaptureFixture[str]) -> None:
    vote = Vote(14, 63)
    vote.settle()
    both = capsys.readouterr().out
    vote.settle(14, 63)
    assert capsys.readouterr().out == both
    assert both == verdict_text(claim(14)) + "\n" + FP8_63


@pytest.mark.parametrize("each", CLAIMS, ids=lambda each: str(each.number))
def test_a_verdict_fits_the_page_and_loses_nothing(each: Claim) -> None:
    text = verdict_text(each)
    assert max(map(len, text.splitlines())) <= 100
    whole = f"{each.number} {each.verdict.upper()}: {each.truth} [{each.source}]"
    assert " ".join(text.split()) == whole


def test_another_votes_claim_is_refused_before_anything_is_printed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(
        ValueError, match="claim 15 is not part of this vote; expected one of 14, 4"
    ):
        Vote(14, 4).settle(14, 15)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("numbers", [(), (4, 4)])
def test_a_vote_needs_claims_and_each_once(numbers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected at least one, and none twice"):
        Vote(*numbers)


def test_a_vote_on_a_claim_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="claim 99 does not exist"):
        Vote(4, 99)
