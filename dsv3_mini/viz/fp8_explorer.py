"""Eight bits and the number that they are; a number and the eight bits that come nearest to it.

Why by hand: in E4M3 the step between two codes is an eighth of a power of two. Whoever has moved a
mantissa bit at 256 and at 0.01 has seen why a scale must bring numbers to where codes are, and what
an outlier that sets the scale does to the small numbers beside it.

``decode`` and ``encode`` are plain functions of a code and of a number, ``code_figure`` and
``code_numbers`` show what they found; ``Fp8Explorer`` puts eight buttons and two fields on them.
"""

from __future__ import annotations

import html
import math
from typing import Any, NamedTuple

import ipywidgets as widgets
import torch
from matplotlib.figure import Figure

from dsv3_mini.fp8 import E4M3, NAMES
from dsv3_mini.viz.fp8 import code_values, layout, place_figure, plain
from dsv3_mini.viz.shell import refusal, table
from dsv3_mini.viz.style import png

ALT = (
    "Above: the magnitudes of all codes as ticks, on a logarithmic axis; the diamond is this code. "
    "Below: its neighbours at their true distances; a cross marks what was typed, over the scale."
)
FIRST = 0x4B  # 5.5 in E4M3
PARTS = ("sign", "exponent", "mantissa")
CENTRED = "width:40px;text-align:center;line-height:1.3"


class Decoded(NamedTuple):
    """One code taken apart."""

    code: int
    """0 to 255."""
    sign: int
    exponent: int
    mantissa: int
    """The bits of each part as a number."""
    bits: str
    """'0 1001 011'."""
    kind: str
    """'normal', 'subnormal', 'zero', 'infinity' or 'NaN'."""
    value: float
    below: float | None
    """The next smaller finite number; None at the end of the line, for infinity and for NaN."""
    above: float | None
    step: float | None
    """From the value to the next one away from zero, or what that would be; None if not finite."""
    formula: str


class Encoded(NamedTuple):
    """The code nearest to number / scale."""

    number: float
    scale: float
    code: int
    value: float
    """The code's number x scale: what is left of ``number``."""
    error: float
    """value - number."""
    relative: float
    """|error / number|, and 0 for 0."""
    note: str
    """What happened, in words."""


def decode(code: int, dtype: torch.dtype = E4M3) -> Decoded:
    """Sign, exponent, mantissa, value and neighbours of a code from 0 to 255. Raises ValueError."""
    form = layout(dtype)
    if type(code) is not int or not 0 <= code <= 255:
        raise ValueError(f"code is {code!r}; expected a whole number from 0 to 255")
    line = code_values(dtype)
    sign, rest = divmod(code, 128)
    exponent, mantissa = divmod(rest, 2**form.mantissa)
    text = f"{code:08b}"
    bits = f"{text[0]} {text[1 : 1 + form.exponent]} {text[1 + form.exponent :]}"
    value = float(line[code])
    found = code, sign, exponent, mantissa, bits
    if not math.isfinite(value):
        kind = "NaN" if math.isnan(value) else "infinity"
        name = kind if kind == "NaN" else f"{'-' if sign else '+'}{kind}"
        formula = f"exponent {exponent} and mantissa {mantissa} stand for {name}"
        return Decoded(*found, kind, value, None, None, None, formula)
    kind = "normal" if exponent else "subnormal" if mantissa else "zero"
    power, whole = f"{max(exponent, 1)}-{form.bias}", int(exponent > 0)
    formula = (
        f"{'-' if sign else '+'}1 x 2^({power}) x ({whole} + {mantissa}/{2**form.mantissa}) = "
        f"{plain(value)}"
    )
    finite = line[line.isfinite()]
    below, above = finite[finite < value], finite[finite > value]
    return Decoded(
        *found, kind, value, float(below.max()) if len(below) else None,
        float(above.min()) if len(above) else None,
        2.0 ** (max(exponent, 1) - form.bias - form.mantissa), formula,
    )  # fmt: skip


