"""The game of claims in a real JupyterLab: vote, settle, read the score, follow a link."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytest.importorskip("playwright", reason="playwright is not installed: no test in a browser")

from playwright.sync_api import expect

from dsv3_mini.course.claims import claim
from dsv3_mini.course.settled import places
from tests.browser.lab import chromium
from tests.browser.notebook import Notebook
from tests.browser.test_explorers import browser, keep, lab, notebook

__all__ = ["browser", "keep", "lab", "notebook"]  # fixtures

pytestmark = pytest.mark.skipif(
    chromium() is None, reason="no Chromium found; name one in the variable DSV3_CHROMIUM"
)
BUTTON = "Settle what I voted on"


def test_a_topic_is_played(notebook: Notebook, keep: Callable[..., None]) -> None:
    """By keyboard and by mouse: verdicts of what was voted on only, and a score everywhere."""
    notebook.open("12_claims.ipynb")
    notebook.show('game["rope"]')
    button = notebook.cell.get_by_role("button", name=BUTTON)
    notebook.push(button)
    expect(notebook.cell).to_contain_text("rope: 0 of 0 right, 4 open.")
    notebook.push(notebook.cell.get_by_title("claim 15: wrong"), "keyboard")
    notebook.push(notebook.cell.get_by_title("claim 10: imprecise"), "mouse")
    keep(notebook, "-voted")
    notebook.push(button, "keyboard")
    expect(notebook.cell).to_contain_text("15 is wrong; you were right. " + claim(15).truth)
    expect(notebook.cell).to_contain_text("10 is correct; you said imprecise.")
    expect(notebook.cell).not_to_contain_text(claim(21).truth)
    expect(notebook.cell).to_contain_text("rope: 1 of 2 right, 2 open. All topics: 1 of 2 right.")
    expect(notebook.cell.get_by_title("claim 15: correct")).to_be_disabled()
    expect(notebook.cell.get_by_title("claim 21: correct")).to_be_enabled()
    assert notebook.cut_off() == []
    keep(notebook, "-settled")
    notebook.show('game["fp8"]')
    expect(notebook.cell).to_contain_text("fp8: 0 of 0 right, 6 open. All topics: 1 of 2 right.")
    notebook.show("game.board")
    expect(notebook.cell.locator("tr").last).to_have_text("all1263")
    keep(notebook, "-board")
    notebook.show("claims_table()")
    expect(notebook.cell.locator("tr")).to_have_count(64)
    keep(notebook, "-table")


def test_a_verdict_leads_to_its_cell(notebook: Notebook) -> None:
    """The link opens the notebook in the same JupyterLab, at the cell that settles the claim."""
    notebook.open("12_claims.ipynb")
    notebook.show('game["routing"]')
    notebook.push(notebook.cell.get_by_title("claim 54: wrong"))
    notebook.push(notebook.cell.get_by_role("button", name=BUTTON))
    place = places(54)[0]
    notebook.cell.get_by_role("link", name=str(place)).click()
    current = "window.jupyterapp.shell.currentWidget"
    notebook.page.wait_for_function(f"() => {current}.context.path.endsWith('{place.notebook}')")
    target = f"{current}.content.activeCell?.model.id === '{place.identifier}'"
    assert notebook.page.wait_for_function(f"() => {target}").json_value() is True
