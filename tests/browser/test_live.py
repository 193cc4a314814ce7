"""What moves in notebooks 04 and 05: a sentence that is routed, and a run that obeys its controls.

The trained model lives in the kernel. So what the page must say is asked of the kernel too, by a
cell of the test's own, which calls the plain functions and prints what they give.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

pytest.importorskip("playwright", reason="playwright is not installed: no test in a browser")

from playwright.sync_api import Locator, expect

from tests.browser.lab import chromium
from tests.browser.notebook import Notebook
from tests.browser.test_explorers import browser, keep, lab, notebook

__all__ = ["browser", "keep", "lab", "notebook"]  # fixtures

pytestmark = pytest.mark.skipif(
    chromium() is None, reason="no Chromium found; name one in the variable DSV3_CHROMIUM"
)

LATE = 60  # seconds that training may take to get somewhere, on a busy machine
PROMPT = 3  # seconds within which a control answers while the model trains
FRAMES = 4  # pictures a second while it trains; half of what LiveBalance is asked for
STEP = re.compile(r"(\w+), step ([\d,]+) of")

LIVE = """
import torch

from dsv3_mini import Transformer
from dsv3_mini.course.experts import small_moe
from dsv3_mini.data import load_corpus
from dsv3_mini.train import TrainConfig
from dsv3_mini.viz.live_balance import LiveBalance, LiveRun

torch.manual_seed(0)
plan = {"steps": 100, "batch_size": 8, "seq_len": 64, "learning_rate": 5e-3, "final_ratio": 1.0}
settings = TrainConfig(gamma=0.01, **plan)
run = LiveRun(Transformer(small_moe()), load_corpus(), settings, total=3000, mode="off")
live = LiveBalance(run, max_frames=3000)
live
"""
RUN = """
import json  # the run

print(json.dumps([run.phase, run.step, run.mode, f"{run.gamma:.4f}", run.domain]))
"""
SCRIPTED = "print(summary(run.records[-1]))  # the scripted run"
ROUTED = """
import hashlib  # the explorer
import json

from dsv3_mini.viz.style import png

at = routing_explorer.values
again = routing.token_routing(model, tokenizer, at["text"], at["layer"])
picture = png(routing.routing_figure(again, at["token"]))
numbers = routing.routing_numbers(again, at["token"])
digest = hashlib.sha256(picture).hexdigest()
print(json.dumps([at, routing_explorer.shown, numbers, digest]))
"""
COUNT = """
async node => {
    let count = 0, last = null;
    const seen = new MutationObserver(() => {
        const label = node.querySelector('svg[role=img]')?.getAttribute('aria-label');
        if (label && label !== last) { count += 1; last = label }
    });
    const began = performance.now();
    seen.observe(node, {childList: true, subtree: true});
    await new Promise(done => setTimeout(done, 3000));
    seen.disconnect();
    return 1000 * count / (performance.now() - began)
}
"""


def status(notebook: Notebook) -> tuple[str, int]:
    """The phase and the step that the status line tells."""
    found = STEP.search(notebook.cell.inner_text())
    assert found, notebook.cell.inner_text()
    return found[1], int(found[2].replace(",", ""))


def words(notebook: Notebook) -> str:
    """The picture's text alternative."""
    return notebook.cell.locator("svg[role=img]").get_attribute("aria-label") or ""


def violations(notebook: Notebook) -> list[float]:
    """MaxVio of each layer, as the picture's text alternative says."""
    return [float(value) for value in re.findall(r"MaxVio (\d+\.\d+)", words(notebook))]


def button(notebook: Notebook, name: str) -> Locator:
    return notebook.cell.get_by_role("button", name=name, exact=True)


def phase(notebook: Notebook, name: str) -> Callable[[], bool]:
    return lambda: status(notebook)[0] == name


def shows(notebook: Notebook, text: str) -> Callable[[], bool]:
    return lambda: notebook.cell.get_by_text(text).count() > 0


def until(condition: Callable[[], object], notebook: Notebook, what: str) -> None:
    """Wait for it. AssertionError with the status if that takes long."""
    end = time.monotonic() + LATE
    while not condition():
        assert time.monotonic() < end, f"{what}: not after {LATE} s; {status(notebook)}"
        notebook.page.wait_for_timeout(20)


