"""The speculation explorer in a real JupyterLab: a prompt is typed, Generate is pressed.

What the page must say is asked of the plain decoders, in this process.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import pytest

pytest.importorskip("playwright", reason="playwright is not installed: no test in a browser")

from playwright.sync_api import Locator, expect
from tokenizers import Tokenizer

from dsv3_mini import Transformer, speculative
from dsv3_mini import generate as usual
from dsv3_mini.course.trained import load_trained
from dsv3_mini.data import load_tokenizer
from tests.browser.lab import chromium
from tests.browser.notebook import PATIENCE, Notebook
from tests.browser.test_explorers import browser, keep, lab, notebook
from tests.browser.test_live import LATE, told

__all__ = ["browser", "keep", "lab", "notebook"]  # fixtures

pytestmark = pytest.mark.skipif(
    chromium() is None, reason="no Chromium found; name one in the variable DSV3_CHROMIUM"
)

SOURCE = """
from dsv3_mini.course.trained import load_trained
from dsv3_mini.data import load_tokenizer
from dsv3_mini.viz.speculation import SpeculationExplorer

explorer = SpeculationExplorer(load_trained(), load_tokenizer())
explorer
"""
HAS = """
import json  # what the kernel has

print(json.dumps([explorer.prompt.value, explorer.count.value, round(explorer.heat.value, 2)]))
"""
# Two lines; and dd, which outside a field deletes a cell.
PROMPT = "x = dd & 3\nif not x < 3 and x <"
LOOKS = {"main model": "plain", "draft, accepted": "accepted",
         "draft refused, corrected": "rejected"}  # fmt: skip
STATUS = re.compile(
    r"accepted (\d+) of (\d+) drafts \((\d+%)\), (\d\.\d\d) tokens a step; "
    r"plain (\d+) tokens/s, speculative (\d+) \((\d+\.\d\d) x\); ([a-z ]+)$"
)
BOXES = """
spans => spans.map(span => {
    const style = getComputedStyle(span);
    let behind = span;
    while (getComputedStyle(behind).backgroundColor === 'rgba(0, 0, 0, 0)')
        behind = behind.parentElement;
    const border = `${style.borderTopStyle} ${style.borderTopWidth}`;
    const paper = getComputedStyle(behind).backgroundColor;
    return {title: span.title, text: span.textContent, border, paper, ink: style.color}
})
"""


@dataclass
class Box:
    """A token as the page shows it, with its computed style."""

    title: str
    text: str
    border: str
    paper: str
    ink: str

    @property
    def style(self) -> tuple[str, str, str]:
        """Everything that is to be the same for all tokens of one fate."""
        return self.border, self.paper, self.ink


@pytest.fixture(scope="module")
def model() -> Transformer:
    """The model that the notebook loads, in this process."""
    return load_trained()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Its tokenizer."""
    return load_tokenizer()


def spans(notebook: Notebook, paragraph: int) -> Locator:
    """The boxes on the page: of paragraph 0, the key, or of 1, the text."""
    return notebook.cell.locator(".widget-html-content p").nth(paragraph).locator("span")


def boxes(notebook: Notebook, paragraph: int) -> list[Box]:
    """What these boxes say, and how they look."""
    return [Box(**box) for box in spans(notebook, paragraph).evaluate_all(BOXES)]


def text(shown: list[Box]) -> str:
    """The tokens' text, with spaces and line ends for the signs that stand for them."""
    return "".join(box.text for box in shown).replace("␣", " ").replace("↵", "\n")


def fates(shown: list[Box]) -> list[str]:
    """The tokens' fates, by what the pointer is told over each of them."""
    return [LOOKS[box.title] for box in shown]


def write(notebook: Notebook, prompt: str) -> None:
    """Type a prompt in place of the one that is there, as a learner would."""
    field = notebook.control("prompt").locator("textarea")
    field.click()
    notebook.page.keyboard.press("ControlOrMeta+A")
    notebook.page.keyboard.press("Delete")
    notebook.page.keyboard.type(prompt)
    expect(field).to_have_value(prompt)


def push(notebook: Notebook, by: str) -> float:
    """Push Generate once the kernel has what the page shows; the time of the push.

    Why wait: a push overtakes what was typed just before, when no hand is that quick.
    """
    prompt = notebook.control("prompt").locator("textarea").input_value()
    count, heat = notebook.readout("new tokens"), notebook.readout("temperature")
    page, has, end = [prompt, int(count), float(heat)], None, time.monotonic() + LATE
    while has != page:
        assert time.monotonic() < end, f"the page shows {page}, the kernel has {has}"
        has = told(notebook, "# what the kernel has", "explorer = SpeculationExplorer(")
    began = time.monotonic()
    notebook.push(notebook.cell.get_by_role("button", name="Generate", exact=True), by)
    return began


