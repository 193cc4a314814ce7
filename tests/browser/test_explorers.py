"""The explorers in a real JupyterLab: a control moves, and numbers and picture follow.

What the table must say is asked of the package, in this process; the browser talks to a kernel.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright", reason="playwright is not installed: no test in a browser")

from matplotlib.figure import Figure
from playwright.sync_api import Browser, expect, sync_playwright

from dsv3_mini.config import ConfigError, ModelConfig
from dsv3_mini.course.claims import claim
from dsv3_mini.viz import explorer as config_explorer
from dsv3_mini.viz.mla_explorer import MLAExplorer, cache_figure, cache_numbers
from dsv3_mini.viz.rope_explorer import RopeExplorer, rope_figure, rope_numbers
from dsv3_mini.viz.shell import Explorer
from dsv3_mini.viz.style import png
from dsv3_mini.viz.yarn_explorer import YarnExplorer, yarn_figure, yarn_numbers
from tests.browser.lab import QUIET, Lab, chromium, running_lab
from tests.browser.notebook import Notebook

pytestmark = pytest.mark.skipif(
    chromium() is None, reason="no Chromium found; name one in the variable DSV3_CHROMIUM"
)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with running_lab(tmp_path_factory.mktemp("lab")) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium(), args=QUIET)
        yield running
        running.close()


@pytest.fixture
def notebook(browser: Browser, lab: Lab) -> Iterator[Notebook]:
    """A page whose troubles, if any, fail the test at its end."""
    opened = Notebook(browser, lab)
    yield opened
    opened.close()


@pytest.fixture
def keep(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[[Notebook], None]:
    """Take a screenshot into $DSV3_SCREENSHOTS, named after the test."""
    folder = Path(os.environ.get("DSV3_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    name = request.node.name.removeprefix("test_").replace("[", "-").replace("]", "")

    def take(notebook: Notebook, suffix: str = "") -> None:
        notebook.screenshot(folder / f"{name}{suffix}.png")

    return take


# Name of the control; then a key and how often, 'drag' and how far (0 to 1), or 'type' and what.
Move = tuple[str, str, float]


@dataclass(frozen=True)
class Case:
    """An explorer, where a reader finds it, its plain functions, and what to do with it."""

    notebook: str
    explorer: type[Explorer]
    draw: Callable[..., Figure]
    numbers: Callable[..., dict[str, str]]
    moves: tuple[Move, ...]


CASES = [
    Case(
        "02_mla.ipynb", MLAExplorer, cache_figure, cache_numbers,
        (
            ("num_attention_heads", "type", 64),
            ("num_key_value_heads", "ArrowRight", 2),
            ("kv_lora_rank", "ArrowLeft", 3),
            ("q_lora_rank", "Home", 1),
            ("qk_nope_head_dim", "drag", 0.8),
            ("qk_rope_head_dim", "ArrowUp", 2),
            ("v_head_dim", "ArrowDown", 1),
            ("hidden_size", "drag", 0.3),
            ("num_hidden_layers", "drag", 0.1),
            ("context", "drag", 0.0),
            ("batch", "End", 1),
            ("dtype", "ArrowLeft", 1),
            ("num_key_value_heads", "End", 1),  # more than there are heads
            ("num_key_value_heads", "Home", 1),
        ),
    ),
    Case(
        "03_rope_decoupling.ipynb", RopeExplorer, rope_figure, rope_numbers,
        (
            ("query", "drag", 0.5),
            ("key", "ArrowRight", 3),
            ("pair", "type", 20),
            ("theta", "ArrowLeft", 2),
            ("width", "drag", 0.1),  # too narrow for pair 20
            ("pair", "Home", 1),
        ),
    ),
    Case(
        "03_rope_decoupling.ipynb", YarnExplorer, yarn_figure, yarn_numbers,
        (
            ("factor", "drag", 0.2),
            ("original", "ArrowRight", 1),
            ("beta_fast", "ArrowLeft", 4),
            ("beta_slow", "ArrowUp", 2),
            ("mscale", "drag", 0.25),
            ("width", "ArrowRight", 3),
            ("theta", "End", 1),
            ("head_width", "Home", 1),  # too narrow for the rotary part
            ("head_width", "type", 256),
        ),
    ),
]  # fmt: skip


def make_move(notebook: Notebook, control: Any, move: Move) -> Any:
    """Move it in the browser; the value that it must have then, with some play for a drag."""
    _, how, amount = move
    label, named = control.description, dict(getattr(control, "options", ()))
    if named:
        low, high, step, position = 0, len(named) - 1, 1, control.index
    else:
        low, high, step, position = control.min, control.max, control.step, control.value
    if how == "type":
        notebook.fill(label, amount)
        wanted = amount
    elif how == "drag":
        notebook.drag(label, amount)
        wanted = low + amount * (high - low)
    else:
        notebook.press(label, how, int(amount))
        ends = {"Home": low, "End": high}
        forward = 1 if how in ("ArrowRight", "ArrowUp") else -1
        wanted = ends.get(how, position + forward * amount * step)
    text = notebook.readout(label)
    now = list(named).index(text) if named else float(text.replace(",", ""))
    play = max(step, 0.03 * (high - low)) if how == "drag" else 1e-9  # a pixel may be many steps
    assert abs(now - wanted) <= play, f"{label}: {text} after {move}"
    assert now != position, f"{label} has not moved: {text} after {move}"
    return named[text] if named else type(control.value)(now)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.explorer.__name__)
def test_explorer(case: Case, notebook: Notebook, keep: Callable[..., None]) -> None:
    """Each control moves, and numbers and picture are then those of the plain functions."""
    name = case.explorer.__name__
    source = f"from {case.explorer.__module__} import {name}\n\n{name}()"
    notebook.open(notebook.lab.write(f"{name}.ipynb", source))
    notebook.show(f"{name}()")
    controls = case.explorer().controls
    values = good = {name: control.value for name, control in controls.items()}
    assert {move[0] for move in case.moves} == set(values), "moves for all controls"
    keep(notebook, "-start")
    refusals = 0
    for number, move in enumerate([None, *case.moves]):
        if move:
            value = make_move(notebook, controls[move[0]], move)
            controls[move[0]].value = value
            values = values | {move[0]: value}
        try:
            case.numbers(**values)
        except ValueError as error:
            expect(notebook.cell).to_contain_text(f"Not possible: {error}")
            refusals += 1
            keep(notebook, "-refused")
        else:
            good = values
            expect(notebook.cell).not_to_contain_text("Not possible")
        notebook.expect_numbers(case.numbers(**good))
        notebook.expect_picture(png(case.draw(**good)))
        assert notebook.cut_off() == [], f"after move {number}"
    assert refusals, "one move asks for the impossible"
    keep(notebook)


@pytest.mark.parametrize("name", sorted({c.notebook for c in CASES}))
def test_the_notebook_s_own_cells_work_in_the_browser(
    name: str, notebook: Notebook, keep: Callable[..., None]
) -> None:
    """One move of each explorer, and a vote, with the cells that the reader finds."""
    marks = ("Vote(", *(f"{c.explorer.__name__}()" for c in CASES if c.notebook == name))
    notebook.open(notebook.lab.part(name, marks))
    notebook.show("Vote(")
    expect(notebook.cell.get_by_role("button", name="imprecise").first).to_be_visible()
    for number, case in enumerate(case for case in CASES if case.notebook == name):
        notebook.show(f"{case.explorer.__name__}(")
        controls = case.explorer().controls
        values = {name: control.value for name, control in controls.items()}
        notebook.expect_numbers(case.numbers(**values))
        first = case.moves[0]
        values[first[0]] = make_move(notebook, controls[first[0]], first)
        notebook.expect_numbers(case.numbers(**values))
        notebook.expect_picture(png(case.draw(**values)))
        keep(notebook, f"-{number}")


def totals(config: ModelConfig) -> dict[str, str]:
    return {name: f"{value:,}" for name, value in config_explorer.summary(config).items()}


def expect_config(notebook: Notebook, config: ModelConfig) -> None:
    notebook.expect_numbers(totals(config))
    notebook.expect_picture(png(config_explorer.breakdown(config)))
    assert notebook.cut_off() == []


def test_config_explorer(notebook: Notebook, keep: Callable[..., None]) -> None:
    v3, mini = ModelConfig.v3(), ModelConfig.mini()
    notebook.open("00_start_here.ipynb")
    notebook.show("explorer = ConfigExplorer(v3)")
    expect_config(notebook, v3)
    keep(notebook, "-start")
    notebook.fill("num_hidden_layers", 30)
    expect_config(notebook, v3.replace(num_hidden_layers=30))
    assert totals(v3) != totals(v3.replace(num_hidden_layers=30))

    notebook.choose("start from", "mini", by="keyboard")
    expect_config(notebook, mini)
    assert notebook.readout("num_hidden_layers") == str(mini.num_hidden_layers)
    notebook.choose("start from", "tiny", by="mouse")
    expect_config(notebook, ModelConfig.tiny())
    notebook.choose("start from", "V3 (671B)", by="keyboard")
    expect_config(notebook, v3)

    notebook.tab("attention")
    keep(notebook, "-attention")
    assert notebook.cut_off() == []
    notebook.choose("attention", "gqa", by="keyboard")
    expect_config(notebook, v3.replace(attention="gqa"))
    notebook.choose("attention", "mla", by="mouse")

    notebook.tab("experts")
    with pytest.raises(ConfigError) as refused:
        v3.replace(topk_group=v3.n_group + 1)
    notebook.fill("topk_group", v3.n_group + 1)
    expect(notebook.cell).to_contain_text(f"Not possible: {refused.value}")
    expect_config(notebook, v3)
    keep(notebook, "-refused")
    notebook.press("topk_group", "ArrowDown")
    expect(notebook.cell).not_to_contain_text("Not possible")
    expect_config(notebook, v3.replace(topk_group=v3.n_group))


def test_vote(notebook: Notebook, keep: Callable[..., None]) -> None:
    make = "from dsv3_mini.course.vote import Vote\n\nvote = Vote(4, 5, 6)\nvote"
    notebook.open(notebook.lab.write("vote.ipynb", make, "vote.settle()"))
    verdict = claim(4).verdict.upper()
    assert f"4 {verdict}" in (silent := notebook.run("vote.settle()"))
    assert "you said" not in silent

    notebook.show("vote = Vote(4, 5, 6)")
    button = {
        name: notebook.cell.get_by_title(name) for name in ("claim 4: wrong", "claim 6: correct")
    }
    notebook.push(button["claim 4: wrong"], "keyboard")
    notebook.push(button["claim 6: correct"], "mouse")
    for each in button.values():
        expect(each).to_contain_class("mod-active")
    assert notebook.cut_off() == []
    keep(notebook)
    said = notebook.run("vote.settle()").split("you said: ")
    assert [answer.split()[0] for answer in said[1:]] == ["wrong", "correct"]


def test_troubles_are_noticed(browser: Browser, lab: Lab) -> None:
    """Or the silence of the other tests would prove nothing."""
    far = "from IPython.display import HTML\n\nHTML('<img src=\"http://far.invalid/x.png\">')"
    notebook = Notebook(browser, lab)
    with pytest.raises(AssertionError, match="ValueError: on purpose"):
        notebook.open(lab.write("bad.ipynb", far, "raise ValueError('on purpose')"))
    expect(notebook.page.locator("img[src*=far]")).to_be_attached()
    with pytest.raises(AssertionError, match="request that leaves this machine: http://far"):
        notebook.close()