def encode(number: float, dtype: torch.dtype = E4M3, scale: float = 1.0) -> Encoded:
    """The nearest code to number / scale (of two equally near ones the even), and what it loses.

    Beyond the largest code that one is taken, as ``dsv3_mini.fp8.quantize`` does. Raises ValueError
    for numbers that are not finite and scales that are not finite and above 0.
    """
    form = layout(dtype)
    if not math.isfinite(number):
        raise ValueError(f"the number is {number}; expected a finite one, as 3.3 or -2e-3")
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"the scale is {scale:g}; expected a finite number above 0")
    largest = torch.finfo(dtype).max
    wanted = number / scale
    clamped = torch.tensor(min(max(wanted, -largest), largest), dtype=torch.float32)
    code = int(clamped.to(dtype).view(torch.uint8))
    held = float(code_values(dtype)[code])
    error = held * scale - number + 0.0  # never -0
    if abs(wanted) > largest:
        note = f"saturated: beyond {largest:,g}, the largest {form.name} number, so cut to it"
    elif held == 0 and number != 0:
        note = "lost: nearer to 0 than to the smallest code, so rounded to 0"
    else:
        note = "exact" if error == 0 else "rounded to the nearest code"
    relative = abs(error / number) if number else 0.0
    return Encoded(number, scale, code, held * scale, error, relative, note)


def _encoded(code: int, dtype: torch.dtype, scale: float, number: float | None) -> Encoded | None:
    found = None if number is None else encode(number, dtype, scale)
    if found is not None and found.code != code:
        raise ValueError(f"code is {code}, but {number} is {found.code}; leave out one of them")
    return found


def code_numbers(
    code: int = FIRST, dtype: torch.dtype = E4M3, scale: float = 1.0, number: float | None = None
) -> dict[str, str]:
    """The code taken apart, as texts; with ``number``, whose code it must be, also the error."""
    at, typed = decode(code, dtype), _encoded(code, dtype, scale, number)
    ends = {"below": "none: the smallest", "above": "none: the largest"}
    if at.step is None:
        ends = dict.fromkeys(ends, "none")
    rows = {
        "code": f"{at.code} = 0x{at.code:02X} = {at.bits}",
        "kind": at.kind,
        "formula": at.formula,
        "value": plain(at.value),
        "spacing here": "none" if at.step is None else plain(at.step),
    }
    for side in ("below", "above"):
        other = getattr(at, side)
        apart = "" if other is None else f" ({plain(abs(other - at.value))} away)"
        rows[f"next {side}"] = ends[side] if other is None else plain(other + 0.0) + apart
    if typed is None:
        return rows | {"value x scale": plain(float(f"{at.value * scale:.9g}"))}
    return rows | {
        "typed number / scale": f"{number:.9g} / {scale:.9g} = {typed.number / scale:.9g}",
        "value x scale": f"{typed.value:.9g}",
        "error": f"{typed.error:.3g}",
        "relative error": f"{typed.relative:.3%}",
        "in words": typed.note,
    }


def code_figure(
    code: int = FIRST, dtype: torch.dtype = E4M3, scale: float = 1.0, number: float | None = None
) -> Figure:
    """Where the code lies among all with its sign, and among its neighbours."""
    at, typed = decode(code, dtype), _encoded(code, dtype, scale, number)
    wanted = None if typed is None else typed.number / scale
    title = f"{NAMES[dtype]} {at.bits}: {plain(at.value).replace('-', '−')}"
    return place_figure(at.value, dtype, wanted, title)


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"the {name} is {text!r}; expected a number, as 3.3 or -2e-3") from None


def _worth(part: str, place: int, count: int) -> str:
    # What the bit at this place, counted from the left, adds to a part of so many bits.
    return {"sign": "−", "exponent": f"{2 ** (count - 1 - place)}"}.get(
        part, f"1/{2 ** (place + 1)}"
    )