def answer(
    act: Callable[[], object], condition: Callable[[], object], notebook: Notebook, what: str
) -> None:
    """Act, wait for what the page must show then, and see that it came promptly."""
    began = time.monotonic()
    act()
    until(condition, notebook, what)
    seconds = time.monotonic() - began
    print(f"{what}: answered after {seconds:.2f} s")
    assert seconds < PROMPT, f"{what}: answered after {seconds:.2f} s"


def goes_on(notebook: Notebook, steps: int = 5) -> None:
    """It is running, and both the status and the picture get further."""
    (name, here), picture = status(notebook), words(notebook)
    assert name == "running"
    until(lambda: status(notebook)[1] >= here + steps, notebook, f"{steps} more steps")
    until(lambda: words(notebook) != picture, notebook, "another picture")


def stands_still(notebook: Notebook, name: str) -> None:
    """It is in this phase, with a picture of its last step, and for a second nothing changes."""
    now, step = status(notebook)
    assert now == name
    last = f"at step {step:,}."  # the picture comes just after the status
    until(lambda: last in words(notebook), notebook, f"the picture {last}")
    picture = words(notebook)
    notebook.page.wait_for_timeout(1000)
    assert (status(notebook), words(notebook)) == ((name, step), picture)


def told(notebook: Notebook, probe: str, back: str) -> Any:
    """What a cell of the test's own prints, as JSON; then back to the cell with ``back``."""
    printed = notebook.run(probe)
    notebook.show(back)
    return json.loads(printed)


def test_the_reader_holds_the_controls(notebook: Notebook, keep: Callable[..., None]) -> None:
    """Collapse, balance, other text, pause and stop; each control answers while it trains."""
    notebook.open(notebook.lab.write("live.ipynb", LIVE, RUN))
    notebook.show("live = LiveBalance(")
    gamma = notebook.control("gamma").locator(".noUi-target")
    assert (status(notebook), words(notebook)) == (("ready", 0), "No training step yet.")
    expect(button(notebook, "Stop")).to_be_disabled()
    expect(gamma).to_have_attribute("disabled", "true")  # 'off' has no use for it

    start, stop = button(notebook, "Start"), button(notebook, "Stop")
    answer(lambda: notebook.push(start), phase(notebook, "running"), notebook, "Start")
    goes_on(notebook)
    expect(stop).to_be_enabled()
    until(lambda: max(violations(notebook), default=0) > 2, notebook, "a collapse")
    collapsed = notebook.cell.locator("svg[role=img]").evaluate("svg => svg.outerHTML")
    rates = [notebook.cell.evaluate(COUNT)]
    keep(notebook, "-collapsed")

    chosen = shows(notebook, "balance by bias since")
    answer(lambda: notebook.choose("balance by", "bias"), chosen, notebook, "the mode")
    since = status(notebook)[1]
    expect(gamma).not_to_have_attribute("disabled", "true")
    # The picture's own word for it: it comes from the step that used the new value.
    moved = shows(notebook, "gamma 0.016")
    answer(lambda: notebook.press("gamma", "ArrowRight", 2), moved, notebook, "gamma")
    assert notebook.readout("gamma") == "0.0158"
    name, step, *controls = told(notebook, "# the run", "live = LiveBalance(")
    assert (name, controls) == ("running", ["bias", "0.0158", None])
    assert step > since
    until(lambda: max(violations(notebook)) < 1, notebook, "balance")
    assert notebook.cell.locator("svg[role=img]").evaluate("svg => svg.outerHTML") != collapsed
    goes_on(notebook)
    keep(notebook, "-balanced")
    rates.append(notebook.cell.evaluate(COUNT))

    for now, then in (("text: all", "text: python"), ("text: python", "text: prose")):
        domain = button(notebook, now)
        answer(partial(notebook.push, domain), shows(notebook, then), notebook, then)
    goes_on(notebook)
    assert notebook.cut_off() == []
    keep(notebook, "-shifted")

    pause, resume = button(notebook, "Pause"), button(notebook, "Resume")
    answer(lambda: notebook.push(pause), phase(notebook, "paused"), notebook, "Pause")
    stands_still(notebook, "paused")
    answer(resume.click, phase(notebook, "running"), notebook, "Resume")
    goes_on(notebook)
    answer(lambda: notebook.push(stop), phase(notebook, "ended"), notebook, "Stop")
    expect(stop).to_be_disabled()
    expect(button(notebook, "Go on")).to_be_enabled()
    stands_still(notebook, "ended")
    last = told(notebook, "# the run", "live = LiveBalance(")
    assert last == ["ended", status(notebook)[1], "bias", "0.0158", "prose"]
    print("pictures a second:", ", ".join(f"{rate:.1f}" for rate in rates))
    assert min(rates) >= FRAMES, f"pictures a second while it trains: {rates}"


