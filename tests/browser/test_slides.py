"""The decks in a browser: stepped through by key, nothing cut off, results after the question."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("playwright", reason="playwright is not installed: no test in a browser")

from playwright.sync_api import Browser, expect

from tests.browser.lab import chromium
from tests.browser.pages import broken, build, served, watch
from tests.browser.test_explorers import browser

__all__ = ["browser"]  # a fixture

pytestmark = pytest.mark.skipif(
    chromium() is None, reason="no Chromium found; name one in the variable DSV3_CHROMIUM"
)

# The slide on show: its heading, whether it asks, whether it has a result, and what is wrong.
NOW = """() => {
    const slide = document.querySelector(".slide.now"), box = slide.getBoundingClientRect();
    const inside = [...slide.querySelectorAll("*")].filter(e => e.getClientRects().length);
    const out = inside.filter(e => e.getBoundingClientRect().right > box.right + 1);
    return {
        heading: slide.querySelector("h1, h2").textContent,
        asks: slide.querySelector(".predict") !== null,
        result: slide.querySelector(".cell_output") !== null,
        size: parseFloat(slide.style.fontSize),
        scrolls: slide.scrollHeight > slide.clientHeight,
        visible: document.querySelectorAll(".slide.now").length === 1 && box.width > 100,
        out: out.map(e => e.outerHTML.slice(0, 120)),
    }
}"""


@pytest.fixture(scope="module")
def decks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory, "slides", "-b", "slides")


@pytest.fixture(scope="module")
def address(decks: Path) -> Iterator[str]:
    with served(decks) as running:
        yield running


def test_every_deck(browser: Browser, decks: Path, address: str) -> None:
    """All slides of all notebooks: one at a time, with a heading, inside the stage."""
    assert broken(decks) == []
    names = sorted(path.name.split("_")[0] for path in Path("notebooks").glob("*.ipynb"))
    assert sorted(path.stem for path in decks.glob("*.html")) == sorted([*names, "index"])
    page = browser.new_page(viewport={"width": 1280, "height": 720})
    troubles, wrong = watch(page), []
    for name in names:
        page.goto(f"{address}/{name}.html")
        expect(page.get_by_role("status")).to_contain_text("1 / ")
        count = page.locator(".slide").count()
        assert count >= 10, name
        seen = []
        for number in range(1, count + 1):
            seen.append(now := page.evaluate(NOW))
            where = f"{name}, slide {number}, {now['heading']!r}"
            if not now["visible"] or not now["heading"] or now["out"]:
                wrong.append(f"{where}: {now}")
            if now["scrolls"] and now["size"] > 11:
                wrong.append(f"{where} scrolls, at {now['size']} pixels")
            page.keyboard.press("ArrowRight")
        wrong += [f"{name}: a question and its result on one slide: {now['heading']}"
                  for now in seen if now["asks"] and now["result"]]  # fmt: skip
        assert sum(now["scrolls"] for now in seen) <= 1, f"{name}: too full"
        expect(page.get_by_role("status")).to_have_text(f" {count} / {count} ")
    page.close()
    assert not wrong + troubles, "\n".join(wrong + troubles)


def test_keys_buttons_and_address(browser: Browser, address: str) -> None:
    """Forth and back by key and by button; the address names the slide; a slider keeps its keys."""
    page = browser.new_page(viewport={"width": 1920, "height": 1080})
    troubles, status = watch(page), page.get_by_role("status")
    page.goto(f"{address}/03.html#4")
    count = page.locator(".slide").count()
    expect(status).to_have_text(f" 4 / {count} ")
    for key, number in (("Space", 5), ("PageUp", 4), ("End", count), ("Home", 1), ("ArrowLeft", 1)):
        page.keyboard.press(key)
        expect(status).to_have_text(f" {number} / {count} ")
    page.get_by_role("button", name="Next slide").click()
    assert page.url.endswith("#2")
    for _ in range(count):
        if page.locator(".slide.now .explorer").count():
            break
        page.keyboard.press("ArrowRight")
    before, slider = page.url, page.locator(".slide.now").get_by_role("slider")
    slider.press("End")
    expect(page.locator(".slide.now .explorer output")).to_have_text("200")
    assert page.url == before
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.close()
    assert not troubles, "\n".join(troubles)


def test_on_paper(browser: Browser, address: str) -> None:
    """Printing gives every slide a page of its own."""
    page = browser.new_page(viewport={"width": 1280, "height": 720})
    page.goto(f"{address}/05b.html")
    paper = page.pdf(prefer_css_page_size=True)
    assert paper.count(b"/Type /Page\n") == page.locator(".slide").count()
    page.close()
