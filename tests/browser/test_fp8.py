"""The FP8 explorer in a real JupyterLab: bits are flipped, numbers typed, the format changed.

What the page must say is asked of the plain functions, in this process.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

pytest.importorskip("playwright", reason="playwright is not installed: no test in a browser")

from playwright.sync_api import Locator, expect

from dsv3_mini.fp8 import E4M3, E5M2
from dsv3_mini.viz.fp8_explorer import FIRST, code_figure, code_numbers, encode
from dsv3_mini.viz.style import png
from tests.browser.lab import chromium
from tests.browser.notebook import Notebook
from tests.browser.test_explorers import browser, keep, lab, notebook

__all__ = ["browser", "keep", "lab", "notebook"]  # fixtures

pytestmark = pytest.mark.skipif(
    chromium() is None, reason="no Chromium found; name one in the variable DSV3_CHROMIUM"
)

SOURCE = "from dsv3_mini.viz.fp8_explorer import Fp8Explorer\n\nFp8Explorer()"
WHERE = """
buttons => buttons.map(button => {
    const box = button.getBoundingClientRect();
    return [box.left, box.right, box.top]
})
"""


def bits(notebook: Notebook) -> Locator:
    """The eight buttons, from the sign to the last bit of the mantissa."""
    return notebook.cell.locator("button[title*=' bit']")


def expect_code(
    notebook: Notebook, code: int, dtype: torch.dtype = E4M3, scale: float = 1.0,
    number: float | None = None,
) -> None:  # fmt: skip
    """Buttons, table and picture are those of this code, nothing is refused or cut off."""
    notebook.expect_numbers(expected := code_numbers(code, dtype, scale, number))
    assert set(notebook.numbers()) == set(expected), "no row is left from before"
    notebook.expect_picture(png(code_figure(code, dtype, scale, number)))
    buttons = bits(notebook)
    expect(buttons).to_have_text(list(f"{code:08b}"))
    for place in range(8):
        pressed = buttons.nth(place)
        active = "mod-active" in (pressed.get_attribute("class") or "").split()
        assert active == bool(code >> (7 - place) & 1), f"bit {place}"
    expect(notebook.cell).not_to_contain_text("Not possible")
    assert notebook.cut_off() == []


def expect_groups(notebook: Notebook, *sizes: int) -> None:
    """All eight in one line, in order, with a gap only where sign, exponent, mantissa begin."""
    places = bits(notebook).evaluate_all(WHERE)
    assert len({round(top) for *_, top in places}) == 1
    gaps = [after[0] - before[1] for before, after in pairwise(places)]
    assert min(gaps) >= 0
    first, second = sizes[0] - 1, sizes[0] + sizes[1] - 1
    wide = [place for place, gap in enumerate(gaps) if gap > 2 * min(gaps) + 4]
    assert wide == [first, second], gaps
    names = bits(notebook).evaluate_all("all => all.map(each => each.title.split(' ')[0])")
    expected = [name for name, size in zip(("sign", "exponent", "mantissa"), sizes, strict=True)
                for _ in range(size)]  # fmt: skip
    assert names == expected


def test_fp8_explorer(notebook: Notebook, keep: Callable[..., None]) -> None:
    """Bits by mouse and by keyboard; numbers that fit, saturate, or are none; both formats."""
    notebook.open(notebook.lab.write("fp8.ipynb", SOURCE))
    notebook.show("Fp8Explorer()")
    code, buttons = FIRST, bits(notebook)
    expect_code(notebook, code)
    expect_groups(notebook, 1, 4, 3)
    keep(notebook, "-start")

    for place in (0, 2, 7):
        buttons.nth(place).click()
        code ^= 0x80 >> place
        expect_code(notebook, code)
    buttons.nth(0).focus()
    for place in range(8):
        expect(buttons.nth(place)).to_be_focused()
        if place != 6:
            notebook.page.keyboard.press("Space")
            code ^= 0x80 >> place
            expect_code(notebook, code)
        notebook.page.keyboard.press("Tab")
    while code != 0x7F:  # NaN has no value, and no place
        place = next(p for p in range(8) if (code ^ 0x7F) >> (7 - p) & 1)
        buttons.nth(place).click()
        code ^= 0x80 >> place
        expect_code(notebook, code)
    assert notebook.number("value") == "nan"
    keep(notebook, "-nan")

    for number in (3.3, 500.0, -0.001):
        notebook.fill("number", number)
        code = encode(number).code
        expect_code(notebook, code, number=number)
        keep(notebook, f"-{number}")
    shown = notebook.numbers(), notebook.picture_hash()
    for text, message in {
        "abc": "the number is 'abc'; expected a number",
        "nan": "the number is nan; expected a finite one",
        "inf": "the number is inf; expected a finite one",
    }.items():
        notebook.fill("number", text)
        expect(notebook.cell).to_contain_text(f"Not possible: {message}")
        expect(buttons).to_have_text(list(f"{code:08b}"))
        assert (notebook.numbers(), notebook.picture_hash()) == shown
        assert notebook.readout("number") == text
    keep(notebook, "-refused")
    notebook.fill("number", 2.9)
    expect_code(notebook, encode(2.9).code, number=2.9)
    notebook.fill("scale", 0)
    expect(notebook.cell).to_contain_text("Not possible: the scale is 0; expected a finite number")
    notebook.fill("scale", 0.01)
    code = encode(2.9, E4M3, 0.01).code
    expect_code(notebook, code, scale=0.01, number=2.9)

    notebook.choose("format", "E5M2", by="keyboard")
    expect_code(notebook, encode(2.9, E5M2, 0.01).code, E5M2, 0.01, 2.9)
    expect_groups(notebook, 1, 5, 2)
    keep(notebook, "-e5m2")
    notebook.fill("scale", 1)
    notebook.fill("number", 500)
    code = encode(500, E5M2).code
    expect_code(notebook, code, E5M2, number=500.0)
    assert "saturated" not in notebook.number("in words")
    notebook.push(buttons.nth(3), "mouse")
    code ^= 0x10
    expect_code(notebook, code, E5M2)
    assert notebook.readout("number") == "", "the bits were set by hand"
    notebook.choose("format", "E4M3", by="mouse")
    expect_code(notebook, code, E4M3)
    expect_groups(notebook, 1, 4, 3)
    expect(notebook.cell).not_to_contain_text("Traceback")
