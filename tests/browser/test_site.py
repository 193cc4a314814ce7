"""The site as a reader meets it: every page, wide and narrow, light and dark, with every link.

Built once from this tree. Of the pages of Python source, all alike, one in ten is opened, and axe,
which takes a second a page, looks at one of them only; and at the colours of code on three pages,
since they are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("playwright", reason="playwright is not installed: no test in a browser")

from axe_playwright_python.base import AXE_SCRIPT  # type: ignore[import-untyped,unused-ignore]
from playwright.sync_api import Browser, Page, ViewportSize, expect

from tests.browser.lab import chromium
from tests.browser.pages import References, broken, build, served, watch
from tests.browser.test_explorers import browser

__all__ = ["browser"]  # a fixture

pytestmark = pytest.mark.skipif(
    chromium() is None, reason="no Chromium found; name one in the variable DSV3_CHROMIUM"
)

SOURCES = ("dsv3_mini", "tests")
CODE_TOO = ("notebooks/03_rope_decoupling.html", "dsv3_mini/mla.html", "README.html")
SMALL: ViewportSize = {"width": 390, "height": 844}
WIDE: ViewportSize = {"width": 1280, "height": 900}
AXE = """([rules, exclude]) => axe.run({exclude}, {resultTypes: ["violations"], ...rules}).then(
    found => found.violations.filter(each => ["serious", "critical"].includes(each.impact)).map(
        each => `${each.id}: ${each.nodes.map(node => node.html.slice(0, 200)).slice(0, 3)}`))"""
MEGABYTES = 40


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory, "site")


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    with served(site) as running:
        yield running


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page whose troubles fail the test at its end."""
    opened = browser.new_page(viewport=WIDE)
    troubles = watch(opened)
    yield opened
    opened.close()
    assert not troubles, "\n".join(troubles)


def names(site: Path) -> list[str]:
    every = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html"))
    return [name for name in every if name != "index.html"]  # it only leads on


def test_links_figures_and_size(site: Path) -> None:
    """No link leads nowhere, every image has its alt text, nothing is missing, all is small."""
    assert broken(site) == []
    written = {path.stem for path in (site / "notebooks").glob("*.html")}
    notebooks = {path.stem for path in Path("notebooks").glob("*.ipynb")}
    assert written == notebooks
    bare = {name: References(site / name).without_alt for name in names(site)}
    assert not {name: images for name, images in bare.items() if images}
    size = sum(path.stat().st_size for path in site.rglob("*") if path.is_file())
    assert size < MEGABYTES * 1e6, f"{size / 1e6:.0f} MB"


def test_every_page(site: Path, address: str, page: Page) -> None:
    """Opens them; axe finds nothing serious, and a phone does not scroll sideways."""
    wrong = []
    for number, name in enumerate(names(site)):
        source = name.startswith(SOURCES) and name not in CODE_TOO
        if source and number % 10:
            continue
        page.goto(f"{address}/{name}")
        if source:
            continue
        page.evaluate(AXE_SCRIPT)
        exclude = [] if name in CODE_TOO else [[".highlight"]]
        for scheme, rules in (("light", {}), ("dark", {"runOnly": ["color-contrast"]})):
            page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
            wrong += [f"{name}, {scheme}: {v}" for v in page.evaluate(AXE, [rules, exclude])]
        page.emulate_media(color_scheme="light")
        page.set_viewport_size(SMALL)
        width = page.evaluate("document.documentElement.scrollWidth")
        wrong += [f"{name}: {width} pixels wide on a phone"] * (width > SMALL["width"])
        page.set_viewport_size(WIDE)
    assert not wrong, "\n".join(wrong)


def test_start_and_search(address: str, page: Page) -> None:
    """The bare address leads to the start page; a search by keyboard finds its notebook."""
    page.goto(f"{address}/index.html")
    page.wait_for_url("**/docs/index.html")
    field = page.get_by_role("textbox", name="Search")
    field.fill("decoupled")
    field.press("Enter")
    found = page.locator("#search-results li a")
    expect(found.filter(has_text="rotary key stands apart").first).to_be_visible()


def test_an_explorer(browser: Browser, address: str, page: Page) -> None:
    """Arrow keys move it: value, picture and numbers follow. Without JavaScript it stands still."""
    url = f"{address}/notebooks/03_rope_decoupling.html"
    page.goto(url)
    explorer = page.locator(".explorer").first
    slider, shown = explorer.get_by_role("slider"), explorer.locator(".state:visible")
    expect(slider).to_have_accessible_name("position n of the key")
    seen = []
    for key, value in (("Home", "0"), ("ArrowRight", "2"), ("End", "200")):
        slider.press(key)
        expect(explorer.get_by_role("status")).to_have_text(value)
        expect(slider).to_have_attribute("aria-valuetext", value)
        expect(shown).to_have_count(1)
        expect(shown.get_by_role("row").first).to_have_text(f"distance m - n{12 - int(value)}")
        image = shown.get_by_role("img")
        page.wait_for_function(
            "image => image.complete && image.naturalWidth", arg=image.element_handle()
        )
        seen.append(image.get_attribute("src"))
    assert len(set(seen)) == 3

    still = browser.new_context(java_script_enabled=False).new_page()
    still.goto(url)
    first = still.locator(".explorer").first
    expect(first.locator(".state:visible")).to_have_count(1)
    expect(first.locator(".state:visible")).to_have_attribute("data-value", "5")
    expect(first.get_by_role("slider")).to_have_count(0)
    still.context.close()


def test_formulas(tmp_path_factory: pytest.TempPathFactory, page: Page) -> None:
    """In $ and in ```math they are set by the MathJax beside the page; prices stay prices."""
    source = tmp_path_factory.mktemp("formulas")
    (source / "docs").mkdir()
    text = "# Formulas\n\nHere $c_t = W h_t$, at $5 or $6.\n\n```math\n\\sqrt{d_h + d_h^R}\n```\n"
    (source / "docs" / "index.md").write_text(text)
    options = ("-d", str(source / "doctrees"))
    with served(build(tmp_path_factory, "formulas-site", *options, source=source)) as address:
        page.goto(f"{address}/docs/index.html")
        expect(page.locator("mjx-container")).to_have_count(2)
        expect(page.locator("mjx-sqrt")).to_be_visible()
        expect(page.locator("article")).to_contain_text("at $5 or $6.")
        expect(page.locator("mjx-merror")).to_have_count(0)
