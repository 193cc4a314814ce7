"""FP8 pictures and explorer: every code against bit arithmetic written anew, and what is drawn."""

from __future__ import annotations

import math
import re
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from dsv3_mini import ModelConfig, Transformer
from dsv3_mini.course.fp8_formats import formats
from dsv3_mini.fp8 import E4M3, E5M2, TENSOR, Recipe, convert_to_fp8, quantize
from dsv3_mini.viz import fp8_explorer
from dsv3_mini.viz.fp8 import (
    WIDEST,
    code_values,
    format_picture,
    format_text,
    layer_formats,
    layout,
    number_line,
    place_figure,
    plain,
)
from dsv3_mini.viz.fp8_explorer import Fp8Explorer, code_figure, code_numbers, decode, encode
from dsv3_mini.viz.style import png

BOTH = pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=["E4M3", "E5M2"])
# Bits of exponent and mantissa, bias, largest number: from the definition of OCP OFP8.
KNOWN = {E4M3: (4, 3, 7, 448.0), E5M2: (5, 2, 15, 57344.0)}


def by_hand(code: int, dtype: torch.dtype) -> float:
    """What the definition of the format says about a code."""
    bits, width, bias, _ = KNOWN[dtype]
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code & 0x7F) >> width, code & ((1 << width) - 1)
    full, last = exponent == 2**bits - 1, mantissa == 2**width - 1
    if dtype == E4M3 and full and last:
        return math.nan
    if dtype == E5M2 and full:
        return math.nan if mantissa else sign * math.inf
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - width)
    return sign * (2**width + mantissa) * 2.0 ** (exponent - bias - width)


def finite(dtype: torch.dtype) -> list[float]:
    """All finite numbers of the format in order, zero once."""
    values = (by_hand(code, dtype) for code in range(256))
    return sorted({value for value in values if math.isfinite(value)})


def nearest(number: float, dtype: torch.dtype) -> int:
    """The code that a search over all of them finds; of two the even one."""
    side = 0x80 if math.copysign(1, number) < 0 else 0
    codes = [code for code in range(128) if math.isfinite(by_hand(code, dtype))]
    return side + min(codes, key=lambda code: (abs(abs(number) - by_hand(code, dtype)), code % 2))


def readable(figure: Figure) -> None:
    """Texts of 9 points or more, none on another, none cut off at the edge."""
    png(figure)
    renderer: Any = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    boxes: list[tuple[str, Any]] = []
    for axes in figure.axes:
        texts = [*axes.texts, axes.title]
        if axes.axison:
            texts += [*axes.get_xticklabels(), *axes.get_yticklabels(), axes.xaxis.label]
        for text in (text for text in texts if text.get_text().strip()):
            assert text.get_fontsize() >= 9, text.get_text()
            box = text.get_window_extent(renderer)
            assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1, text.get_text()
            assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1, text.get_text()
            boxes.append((text.get_text(), box))
    for index, (name, box) in enumerate(boxes):
        for other, there in boxes[:index]:
            assert not box.overlaps(there), (name, other)


def marks(figure: Figure, axes: int, collection: int = 0) -> list[float]:
    """Where the ticks of the number line stand."""
    segments: Any = figure.axes[axes].collections[collection]
    return [float(segment[0][0]) for segment in segments.get_segments()]


# --------------------------------------------------------------------------------- decode, encode


@BOTH
def test_layouts_and_values_are_the_definitions(dtype: torch.dtype) -> None:
    bits, width, bias, largest = KNOWN[dtype]
    assert layout(dtype)[1:] == (bits, width, bias)
    values = code_values(dtype).tolist()
    np.testing.assert_array_equal(values, [by_hand(code, dtype) for code in range(256)])
    assert max(finite(dtype)) == largest


