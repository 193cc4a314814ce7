"""Notebooks 04 and 05 in the browser: a sentence routed, and a run that obeys its controls."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

pytest.importorskip("playwright", reason="playwright is not installed: no test in a browser")

from playwright.sync_api import expect

from tests.browser.lab import chromium
from tests.browser.notebook import Notebook
from tests.browser.test_explorers import browser, keep, lab, notebook

__all__ = ["browser", "keep", "lab", "notebook"]  # fixtures

pytestmark = pytest.mark.skipif(
    chromium() is None, reason="no Chromium found; name one in the variable DSV3_CHROMIUM"
)

STEP = re.compile(r"(\w+), step ([\d,]+) of")
LATE = 60_000  # milliseconds that training may take to get somewhere, on a busy machine


def status(notebook: Notebook) -> tuple[str, int]:
    """The phase and the step that the status line tells."""
    found = STEP.search(notebook.cell.inner_text())
    assert found, notebook.cell.inner_text()
    return found[1], int(found[2].replace(",", ""))


def violations(notebook: Notebook) -> list[float]:
    """MaxVio of each layer, as the picture's text alternative says."""
    label = notebook.cell.locator("svg[role=img]").get_attribute("aria-label") or ""
    return [float(value) for value in re.findall(r"MaxVio (\d+\.\d+)", label)]


def until(notebook: Notebook, condition: Callable[[], bool], what: str, wait: int = LATE) -> None:
    for _ in range(wait // 100):
        if condition():
            return
        notebook.page.wait_for_timeout(100)
    raise AssertionError(f"{what}: not after {wait / 1000:.0f} s; {status(notebook)}")


def test_the_reader_holds_the_controls(notebook: Notebook, keep: Callable[..., None]) -> None:
    """Start, collapse, change gamma and the mode while it trains, shift the text, pause, stop."""
    notebook.open("05_load_balancing.ipynb", seconds=300)
    notebook.show("live = LiveBalance(run)")
    assert status(notebook) == ("ended", 240)
    notebook.show("your_live = LiveBalance(")
    button = lambda name: notebook.cell.get_by_role("button", name=name)  # noqa: E731
    notebook.push(button("Start"))
    until(notebook, lambda: status(notebook)[1] > 60, "60 steps")
    until(notebook, lambda: max(violations(notebook)) > 2, "a collapse")
    keep(notebook, "-collapsed")

    frames = """async () => { let count = 0; const widget = document.querySelector('[data-tested]');
        const seen = new MutationObserver(() => { count += 1 });
        seen.observe(widget.querySelector('svg[role=img]').parentElement, {childList: true});
        await new Promise(done => setTimeout(done, 3000)); seen.disconnect(); return count / 3 }"""
    assert notebook.page.evaluate(frames) >= 4, "pictures a second while it trains"

    before = status(notebook)[1]
    notebook.choose("balance by", "bias")
    until(notebook, lambda: "balance by bias" in notebook.cell.inner_text(), "the mode", 3000)
    gamma = notebook.readout("gamma")
    notebook.press("gamma", "ArrowLeft", 2)
    until(notebook, lambda: notebook.readout("gamma") != gamma, "gamma", 3000)
    assert status(notebook)[0] == "running"
    until(notebook, lambda: max(violations(notebook)) < 1, "balance")
    assert status(notebook)[1] > before
    keep(notebook, "-balanced")

    notebook.push(button("text: all"))
    until(notebook, lambda: "text: python" in notebook.cell.inner_text(), "the domain", 3000)
    notebook.push(button("Pause"))
    until(notebook, lambda: status(notebook)[0] == "paused", "a pause", 3000)
    here = status(notebook)[1]
    notebook.page.wait_for_timeout(500)
    assert status(notebook) == ("paused", here)
    notebook.push(button("Resume"), by="mouse")
    until(notebook, lambda: status(notebook)[1] > here, "more steps")
    notebook.push(button("Stop"))
    until(notebook, lambda: status(notebook)[0] == "ended", "the end", 3000)
    expect(button("Stop")).to_be_disabled()
    assert notebook.cut_off() == []


def test_a_sentence_of_ones_own_is_routed(notebook: Notebook, keep: Callable[..., None]) -> None:
    """Layer and token by keyboard, another text, and an empty one."""
    notebook.open("04_deepseek_moe.ipynb", seconds=300)
    notebook.show("routing_explorer = routing.RoutingExplorer(")
    rows, picture = notebook.numbers(), notebook.picture_hash()
    notebook.press("token", "ArrowRight", 3)
    until_changed = lambda: notebook.numbers() != rows and notebook.picture_hash() != picture  # noqa: E731
    until(notebook, until_changed, "another token", 10_000)
    assert notebook.number("token").startswith("3:")
    keep(notebook)
    field = notebook.control("text").locator("input, textarea").first
    field.fill("for token in range(8):")
    field.press("Enter")
    until(notebook, lambda: "for" in notebook.number("token") or "ok" in str(notebook.numbers()),
          "another text", 10_000)  # fmt: skip
    gates = [float(text.rsplit("gate ", 1)[1]) for name, text in notebook.numbers().items()
             if name.startswith("choice")]  # fmt: skip
    assert sum(gates) == pytest.approx(2.5, abs=1e-3)
    field.fill("")
    field.press("Enter")
    expect(notebook.cell).to_contain_text("Not possible")
