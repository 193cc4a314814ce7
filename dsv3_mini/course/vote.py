"""Vote on claims first, settle them later: a prediction that is written down cannot drift.

Why: reading an answer feels like having known it. A ``Vote`` shows claims and keeps what the
reader chose; no verdict leaves it until ``settle`` is called, after the measurements. Without a
reader, or without a front end, everything shown is the same text in every run.
"""

from __future__ import annotations

from html import escape
from textwrap import fill
from typing import Any

import ipywidgets as widgets

from dsv3_mini.course.claims import VERDICTS, Claim, claim

WIDTH = 100
INDENT = "   "


def verdict_text(claim: Claim) -> str:
    """'14 WRONG: <truth> [<source>]', wrapped."""
    return fill(
        f"{claim.number} {claim.verdict.upper()}: {claim.truth} [{claim.source}]",
        width=WIDTH, subsequent_indent=INDENT, break_on_hyphens=False,
    )  # fmt: skip


class Vote(widgets.VBox):  # type: ignore[misc]
    """Claims to judge, by number: ``Vote(4, 5, 6)``. ``.votes`` has the reader's answers so far."""

    def __init__(self, *numbers: int) -> None:
        if not numbers or len(set(numbers)) < len(numbers):
            raise ValueError(f"got claims {numbers}; expected at least one, and none twice")
        self.claims = {number: claim(number) for number in numbers}
        self.buttons: dict[int, Any] = {number: self._buttons(number) for number in numbers}
        rows = []
        for number, each in self.claims.items():
            look = "white-space: normal; line-height: 1.4; max-width: 46em; padding-top: 0.6em"
            label = f"<div style='{look}'><b>{number}</b>&ensp;{escape(each.text)}</div>"
            rows += [widgets.HTML(label, layout={"width": "auto"}), self.buttons[number]]
        super().__init__(rows)

    def _buttons(self, number: int) -> widgets.ToggleButtons:
        return widgets.ToggleButtons(
            options=VERDICTS,
            value=None,
            tooltips=[f"claim {number}: {verdict}" for verdict in VERDICTS],
            style={"button_width": "8em"},
            layout={"width": "auto"},
        )

    @property
    def votes(self) -> dict[int, str | None]:
        """Claim number to 'correct', 'imprecise', 'wrong', or None as long as it is open."""
        return {number: buttons.value for number, buttons in self.buttons.items()}

    def settle(self, *numbers: int) -> None:
        """Print verdict, truth and source of these claims (default: all), and the reader's vote.

        ValueError, before anything is printed, for a claim that is not part of this vote.
        """
        for number in numbers:
            if number not in self.claims:
                listed = ", ".join(map(str, self.claims))
                raise ValueError(
                    f"claim {number!r} is not part of this vote; expected one of {listed}"
                )
        for number in numbers or self.claims:
            print(verdict_text(self.claims[number]))
            if voted := self.votes[number]:
                print(f"{INDENT}you said: {voted}")

    def __repr__(self) -> str:
        lines = [f"{number:>4}  {each.text}" for number, each in self.claims.items()]
        return "\n".join(["correct, imprecise or wrong?", *lines])

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        # ipywidgets cuts the text after 110 characters; a static page shows nothing else.
        return super()._repr_mimebundle_(**kwargs) | {"text/plain": repr(self)}