@BOTH
def test_every_code_is_taken_apart(dtype: torch.dtype) -> None:
    bits, width, _, _ = KNOWN[dtype]
    line, kinds = finite(dtype), Counter[str]()
    for code in range(256):
        at, value = decode(code, dtype), by_hand(code, dtype)
        digits = f"{code:08b}"
        assert at.bits == f"{digits[0]} {digits[1 : 1 + bits]} {digits[1 + bits :]}"
        assert [f"{part:b}".zfill(size) for part, size in
                zip((at.sign, at.exponent, at.mantissa), (1, bits, width), strict=True)
                ] == at.bits.split()  # fmt: skip
        kinds[at.kind] += 1
        if not math.isfinite(value):
            assert at.kind == ("NaN" if math.isnan(value) else "infinity")
            assert (at.below, at.above, at.step) == (None, None, None)
            assert at.formula.endswith("NaN" if math.isnan(value) else f"{value:+}inity")
            continue
        assert (at.value, math.copysign(1, at.value)) == (value, math.copysign(1, value))
        place = line.index(value)
        assert at.below == (line[place - 1] if place else None)
        assert at.above == (line[place + 1] if place + 1 < len(line) else None)
        assert at.step is not None
        outwards = at.below if value < 0 else at.above
        if outwards is not None:
            assert at.step == abs(outwards - value)
        left, _, right = at.formula.partition(" = ")
        assert eval(left.replace(" x ", " * ").replace("^", "**")) == value == float(right)
    _, _, bias, _ = KNOWN[dtype]
    not_numbers = {"NaN": 2} if dtype == E4M3 else {"NaN": 6, "infinity": 2}
    subnormal = 2 * (2**width - 1)
    normal = 256 - 2 - subnormal - sum(not_numbers.values())
    assert kinds == {"zero": 2, "subnormal": subnormal, "normal": normal} | not_numbers
    assert bias == 2 ** (bits - 1) - 1


def test_a_formula_reads_as_it_should() -> None:
    assert decode(0x4B).formula == "+1 x 2^(9-7) x (1 + 3/8) = 5.5"
    assert decode(0x81).formula == "-1 x 2^(1-7) x (0 + 1/8) = -0.001953125"
    assert decode(0xFC, E5M2).formula == "exponent 31 and mantissa 0 stand for -infinity"


@pytest.mark.parametrize("code", [-1, 256, 1.0, "5", None, True])
def test_refuses_what_is_no_code(code: Any) -> None:
    with pytest.raises(ValueError, match="expected a whole number from 0 to 255"):
        decode(code)


def test_refuses_other_dtypes() -> None:
    for function in (number_line, code_values, layout):
        with pytest.raises(ValueError, match=r"expected torch\.float8_e4m3fn or"):
            function(torch.bfloat16)


@BOTH
def test_encode_finds_the_nearest_code(dtype: torch.dtype) -> None:
    random = np.random.default_rng(0)
    sizes = 10.0 ** random.uniform(-7, 6, 600)
    numbers = (random.standard_normal(600) * sizes).astype(np.float32).astype(float).tolist()
    line, largest = finite(dtype), KNOWN[dtype][3]
    middles = [(low + high) / 2 for low, high in pairwise(line)]
    notes = Counter[str]()
    for number in [*numbers, *line, *middles, 0.0, -0.0]:
        found = encode(number, dtype)
        assert found.code == nearest(number, dtype), number
        assert found.value == by_hand(found.code, dtype)
        assert found.error == found.value - number
        assert found.relative == (abs(found.error / number) if number else 0)
        saturated = found.note.startswith("saturated")
        assert saturated == (abs(number) > largest)
        assert found.note.startswith("lost") == (number != 0 and found.value == 0)
        assert (found.note == "exact") == (found.error == 0)
        notes[found.note.split()[0]] += 1
    assert set(notes) == {"saturated:", "lost:", "exact", "rounded"}


@BOTH
def test_encode_with_a_scale_is_what_quantize_does(dtype: torch.dtype) -> None:
    """One block, whose scale comes from its own largest number; then powers of two."""
    numbers = torch.randn(1, 128) * torch.logspace(-6, 2, 128)
    codes, scale = quantize(numbers, dtype=dtype)
    found = [encode(number, dtype, float(scale)) for number in numbers[0].tolist()]
    assert [each.code for each in found] == codes.view(torch.uint8)[0].tolist()
    for number, each in zip(numbers[0].tolist(), found, strict=True):
        assert each.value == pytest.approx(by_hand(each.code, dtype) * float(scale))
        assert each.error == pytest.approx(each.value - number, abs=1e-12)
    for power in (-20, -3, 5):
        for number in numbers[0, ::8].tolist():
            each = encode(number * 2.0**power, dtype, 2.0**power)
            assert each.code == nearest(number, dtype)
            assert each.value == by_hand(each.code, dtype) * 2.0**power


