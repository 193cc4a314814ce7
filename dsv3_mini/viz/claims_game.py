"""All claims as a game: vote topic by topic, settle, and see what the evidence does to the score.

Why a score: most of what one has heard about a model is nearly right, and 'nearly' is what a
reader overlooks. So a point needs the exact verdict, a settled vote cannot be changed, and a claim
that was not voted on keeps its verdict. Each verdict comes with the cells that settle it, as links.

Without a front end a round shows its claims as text; ``claims_table`` is the plain form of it all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from html import escape
from typing import Any

import ipywidgets as widgets

from dsv3_mini.course.claims import CLAIMS, Claim
from dsv3_mini.course.settled import Place, places
from dsv3_mini.course.vote import Vote

TOPICS = tuple(dict.fromkeys(each.topic for each in CLAIMS))


class Table:
    """Markdown for a notebook, and the same as plain text where Markdown is not shown."""

    def __init__(self, markdown: str) -> None:
        self.markdown = markdown

    def __repr__(self) -> str:
        return self.markdown

    def _repr_markdown_(self) -> str:
        return self.markdown


def links(number: int, cell: bool = True) -> str:
    """The cells that settle a claim as Markdown links; without ``cell`` to the notebook only.

    JupyterLab opens the cell itself; elsewhere a page has no such place.
    """

    def link(place: Place) -> str:
        return f"[{place}]({place.link if cell else place.notebook})"

    return "; ".join(map(link, places(number)))


def claims_table(claims: Iterable[Claim] = CLAIMS) -> Table:
    """Number, claim, verdict, truth, source and where it is settled, one row a claim."""
    rows = ["| no. | claim | verdict | truth | settled in |", "|---|---|---|---|---|"]
    rows += [
        f"| {each.number} | {each.text} | {each.verdict} | {each.truth} [{each.source}] | "
        f"{links(each.number, cell=False)} |"
        for each in claims
    ]
    return Table("\n".join(rows))


class Round(widgets.VBox):  # type: ignore[misc]
    """One topic: claims to vote on, a button that settles them, verdicts, and the score.

    ``settled`` has the votes that count, by number; ``told`` is called after a change of it.
    """

    def __init__(self, topic: str, told: Callable[[], None] = lambda: None) -> None:
        self.claims = {each.number: each for each in CLAIMS if each.topic == topic}
        self.vote, self.settled, self._told = Vote(*self.claims), dict[int, str](), told
        self.verdicts = {number: widgets.Output() for number in self.claims}
        self.button = widgets.Button(
            description="Settle what I voted on",
            tooltip=f"settle the votes on {topic}",
            layout={"width": "auto", "margin": "1em 0 0 0", "align_self": "flex-start"},
        )
        self.button.on_click(lambda _: self.settle())
        self.line = widgets.HTML()
        shown, labels = [], self.vote.children[::2]
        for label, (number, buttons) in zip(labels, self.vote.buttons.items(), strict=True):
            shown += [label, buttons, self.verdicts[number]]
        super().__init__([*shown, self.button, self.line])

    @property
    def right(self) -> list[int]:
        """The settled claims whose verdict was the reader's."""
        return [n for n, voted in self.settled.items() if voted == self.claims[n].verdict]

    def settle(self) -> None:
        """Show the verdict of every claim that has a vote, which then stands."""
        for number, voted in self.vote.votes.items():
            if voted and number not in self.settled:
                self.settled[number] = voted
                self.vote.buttons[number].disabled = True
                self.verdicts[number].outputs = (self._answer(number, voted),)
        self.button.disabled = len(self.settled) == len(self.claims)
        self._told()

    def _answer(self, number: int, voted: str) -> dict[str, Any]:
        each = self.claims[number]
        said = "you were right" if voted == each.verdict else f"you said {voted}"
        text = (
            f"**{number} is {each.verdict}; {said}.** {each.truth} [{each.source}]  \n"
            f"Settled in {links(number)}"
        )
        data = {"text/markdown": text, "text/plain": text}
        return {"output_type": "display_data", "data": data, "metadata": {}}

    def __repr__(self) -> str:
        return repr(self.vote)

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        return super()._repr_mimebundle_(**kwargs) | {"text/plain": repr(self)}


class Board(widgets.HTML):  # type: ignore[misc]
    """The score of every topic; as text it says the same."""

    def __init__(self, rounds: dict[str, Round]) -> None:
        self._rounds = rounds
        super().__init__()
        self.update()

    def rows(self) -> list[tuple[str, int, int, int]]:
        """Topic, claims settled as voted, claims settled, claims; the last row is the sum."""
        rows = [(t, len(r.right), len(r.settled), len(r.claims)) for t, r in self._rounds.items()]
        return [*rows, ("all", *(sum(column) for column in list(zip(*rows, strict=True))[1:]))]

    def believed(self) -> list[int]:
        """Claims that the reader took for correct and that are imprecise or wrong."""
        return [
            number
            for each in self._rounds.values()
            for number, voted in each.settled.items()
            if voted == "correct" != each.claims[number].verdict
        ]

    def remark(self) -> str:
        """One sentence on ``believed``."""
        numbers = ", ".join(map(str, self.believed())) or "none"
        return f"Taken for correct, and imprecise or wrong: {numbers}."

    def update(self) -> None:
        """Draw the table anew."""
        heads = "".join(
            f"<th scope='col' style='text-align:left'>{h}</th>"
            for h in ("topic", "right", "settled", "claims")
        )
        body = "".join(
            f"<tr><th scope='row' style='text-align:left'>{topic}</th>"
            + "".join(f"<td style='text-align:right'>{count}</td>" for count in counts)
            + "</tr>"
            for topic, *counts in self.rows()
        )
        self.value = (
            f"<table style='border-spacing:16px 2px'><tr>{heads}</tr>{body}</table>"
            f"<div>{escape(self.remark())}</div>"
        )

    def __repr__(self) -> str:
        lines = [
            f"{topic:10s}{r:3d} right of{s:3d} settled of{n:3d}" for topic, r, s, n in self.rows()
        ]
        return "\n".join([*lines, self.remark()])

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        return super()._repr_mimebundle_(**kwargs) | {"text/plain": repr(self)}


class ClaimsGame:
    """A round for each topic, ``game["attention"]``, and ``board``, the score of all of them."""

    def __init__(self) -> None:
        self.rounds = {topic: Round(topic, self._update) for topic in TOPICS}
        self.board = Board(self.rounds)
        self._update()

    def __getitem__(self, topic: str) -> Round:
        if topic not in self.rounds:
            raise ValueError(f"topic {topic!r} has no claim; expected one of {', '.join(TOPICS)}")
        return self.rounds[topic]

    def _update(self) -> None:
        self.board.update()
        *rows, (_, right, settled, _) = self.board.rows()
        for topic, here, done, claims in rows:
            text = f"{topic}: {here} of {done} right, {claims - done} open. "
            text += f"All topics: {right} of {settled} right."
            self.rounds[topic].line.value = f"<div>{text}</div>"