def generate(notebook: Notebook, count: int, by: str = "mouse") -> tuple[list[Box], list[Any], int]:
    """Push Generate; the new text's boxes, the parts of the status line, plain tokens a second.

    ``count`` must differ from the number of tokens that are there. AssertionError if that many
    tokens do not come, or if the speeds do not fit the time that it took.
    """
    began = push(notebook, by)
    expect(spans(notebook, 1)).to_have_count(count, timeout=PATIENCE)  # comes after the status
    seconds = time.monotonic() - began
    line = notebook.cell.get_by_text("tokens/s").inner_text()
    found = STATUS.match(line)
    assert found, line
    plain, drafting = int(found[5]), int(found[6])
    assert min(plain, drafting) > 0, line
    # Both were decoded after the push, and a rounded speed is at most half a token too high.
    assert count / (plain + 0.5) + count / (drafting + 0.5) < seconds, line
    play = 0.01 + 0.6 / plain + 0.6 / drafting
    assert float(found[7]) == pytest.approx(drafting / plain, rel=play), line
    return boxes(notebook, 1), [int(found[1]), int(found[2]), *found.group(3, 4, 8)], plain


def contrast(one: str, other: str) -> float:
    """How far apart two colours are in lightness alone: 1 to 21, as WCAG counts."""
    lights = []
    for colour in (one, other):
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05)
    return max(lights) / min(lights)


def expect_looks(notebook: Notebook) -> None:
    """One look for each fate, the one in the key; legible, and told apart without colour."""
    key, shown = boxes(notebook, 0), boxes(notebook, 1)
    assert [box.text for box in key] == list(LOOKS)
    for box in key:
        assert {other.style for other in shown if other.title == box.text} == {box.style}
        assert contrast(box.ink, box.paper) > 4.5, box
    for one, other in combinations(key, 2):
        line = one.border.split()[0] != other.border.split()[0]
        assert line or contrast(one.paper, other.paper) > 3, (one, other)


def test_speculation_explorer(
    notebook: Notebook, keep: Callable[..., None], model: Transformer, tokenizer: Tokenizer
) -> None:
    """Greedy as the plain decoders have it, then a sample, a refusal, and greedy again."""
    notebook.open(notebook.lab.write("speculation.ipynb", SOURCE, HAS))
    notebook.show("explorer = SpeculationExplorer(")
    keep(notebook, "-start")
    ids, count = tokenizer.encode(PROMPT).ids, int(notebook.readout("new tokens"))
    _, stats = speculative.generate(model, ids, count)
    began = time.monotonic()
    plain = tokenizer.decode(usual.generate(model, ids, count)[0, len(ids) :].tolist())
    pace = count / (time.monotonic() - began)
    assert set(stats.fates) == set(LOOKS.values()), "a prompt whose text has all three looks"
    assert "\n" in plain, "and more than one line"

    write(notebook, PROMPT)
    shown, said, speed = generate(notebook, count)
    assert speed < 20 * pace, "tokens a second; generate says how few are too few"
    assert fates(shown) == stats.fates
    assert text(shown) == plain
    steady = f"{stats.rate:.0%}", f"{stats.tokens_per_step:.2f}"
    assert said == [stats.accepted, stats.drafted, *steady, "the same text"]
    expect_looks(notebook)
    assert notebook.cut_off() == []
    keep(notebook, "-greedy")

    notebook.press("temperature", "ArrowRight", 10)
    assert float(notebook.readout("temperature")) == 1
    notebook.drag("new tokens", 0.2)
    fewer = int(notebook.readout("new tokens"))
    assert fewer < count
    sampled, said, _ = generate(notebook, fewer)
    assert text(sampled) != plain[: len(text(sampled))]
    made = fates(sampled)
    accepted, drafted = made.count("accepted"), len(made) - made.count("plain")
    assert (*said[:3], said[4]) == (
        accepted, drafted, f"{accepted / drafted:.0%}", "another sample of the same model",
    )  # fmt: skip
    keep(notebook, "-sampled")

    write(notebook, "")
    with pytest.raises(ValueError, match="at least one integer token") as refused:
        speculative.generate(model, [], fewer)
    push(notebook, "mouse")
    expect(notebook.cell).to_contain_text(f"Not possible: {refused.value}")
    expect(notebook.cell).not_to_contain_text("Traceback")
    assert boxes(notebook, 1) == sampled, "the last text stays"
    keep(notebook, "-refused")

    notebook.press("temperature", "Home")
    notebook.fill("new tokens", count)
    write(notebook, PROMPT)
    again, said, _ = generate(notebook, count, by="keyboard")
    assert (fates(again), text(again)) == (stats.fates, plain)
    assert said == [stats.accepted, stats.drafted, *steady, "the same text"]
    expect(notebook.cell).not_to_contain_text("Not possible")