@pytest.mark.parametrize(
    ("number", "scale", "message"),
    [
        (math.nan, 1, "the number is nan"), (-math.inf, 1, "the number is -inf"),
        (1, 0, "the scale is 0"), (1, -2, "the scale is -2"), (1, math.nan, "the scale is nan"),
        (1, math.inf, "the scale is inf"),
    ],
)  # fmt: skip
def test_encode_refuses(number: float, scale: float, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        encode(number, E4M3, scale)


def test_extreme_scales_saturate_or_vanish() -> None:
    assert encode(-1e308, E4M3, 1e-308).code == 0xFE
    assert encode(1e-308, E4M3, 1e308).note.startswith("lost")
    assert encode(0.0, E5M2, 5e-324).note == "exact"


# ----------------------------------------------------------------------------------------- figures


@BOTH
def test_the_number_line_has_every_code(dtype: torch.dtype) -> None:
    _, width, bias, largest = KNOWN[dtype]
    figure, line = number_line(dtype), finite(dtype)
    readable(figure)
    assert sorted(marks(figure, 0)) == line
    normal, below = sorted(marks(figure, 1)), sorted(marks(figure, 1, 1))
    assert below + normal == [value for value in line if value > 0]
    assert normal[0] == 2.0 ** (1 - bias)
    assert len(below) == 2**width - 1
    top, bottom = figure.axes
    assert top.get_xscale() == "linear"
    assert bottom.get_xscale() == "log"
    without = "2 NaN" if dtype == E4M3 else "6 NaN and 2 infinite"
    count = 254 if dtype == E4M3 else 248
    title = f"{layout(dtype).name}: {count} of 256 codes are finite, zero twice"
    assert top.get_title() == f"{title}; left out: {without}"
    for axes in (top, bottom):
        assert "no unit" in axes.get_xlabel()
        assert f"{largest:,.0f}" in [label.get_text() for label in axes.get_xticklabels()]
    names = [label.get_text() for label in bottom.get_xticklabels()]
    assert names[:2] == [f"2^{1 - bias - width}", f"2^{1 - bias}"]
    counts = Counter(math.floor(math.log2(value)) for value in line if value > 0)
    written = {text.get_position()[0]: text.get_text() for text in bottom.texts}
    for power, number in counts.items():
        assert written[2.0 ** (power + 0.5)] == str(number)
    near = sum(abs(value) <= 1 for value in line)
    texts = [text.get_text() for text in top.texts]
    assert f"{near} of these {len(line)} numbers lie within 1 of zero" in texts
    assert f"{line[-1] - line[-2]:,.0f} apart" in texts


@BOTH
@pytest.mark.parametrize("code", [0, 1, 3, 4, 9, 0x16, 0x37, 0x4B, 0x7A, 0x7B, 0x7E, 0x7F])
@pytest.mark.parametrize("sign", [0, 0x80])
def test_pictures_of_codes_can_be_read(dtype: torch.dtype, code: int, sign: int) -> None:
    figure, value = code_figure(code + sign, dtype), by_hand(code + sign, dtype)
    readable(figure)
    top, bottom = figure.axes
    positive = [number for number in finite(dtype) if number >= 0]
    assert sorted(marks(figure, 0)) == positive
    assert "no unit" in top.get_xlabel()
    assert plain(value).replace("-", "−") in top.get_title()
    if not math.isfinite(value):
        assert not top.lines
        assert bottom.texts[0].get_text() == "this code has no place on the line"
        return
    line = finite(dtype)
    place = line.index(value)
    around = KNOWN[dtype][1]
    assert marks(figure, 1) == line[max(place - around, 0) : place + around + 1]
    assert (top.lines[0].get_xdata()[0], bottom.lines[0].get_xdata()[0]) == (abs(value), value)
    assert "no unit" in bottom.get_xlabel()


@BOTH
@pytest.mark.parametrize("number", [3.3, -0.001, 500.0, -1e9, 1e-12, 0.0, 430.0, -56000.0, 26.1])
def test_what_was_typed_is_marked(dtype: torch.dtype, number: float) -> None:
    found = encode(number, dtype, 2.0)
    figure = code_figure(found.code, dtype, 2.0, number)
    readable(figure)
    bottom, wanted = figure.axes[1], number / 2
    [label] = [text.get_text() for text in bottom.texts if "typed" in text.get_text()]
    assert label.strip("←→ ").startswith("typed / scale: ")
    if abs(wanted) <= KNOWN[dtype][3]:
        assert bottom.lines[1].get_xdata()[0] == wanted
        assert marks(figure, 1, 1) == [wanted]
    else:
        assert len(bottom.lines) == 1
        assert ("→" if number > 0 else "←") in label


def test_looks_survive_without_colour() -> None:
    """E5M2 is hatched, and the cross and the diamond differ in shape, not only in hue."""
    _, bottom = code_figure(encode(3.3).code, E4M3, 1.0, 3.3).axes
    assert [line.get_marker() for line in bottom.lines] == ["D", "X"]
    axes = number_line(E4M3).axes[1]
    heights = [float(collection.get_segments()[0][1][1]) for collection in axes.collections]  # type: ignore[attr-defined]
    assert heights[1] < heights[0]


# ------------------------------------------------------------------------------- formats of a layer


@pytest.fixture(scope="module")
def model() -> Transformer:
    made = Transformer(ModelConfig.mini())
    convert_to_fp8(made, Recipe(gradient=E5M2, gradient_block=TENSOR))
    return made


@pytest.mark.parametrize("index", [0, 1, 4])
def test_rows_of_a_layer_are_those_of_the_model(model: Transformer, index: int) -> None:
    rows, every = layer_formats(model, index), {row.name: row for row in formats(model)}
    start = f"model.layers.{index}."
    inside = [name for name in every if name.startswith(start)]
    assert len(rows) == len(inside) + 3
    assert rows[0] == every["model.embed_tokens.weight"]
    assert rows[-2:] == [every["model.norm.weight"], every["lm_head.weight"]]
    for row in rows[1:-2]:
        assert row[1:] == every[start + row.name][1:]
    with pytest.raises(
        ValueError, match=re.escape("no layer 9 has parameters; expected one of [0,")
    ):
        layer_formats(model, 9)


def test_the_picture_is_the_rows(model: Transformer) -> None:
    rows = layer_formats(model, 1)
    figure = format_picture(rows)
    readable(figure)
    assert figure.get_size_inches()[0] * 100 == 860
    [axes] = figure.axes
    cells = {(int(text.get_position()[0]), int(text.get_position()[1])): text for text in axes.texts
             if min(text.get_position()) > 0}  # fmt: skip
    assert len(cells) == len(axes.patches) == 4 * len(rows)
    for patch in axes.patches:
        x, y = (int(place) for place in patch.get_xy())  # type: ignore[attr-defined]
        text = cells[x, y].get_text()
        assert text == rows[y][1 + x]
        dark = to_hex(patch.get_facecolor()) == "#1b2a5e"
        assert dark == text.startswith("E4M3")
        assert bool(patch.get_hatch()) == text.startswith("E5M2")
        assert to_hex(cells[x, y].get_color()) == ("#ffffff" if dark else "#1a1a1a")
    names = [text.get_text() for text in axes.texts if text.get_position()[0] < 0]
    assert names == [*(row.name.removesuffix(".weight") for row in rows), "parameter"]
    kinds = {text.get_text() for text in cells.values()}
    assert kinds == {"float32", "E4M3 1x128", "E4M3 128x128", "E5M2 allxall"}


def test_the_text_is_the_rows(model: Transformer) -> None:
    rows = layer_formats(model, 1)
    lines = format_text(rows).splitlines()
    assert [re.split(r"  +", line) for line in lines[1:]] == [list(row) for row in rows]
    assert lines[0].split() == ["parameter", "stored", "input", "weight", "gradient"]
    assert max(map(len, lines)) <= WIDEST
    for column in lines[0].split()[1:]:
        assert {line[lines[0].index(column) - 1] for line in lines} == {" "}


def test_long_names_are_cut_at_the_front_and_no_rows_refused(model: Transformer) -> None:
    row = layer_formats(model, 1)[2]._replace(name="a" * 90 + ".end.weight")
    lines = format_text([row]).splitlines()
    assert max(map(len, lines)) == WIDEST
    assert lines[1].startswith("…aaa")
    assert ".end.weight  float32" in lines[1]
    readable(format_picture([row]))
    for function in (format_text, format_picture):
        with pytest.raises(ValueError, match="no rows to show"):
            function([])


# ------------------------------------------------------------------------------------------ widget


def cells(explorer: Fp8Explorer) -> dict[str, str]:
    """The rows of the table, as the browser would show them."""
    rows = re.findall(r"<tr><th[^>]*>(.*?)</th><td[^>]*>(.*?)</td></tr>", explorer.numbers.value)
    return dict(rows)


def check(explorer: Fp8Explorer) -> None:
    """Everything on display fits the state."""
    state = (explorer.code, explorer.dtype, explorer.scale, explorer.number)
    assert explorer.shown == code_numbers(*state) == cells(explorer)
    assert explorer.picture.value == png(code_figure(*state))
    assert explorer.problem.value == ""
    digits = f"{explorer.code:08b}"
    assert "".join(bit.description for bit in explorer.bits) == digits
    assert [bit.value for bit in explorer.bits] == [digit == "1" for digit in digits]


def shape(explorer: Fp8Explorer) -> list[list[Any]]:
    """The buttons in each group, from left to right."""
    return [[column.children[0] for column in group.children[1].children]
            for group in explorer.groups]  # fmt: skip


def test_it_starts_with_its_defaults() -> None:
    explorer = Fp8Explorer()
    check(explorer)
    assert explorer.shown == code_numbers()
    assert repr(explorer) == (
        "Fp8Explorer: E4M3 75 = 0x4B = 0 1001 011; +1 x 2^(9-7) x (1 + 3/8) = 5.5"
    )
    assert shape(explorer) == [explorer.bits[:1], explorer.bits[1:5], explorer.bits[5:]]
    assert explorer.groups[1].children[0].value == "<b>exponent: 9</b>"
    assert explorer.groups[2].children[0].value == "<b>mantissa: 3/8</b>"
    captions = [getattr(child, "value", "") for child in explorer.children]
    assert any(fp8_explorer.ALT in str(caption) for caption in captions)


@pytest.mark.parametrize("place", range(8))
def test_a_button_flips_its_bit(place: int) -> None:
    explorer = Fp8Explorer()
    explorer.bits[place].value = not explorer.bits[place].value
    assert explorer.code == 0x4B ^ (0x80 >> place)
    check(explorer)


def test_another_format_reads_the_same_bits_anew() -> None:
    explorer = Fp8Explorer()
    explorer.format.value = E5M2
    assert (explorer.code, explorer.dtype) == (0x4B, E5M2)
    check(explorer)
    assert shape(explorer) == [explorer.bits[:1], explorer.bits[1:6], explorer.bits[6:]]
    worths = [bit.tooltip.removeprefix("exponent bit, worth ") for bit in explorer.bits[1:6]]
    assert worths == ["16", "8", "4", "2", "1"]
    assert [bit.tooltip for bit in explorer.bits[6:]] == [
        "mantissa bit, worth 1/2", "mantissa bit, worth 1/4",
    ]  # fmt: skip
    assert explorer.bits[0].tooltip == "sign bit"
    explorer.format.value = E4M3
    assert shape(explorer) == [explorer.bits[:1], explorer.bits[1:5], explorer.bits[5:]]


def test_a_typed_number_sets_the_bits_and_says_the_error() -> None:
    explorer = Fp8Explorer()
    for text, scale in [("3.3", "1"), ("500", "1"), ("500", "2"), ("-1e-3", "0.5")]:
        explorer.over.value, explorer.typed.value = scale, text
        found = encode(float(text), E4M3, float(scale))
        assert (explorer.code, explorer.number) == (found.code, float(text))
        assert cells(explorer)["in words"] == found.note
        check(explorer)
    explorer.format.value = E5M2
    assert explorer.code == encode(-1e-3, E5M2, 0.5).code
    check(explorer)
    explorer.bits[7].value = not explorer.bits[7].value
    assert (explorer.number, explorer.typed.value, explorer.scale) == (None, "", 0.5)
    assert "error" not in explorer.shown
    check(explorer)
    explorer.typed.value = "2"
    assert explorer.code == encode(2, E5M2, 0.5).code
    explorer.typed.value = " "
    assert explorer.number is None
    check(explorer)


@pytest.mark.parametrize(
    ("field", "text", "message"),
    [
        ("typed", "abc", "the number is 'abc'; expected a number, as 3.3"),
        ("typed", "<b>", "the number is '&lt;b&gt;'; expected"),
        ("typed", "nan", "the number is nan; expected a finite one"),
        ("typed", "-inf", "the number is -inf; expected a finite one"),
        ("over", "0", "the scale is 0; expected a finite number above 0"),
        ("over", "-1", "the scale is -1; expected a finite number above 0"),
        ("over", "", "the scale is ''; expected a number"),
        ("over", "inf", "the scale is inf; expected a finite number above 0"),
    ],
)
def test_bad_text_is_refused_and_leaves_everything(field: str, text: str, message: str) -> None:
    explorer = Fp8Explorer()
    explorer.typed.value = "3.3"
    before = (explorer.code, explorer.scale, explorer.number, explorer.shown)
    pictures = (explorer.numbers.value, explorer.picture.value)
    getattr(explorer, field).value = text
    assert explorer.problem.value.startswith("<b>Not possible:</b> ")
    assert message in explorer.problem.value
    assert getattr(explorer, field).value == text, "the reader can mend it"
    assert (explorer.code, explorer.scale, explorer.number, explorer.shown) == before
    assert (explorer.numbers.value, explorer.picture.value) == pictures
    explorer.bits[0].value = True
    assert (explorer.typed.value, explorer.over.value, explorer.code) == ("", "1", 0xC5)
    check(explorer)


def test_numbers_refuse_a_code_that_the_number_does_not_have() -> None:
    for function in (code_numbers, code_figure):
        with pytest.raises(ValueError, match="leave out one of them"):
            function(0, E4M3, 1.0, 3.3)
    readable(place_figure(math.inf, E5M2))