class Fp8Explorer(widgets.VBox):  # type: ignore[misc]
    """A button for each bit, the choice of a format, and fields for a number and its scale.

    What is on display is in ``code``, ``dtype``, ``scale`` and ``number``, which is None where the
    bits were set by hand; ``shown`` has the rows of the table.
    """

    def __init__(self, code: int = FIRST, dtype: torch.dtype = E4M3) -> None:
        self.code, self.dtype, self.scale = decode(code, dtype).code, dtype, 1.0
        self.number: float | None = None
        self.shown: dict[str, str] = {}
        self._texts, self._quiet = ("", "1"), False  # the last texts that were possible
        look = {"width": "38px", "height": "38px", "padding": "0", "margin": "1px"}
        bold = {"font_weight": "bold", "font_size": "17px"}
        self.bits = [widgets.ToggleButton(layout=look, style=bold) for _ in range(8)]
        self.groups = [widgets.VBox([widgets.HTML(), widgets.HBox()]) for _ in PARTS]
        wide = {"description_width": "60px", "button_width": "80px"}
        options = [(name, each) for each, name in NAMES.items()]
        self.format = widgets.ToggleButtons(
            options=options,
            value=dtype,
            description="format",
            style=wide,
            layout={"width": "auto"},
        )
        field: dict[str, Any] = {"continuous_update": False, "layout": {"width": "240px"}}
        field |= {"style": {"description_width": "60px"}}
        self.typed = widgets.Text(description="number", placeholder="type one, as 3.3", **field)
        self.over = widgets.Text(description="scale", value="1", **field)
        self.problem, self.numbers = widgets.HTML(), widgets.HTML()
        self.picture = widgets.Image(format="png", layout={"max_width": "100%"})
        caption = widgets.HTML(
            f"<div style='line-height:1.4'>{html.escape(ALT, quote=False)}</div>"
        )
        row = {"flex_flow": "row wrap", "grid_gap": "2px 16px", "align_items": "flex-end"}
        row |= {"padding": "0 0 6px 0"}
        bits = widgets.HBox(self.groups, layout=row)
        fields = widgets.HBox([self.format, self.typed, self.over], layout=row)
        super().__init__([bits, fields, self.problem, self.picture, caption, self.numbers])
        self._group()
        self._show()
        for control, heard in (
            *((bit, self._bit) for bit in self.bits), (self.format, self._format),
            (self.typed, self._type), (self.over, self._type),
        ):  # fmt: skip
            control.observe(heard, names="value")

    def __repr__(self) -> str:
        return f"Fp8Explorer: {NAMES[self.dtype]} {self.shown['code']}; {self.shown['formula']}"

    def _bit(self, _: object) -> None:
        if not self._quiet:
            self.code = sum(bit.value << (7 - place) for place, bit in enumerate(self.bits))
            self.number, self._texts = None, ("", self._texts[1])
            self._show()

    def _format(self, _: object) -> None:
        self.dtype = self.format.value
        if self.number is not None:
            self.code = encode(self.number, self.dtype, self.scale).code
        self._group()
        self._show()

    def _type(self, _: object) -> None:
        if self._quiet:
            return
        texts = self.typed.value, self.over.value
        try:
            number = _number("number", texts[0]) if texts[0].strip() else None
            scale = _number("scale", texts[1])
            found = encode(number or 0.0, self.dtype, scale)
        except ValueError as error:
            self.problem.value = refusal(error)
            return
        self.number, self.scale, self._texts = number, scale, texts
        self.code = self.code if number is None else found.code
        self._show()

    def _group(self) -> None:
        # The bits keep their places; exponent and mantissa share them out anew.
        ends = (0, 1, 1 + layout(self.dtype).exponent, 8)
        for part, group, start, end in zip(PARTS, self.groups, ends, ends[1:], strict=False):
            columns = []
            for place, bit in enumerate(self.bits[start:end]):
                worth = _worth(part, place, end - start)
                bit.tooltip = f"{part} bit" if part == "sign" else f"{part} bit, worth {worth}"
                columns.append([bit, widgets.HTML(f"<div style='{CENTRED}'>{worth}</div>")])
            group.children[1].children = [widgets.VBox(column) for column in columns]

    def _show(self) -> None:
        """Put code, numbers and picture on display, and the last possible texts into the fields."""
        at, state = decode(self.code, self.dtype), (self.code, self.dtype, self.scale, self.number)
        self._quiet = True
        try:
            for bit, digit in zip(self.bits, f"{self.code:08b}", strict=True):
                bit.value, bit.description = digit == "1", digit
            self.typed.value, self.over.value = self._texts
        finally:
            self._quiet = False
        eighths = 2 ** layout(self.dtype).mantissa
        heads = ("sign", f"exponent: {at.exponent}", f"mantissa: {at.mantissa}/{eighths}")
        for group, head in zip(self.groups, heads, strict=True):
            group.children[0].value = f"<b>{head}</b>"
        self.shown, self.problem.value = code_numbers(*state), ""
        self.numbers.value, self.picture.value = table(self.shown), png(code_figure(*state))
