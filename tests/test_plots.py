"""The plots that notebooks share: what is drawn is what was given, and names can be read."""

from __future__ import annotations

import ast
import inspect
import textwrap
from itertools import pairwise

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from dsv3_mini.config import ModelConfig
from dsv3_mini.measure import Ceilings
from dsv3_mini.moe import Gate
from dsv3_mini.parallel import ParallelExperts
from dsv3_mini.viz.plots import dots, heatmaps, lines, roofline, stacks
from dsv3_mini.viz.source import show
from dsv3_mini.viz.style import png


def names(figure: Figure) -> list[Annotation]:
    return [text for text in figure.axes[0].texts if isinstance(text, Annotation)]


@pytest.mark.parametrize("logy", [False, True])
def test_lines_are_named_at_their_ends_without_overlap(logy: bool) -> None:
    curves = {f"curve {i}": [1.0, 2.0, 3.0 + i / 100] for i in range(6)}
    figure = lines([1, 2, 4], curves, "tokens", "ms", logx=True, logy=logy)
    png(figure)
    axes = figure.axes[0]
    assert [list(line.get_ydata()) for line in axes.lines] == list(curves.values())
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("tokens", "ms")
    boxes = sorted((text.get_window_extent() for text in names(figure)), key=lambda box: box.y0)
    assert {text.get_text() for text in names(figure)} == set(curves)
    assert all(lower.y1 <= upper.y0 + 1 for lower, upper in pairwise(boxes))
    assert max(box.x1 for box in boxes) <= figure.bbox.x1
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in axes.lines}
    assert len(looks) == 6


def test_dots_show_every_seed_and_the_mean() -> None:
    figure = dots({"a": [1.0, 2.0, 6.0], "b": [4.0]}, "loss", bar=("guessing", 3.5))
    png(figure)
    seeds_a, mean_a, seeds_b, _mean_b, bar = figure.axes[0].lines
    assert list(seeds_a.get_ydata()) == [1, 2, 6]
    assert list(mean_a.get_ydata()) == [3, 3]
    assert list(seeds_b.get_ydata()) == [4]
    assert bar.get_ydata()[0] == 3.5  # type: ignore[index]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["a", "b"]


def test_roofline_bends_at_the_ridge() -> None:
    ceilings = Ceilings(flops=100e9, bandwidth=20e9)
    figure = roofline(ceilings, {"reads": (1e9, 2e9, 0.2), "computes": (8e9, 1e8, 0.1)})
    png(figure)
    roof, reads, computes = figure.axes[0].lines
    x, y = roof.get_xdata(), roof.get_ydata()
    assert y.max() == pytest.approx(100)  # type: ignore[union-attr]
    assert y[0] / x[0] == pytest.approx(20)  # type: ignore[index]
    assert (reads.get_xdata()[0], reads.get_ydata()[0]) == (0.5, 5.0)  # type: ignore[index]
    assert (computes.get_xdata()[0], computes.get_ydata()[0]) == (80.0, 80.0)  # type: ignore[index]
    assert [text.get_text() for text in names(figure)] == ["reads", "computes"]


def test_heatmaps_share_a_scale() -> None:
    panels = {"one": [[0.0, 1.0], [2.0, 3.0]], "two": [[1.0, 1.0], [1.0, 5.0]]}
    figure = heatmaps(panels, ["a", "b"], "expert", "load")
    png(figure)
    for axes, values in zip(figure.axes, panels.values(), strict=False):
        [image] = axes.images
        assert image.get_array().tolist() == values  # type: ignore[union-attr]
        assert image.get_clim() == (0.0, 5.0)
        assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]


@pytest.mark.parametrize("thing", [ModelConfig.to_hf, ParallelExperts.forward, Gate, show])
def test_source_is_shown_as_it_stands_in_its_file(thing: object) -> None:
    """Indented as Python reads it, also where a method's signature is one line."""
    text = show(thing).data
    code = text.partition("```python\n")[2].removesuffix("\n```")
    (shown,) = ast.parse(code).body
    (written,) = ast.parse(textwrap.dedent(inspect.getsource(thing))).body  # type: ignore[arg-type]
    assert ast.dump(shown) == ast.dump(written)


def test_stacks_reach_their_sums_and_leave_small_parts_unnamed() -> None:
    columns = {"a": {"experts": 80.0, "rest": 20.0}, "b": {"experts": 40.0, "rest": 1.0}}
    figure = stacks(columns, "GB", bar=("a card", 90.0))
    png(figure)
    (axes,) = figure.axes
    tops = {round(bar.get_y() + bar.get_height(), 6) for bar in axes.patches}
    assert tops == {80.0, 100.0, 40.0, 41.0}
    assert axes.get_ylim()[1] > 100
    written = [text.get_text() for text in axes.texts]
    assert {"80.0", "20.0", "40.0", "100.0", "41.0", "a card"} <= set(written)
    assert "1.0" not in written