def test_notebook_05_ends_with_a_picture_and_a_run_to_start(
    notebook: Notebook, keep: Callable[..., None]
) -> None:
    """The scripted run's last picture is on the page; the reader's run waits, and can be had."""
    marks = ("plan = {", "live = LiveBalance(", "live.picture()")
    notebook.open(notebook.lab.part("05_load_balancing.ipynb", marks, SCRIPTED))
    said = notebook.run("# the scripted run").strip()
    notebook.show("live = LiveBalance(run)")
    assert status(notebook) == ("ended", 240)
    assert words(notebook) == said
    assert "at step 240" in said
    expect(button(notebook, "Stop")).to_be_disabled()
    keep(notebook, "-scripted")
    notebook.show("live.picture()")
    expect(notebook.cell.locator("img")).to_be_visible()

    notebook.show("your_live = LiveBalance(")
    assert (status(notebook), words(notebook)) == (("ready", 0), "No training step yet.")
    assert notebook.cut_off() == []
    notebook.push(button(notebook, "Start"))
    until(phase(notebook, "running"), notebook, "the start")
    goes_on(notebook)
    notebook.push(button(notebook, "Stop"))
    until(phase(notebook, "ended"), notebook, "the end")
    keep(notebook, "-yours")


def expect_routing(notebook: Notebook, seen: str, **values: object) -> str:
    """Page and kernel agree on what is shown for these values; the new picture's hash."""
    token = f"{values['token']}: "
    until(lambda: notebook.number("token").startswith(token), notebook, token)
    until(lambda: notebook.number("shown").startswith(f"layer {values['layer']}"), notebook, token)
    until(lambda: notebook.picture_hash() != seen, notebook, "another picture")
    assert notebook.readout("token") == notebook.number("token")
    at, shown, plain, digest = told(notebook, "# the explorer", "RoutingExplorer(")
    assert at == values
    assert shown == plain
    notebook.expect_numbers(plain)
    assert len(notebook.numbers()) == len(plain)
    assert notebook.picture_hash() == digest
    assert notebook.cut_off() == []
    return digest


def test_a_sentence_of_ones_own_is_routed(notebook: Notebook, keep: Callable[..., None]) -> None:
    """Notebook 04: layer and token by keyboard, another text, and an empty one."""
    marks = ("train(model, corpus", "import routing_explorer", "RoutingExplorer(")
    notebook.open(notebook.lab.part("04_deepseek_moe.ipynb", marks, ROUTED))
    first, *_ = told(notebook, "# the explorer", "RoutingExplorer(")
    seen = expect_routing(notebook, "", **first)
    keep(notebook, "-start")
    notebook.press("layer", "ArrowRight", 2)
    notebook.press("token", "ArrowRight", 4)
    values = first | {"layer": 3, "token": first["token"] + 4}
    seen = expect_routing(notebook, seen, **values)
    keep(notebook, "-moved")

    text = "Is x < y & z?"
    notebook.fill("text", text)
    seen = expect_routing(notebook, seen, **values | {"text": text})
    keep(notebook, "-typed")
    rows = notebook.numbers()
    notebook.fill("text", "")
    expect(notebook.cell).to_contain_text("Not possible: the text '' has no tokens")
    assert (notebook.numbers(), notebook.picture_hash()) == (rows, seen)
    keep(notebook, "-refused")
    notebook.fill("text", "Yes")  # fewer tokens than the slider stood at
    expect(notebook.cell).not_to_contain_text("Not possible")
    last = int(notebook.readout("token").split(":")[0])
    assert last < values["token"]
    expect_routing(notebook, seen, text="Yes", layer=3, token=last)
