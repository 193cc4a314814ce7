"""explorers: their numbers against published ones and against loops; widgets against functions."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from dsv3_mini.config import ConfigError, RopeScaling
from dsv3_mini.viz import mla_explorer, rope_explorer, yarn_explorer
from dsv3_mini.viz.mla_explorer import MLAExplorer, cache_figure, cache_numbers, decode_reads
from dsv3_mini.viz.rope_explorer import RopeExplorer, rope_figure, rope_numbers, score, turned
from dsv3_mini.viz.shell import Explorer, slider, table
from dsv3_mini.viz.style import new_figure, png
from dsv3_mini.viz.yarn_explorer import YarnExplorer, yarn_figure, yarn_numbers

NUMBERS = {MLAExplorer: cache_numbers, RopeExplorer: rope_numbers, YarnExplorer: yarn_numbers}
FIGURES = {MLAExplorer: cache_figure, RopeExplorer: rope_figure, YarnExplorer: yarn_figure}
# One other value for every control.
MOVES: dict[type[Explorer], dict[str, Any]] = {
    MLAExplorer: {
        "num_attention_heads": 64, "num_key_value_heads": 4, "kv_lora_rank": 256,
        "q_lora_rank": 0, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 256,
        "hidden_size": 2048, "num_hidden_layers": 2, "context": 1024, "batch": 32, "dtype": "FP8",
    },
    RopeExplorer: {"query": 100, "key": 50, "pair": 6, "width": 16, "theta": 500.0},
    YarnExplorer: {
        "factor": 8, "original": 1024, "beta_fast": 64, "beta_slow": 2.0, "mscale": 0.5,
        "width": 32, "theta": 100000.0, "head_width": 128,
    },
}  # fmt: skip
UNDRAWN = {"mscale", "head_width"}  # they change numbers that are not in the picture
REFUSED: list[tuple[type[Explorer], str, Any, str]] = [
    (MLAExplorer, "num_attention_heads", 8 * 17, "is not a multiple of num_key_value_heads 128"),
    (RopeExplorer, "pair", 40, "a width of 64 has pairs 0 to 31"),
    (YarnExplorer, "beta_fast", 1, "expected beta_fast &gt; beta_slow &gt; 0"),
]


def cells(html: str) -> dict[str, str]:
    """The rows of the table of numbers, as the browser would show them."""
    rows = re.findall(r"<tr><th[^>]*>(.*?)</th><td[^>]*>(.*?)</td></tr>", html)
    return {label.replace("&lt;", "<"): value for label, value in rows}


# -------------------------------------------------------------------------------------- the cache


def test_v3_cache_numbers_are_the_published_ones() -> None:
    numbers = cache_numbers()
    counts = {"MHA": 32_768, "GQA, 8 groups": 2_048, "MQA": 256}
    counts |= {"MLA expanded": 40_960, "MLA latent": 576}
    for name, count in counts.items():
        per_layer, per_token, total = numbers[name].split(" ", 1)[1].rsplit(", ", 2)
        assert f"{numbers[name].split()[0]} {per_layer}" == (
            f"{count:,} numbers a layer ({count / 576:.2f}x)"
        )
        assert per_token == f"{count * 61 * 2:,} B a token"
        assert total == f"{count * 61 * 2 * 131072 / 2**30:.2f} GiB"
    published = {"MLA latent": "70,272 B", "MHA": "3,997,696 B", "MLA expanded": "4,997,120 B"}
    assert all(nbytes in numbers[name] for name, nbytes in published.items())
    assert numbers["MLA latent"].endswith("8.58 GiB")
    assert numbers["cached"] == "1 x 131,072 tokens"
    assert numbers["GQA groups that cost as much as MLA latent"] == "2.25"


def test_v3_projections_have_the_published_shapes() -> None:
    numbers = cache_numbers()
    shapes = {
        "q_a_proj": (1536, 7168), "q_b_proj": (24576, 1536), "kv_a_proj_with_mqa": (576, 7168),
        "kv_b_proj": (32768, 512), "o_proj": (7168, 16384),
    }  # fmt: skip
    for name, (out, inputs) in shapes.items():
        assert numbers[f"{name}, {out:,} x {inputs:,}"] == f"{out * inputs:,} parameters"
    assert numbers["all projections of a layer"] == "187,105,280 parameters"


def test_decode_step_reads_all_attention_weights_once_and_every_cache() -> None:
    config = mla_explorer.mla_config()
    weights, cache = decode_reads(config, 1000, 3, "BF16")
    assert weights == 2 * 11_413_547_008
    assert cache == 70_272 * 1000 * 3
    assert decode_reads(config, 1000, 3, "FP32") == (2 * weights, 2 * cache)
    shown = cache_numbers(context=1000, batch=3)
    assert shown["MLA latent: attention reads in a step"] == (
        f"{(weights + cache) / 2**30:.2f} GiB, {cache / (weights + cache):.1%} of it cache"
    )


def test_cache_numbers_follow_small_sizes() -> None:
    numbers = cache_numbers(
        num_key_value_heads=2, context=10, batch=3, dtype="FP8", num_attention_heads=4,
        kv_lora_rank=6, q_lora_rank=0, qk_nope_head_dim=8, qk_rope_head_dim=2, v_head_dim=12,
        hidden_size=20, num_hidden_layers=1,
    )  # fmt: skip
    assert numbers["MHA"].endswith(f", {2 * 4 * 12 * 30:,} B")
    assert numbers["GQA, 2 groups"].endswith(f", {2 * 2 * 12 * 30:,} B")
    assert numbers["MLA expanded"].endswith(f", {4 * (8 + 2 + 12) * 30:,} B")
    assert numbers["MLA latent"].endswith(f", {(6 + 2) * 30:,} B")
    assert numbers["q_proj, 40 x 20"] == "800 parameters"
    weights = 40 * 20 + 8 * 20 + 80 * 6 + 20 * 48
    assert numbers["all projections of a layer"] == f"{weights:,} parameters"
    read = weights + 6 + 8 * 30  # 6 for the norm on the latent
    assert numbers["MLA latent: attention reads in a step"].startswith(f"{read:,} B, ")


@pytest.mark.parametrize(
    "values", [{"dtype": "FP4"}, {"context": 0}, {"batch": 0}, {"kv_lora_rnak": 3}]
)
def test_cache_refuses_what_cannot_be(values: dict[str, Any]) -> None:
    for function in (cache_numbers, cache_figure):
        with pytest.raises(ConfigError):
            function(**values)


def test_bars_and_shares_are_the_numbers() -> None:
    left, right = cache_figure(context=1024, num_hidden_layers=1).axes
    drawn = [bar.get_width() for bar in left.patches]
    counts = np.array([32_768, 2_048, 256, 40_960, 576])
    np.testing.assert_allclose(drawn, counts * 1024 * 2 / 2**20)
    weights = 2 * (187_105_280 + 1536 + 512)
    share = 100 * weights / (weights + 576 * 1024 * 2)
    np.testing.assert_allclose([bar.get_width() for bar in right.patches[2:]], [share, 100 - share])


# ------------------------------------------------------------------------------------------- RoPE


@pytest.mark.parametrize(("width", "theta"), [(64, 1e4), (8, 100.0), (128, 1e6)])
def test_score_is_the_mean_cosine_whatever_the_start(width: int, theta: float) -> None:
    for m, n in [(12, 5), (5, 12), (0, 0), (200, 3)]:
        cosines = [math.cos((m - n) * theta ** (-2 * i / width)) for i in range(width // 2)]
        assert score(m, n, width, theta) == pytest.approx(np.mean(cosines), abs=1e-5)
        assert score(m + 100, n + 100, width, theta) == pytest.approx(
            score(m, n, width, theta), abs=1e-5
        )


def test_rope_numbers_of_a_pair() -> None:
    numbers = rope_numbers(query=12, key=5, pair=4)
    speed = 10000 ** (-8 / 64)
    for label, position in (("query turned", 12), ("key turned", 5), ("difference", 7)):
        radians = position * speed
        expected = f"{radians:.4f} rad = {radians / (2 * math.pi):.4f} turns"
        assert numbers[f"pair 4, {label}"] == expected
    assert numbers["pair 4, wavelength"] == f"{2 * math.pi / speed:.2f} tokens"
    assert numbers["distance m - n"] == "7"
    assert numbers["score"] == numbers["score, both positions + 100"]


def test_arrows_waves_and_curve_are_what_the_axes_say() -> None:
    arrows, waves, scores = rope_figure(query=9, key=2, pair=3, width=8, theta=100.0).axes
    tips = [text.xy for text in arrows.texts]
    angles = [math.pi / 4 + position * 100 ** (-6 / 8) for position in (0, 2, 9)]
    np.testing.assert_allclose(tips, [[math.cos(a) / 2, math.sin(a) / 2] for a in angles])
    expected = [2 * math.pi * 100 ** (i / 4) for i in range(4)]
    np.testing.assert_allclose(waves.lines[0].get_ydata(), expected, rtol=1e-5)
    curve = np.asarray(scores.lines[0].get_ydata())
    assert len(curve) == rope_explorer.FARTHEST + 1
    assert curve[7] == pytest.approx(score(9, 2, 8, 100.0))
    assert np.linalg.norm(turned(torch.tensor([33]), 8, 100.0)) == pytest.approx(1)


def test_a_distance_beyond_the_curve_is_said() -> None:
    assert "300" in rope_figure(query=300, key=0).axes[2].get_title()


@pytest.mark.parametrize(
    "values", [{"width": 7}, {"width": 0}, {"pair": 32}, {"pair": -1}, {"query": -1}, {"theta": 1}]
)
def test_rope_refuses_what_cannot_be(values: dict[str, Any]) -> None:
    for function in (rope_numbers, rope_figure):
        with pytest.raises(ConfigError):
            function(**values)


# ------------------------------------------------------------------------------------------- YaRN


def test_v3_yarn_numbers_are_the_published_ones() -> None:
    numbers = yarn_numbers()
    assert numbers["pairs untouched"] == "0 to 10 (11)"
    assert numbers["pairs blended"] == "11 to 22 (12)"
    assert numbers["pairs divided by 40"] == "23 to 31 (9)"
    assert numbers["stretched length"] == "163,840 tokens"
    assert numbers["mscale, 0.1 m ln s + 1"] == "1.36889"
    assert numbers["mscale squared"] == "1.873854"
    assert numbers["softmax scale"] == "0.135234"
    assert numbers["softmax scale without YaRN, 1 / sqrt(192)"] == "0.0721688"


def test_wavelengths_are_yarns_in_a_loop() -> None:
    ramp, waves = yarn_figure(factor=8, original=1024, width=32, theta=5000.0, head_width=96).axes
    low = math.floor(32 * math.log(1024 / (32 * 2 * math.pi)) / (2 * math.log(5000)))
    high = math.ceil(32 * math.log(1024 / (2 * math.pi)) / (2 * math.log(5000)))
    shares = [min(max((i - low) / (high - low), 0), 1) for i in range(16)]
    plain = [5000 ** (-2 * i / 32) for i in range(16)]
    mixed = [f * (1 - s) + f / 8 * s for f, s in zip(plain, shares, strict=True)]
    np.testing.assert_allclose(ramp.lines[0].get_ydata(), shares, rtol=1e-6)
    stretched, untouched, yarn = (np.asarray(line.get_ydata()) for line in waves.lines[:3])
    np.testing.assert_allclose(untouched, [2 * math.pi / f for f in plain], rtol=1e-5)
    np.testing.assert_allclose(stretched, [16 * math.pi / f for f in plain], rtol=1e-5)
    np.testing.assert_allclose(yarn, [2 * math.pi / f for f in mixed], rtol=1e-5)
    assert [line.get_ydata()[0] for line in waves.lines[3:]] == [1024, 8192]


def test_one_mscale_fills_both_fields() -> None:
    expected = RopeScaling(8, 1024, 16, 2, mscale=0.5, mscale_all_dim=0.5)
    assert yarn_explorer.scaling_of(8, 1024, 16, 2, 0.5) == expected
    term = 0.1 * 0.5 * math.log(8) + 1
    numbers = yarn_numbers(factor=8, mscale=0.5)
    assert numbers["softmax scale"] == f"{192**-0.5 * term**2:.6f}"


def test_nothing_stretched_changes_nothing() -> None:
    numbers = yarn_numbers(factor=1, head_width=96)
    assert numbers["mscale squared"] == "1.000000"
    assert numbers["softmax scale"] == f"{96**-0.5:.6f}"
    assert len(yarn_figure(factor=1).axes[1].lines) == 4  # the stretched length is the trained one


def test_parts_that_have_no_or_one_pair() -> None:
    numbers = yarn_numbers(original=32768, theta=100.0)
    assert numbers["pairs divided by 40"] == "none"
    assert yarn_numbers(original=64, width=8, theta=100.0)["pairs untouched"] == "0 (1)"


@pytest.mark.parametrize(
    "values", [{"factor": 0.5}, {"beta_slow": 32}, {"head_width": 64}, {"width": 9}, {"mscale": -1}]
)
def test_yarn_refuses_what_cannot_be(values: dict[str, Any]) -> None:
    for function in (yarn_numbers, yarn_figure):
        with pytest.raises(ConfigError):
            function(**values)


# ---------------------------------------------------------------------------------------- widgets


@pytest.fixture(scope="module", params=list(NUMBERS), ids=lambda kind: kind.__name__)
def explorer(request: pytest.FixtureRequest) -> Explorer:
    made: Explorer = request.param()
    return made


def test_an_explorer_starts_with_the_functions_own_defaults(explorer: Explorer) -> None:
    assert explorer.shown == NUMBERS[type(explorer)]()
    assert cells(explorer.numbers.value) == explorer.shown
    assert explorer.picture.value == png(FIGURES[type(explorer)]())
    assert explorer.problem.value == ""


def test_controls_can_be_read_and_used_by_keyboard(explorer: Explorer) -> None:
    for control in explorer.controls.values():
        assert control.description
        assert control.readout
        assert not control.continuous_update
        # Helvetica's letters are at most about 7 of 13 pixels wide on average.
        assert int(control.style.description_width[:-2]) >= 7 * len(control.description)
    assert any(len(getattr(child, "value", "")) > 80 for child in explorer.children)  # the caption


@pytest.mark.parametrize("kind", list(MOVES))
def test_moving_every_control_in_turn(kind: type[Explorer]) -> None:
    explorer = kind()
    assert set(MOVES[kind]) == set(explorer.controls)
    for name, value in MOVES[kind].items():
        numbers, picture = explorer.shown, explorer.picture.value
        explorer.controls[name].value = value
        assert explorer.problem.value == ""
        assert explorer.values == {key: each.value for key, each in explorer.controls.items()}
        assert explorer.values[name] == value
        assert explorer.shown == NUMBERS[kind](**explorer.values)
        assert cells(explorer.numbers.value) == explorer.shown
        assert explorer.shown != numbers, name
        assert (explorer.picture.value == picture) == (name in UNDRAWN), name
    assert explorer.picture.value == png(FIGURES[kind](**explorer.values))


@pytest.mark.parametrize(("kind", "name", "value", "message"), REFUSED)
def test_a_refused_value_leaves_everything(
    kind: type[Explorer], name: str, value: Any, message: str
) -> None:
    explorer = kind()
    if kind is MLAExplorer:
        explorer.controls["num_key_value_heads"].value = 128
    before = (explorer.values, explorer.shown, explorer.numbers.value, explorer.picture.value)
    good = explorer.controls[name].value
    explorer.controls[name].value = value
    assert explorer.controls[name].value == value
    assert explorer.problem.value.startswith("<b>Not possible:</b> ")
    assert message in explorer.problem.value
    after = (explorer.values, explorer.shown, explorer.numbers.value, explorer.picture.value)
    assert after == before
    explorer.controls[name].value = good
    assert explorer.problem.value == ""


def test_reprs_are_fixed_and_fit_into_a_notebook() -> None:
    texts = {
        MLAExplorer: "MLAExplorer: cached = 1 x 131,072 tokens; MLA latent = 576 numbers a layer "
        "(1.00x), 70,272 B a token, 8.58 GiB",
        RopeExplorer: "RopeExplorer: distance m - n = 7; score = 0.727010; "
        "score, both positions + 100 = 0.727010",
        YarnExplorer: "YarnExplorer: pairs untouched = 0 to 10 (11); pairs blended = 11 to 22 (12)",
    }
    for kind, text in texts.items():
        assert repr(kind()) == text
        assert len(text) <= 110


def test_texts_are_escaped_and_long_tables_split() -> None:
    html = table({f"<{row}>": "a & b" for row in range(17)})
    assert "<0>" not in html
    assert html.count("&lt;") == 17
    assert html.count("a &amp; b") == 17
    assert html.count("<table") == 2

    def refuse(size: int) -> dict[str, str]:
        if size > 1:
            raise ValueError("<script>")
        return {"size": "1"}

    def draw(size: int) -> Figure:
        return new_figure(1, 1)

    explorer = Explorer({"size": slider("size", 1, 0, 3)}, draw, refuse, "nothing")
    explorer.controls["size"].value = 2
    assert explorer.problem.value == "<b>Not possible:</b> &lt;script&gt;"
    assert repr(explorer) == "Explorer: size = 1"


# ---------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize(
    ("draw", "values"),
    [
        (cache_figure, {}),
        (cache_figure, {"num_attention_heads": 256, "batch": 1024, "dtype": "FP32"}),
        (cache_figure, {"context": 1024, "num_hidden_layers": 1, "num_key_value_heads": 1}),
        (rope_figure, {}),
        (rope_figure, {"query": 0, "key": 200, "pair": 63, "width": 128, "theta": 1e6}),
        (yarn_figure, {}),
        (yarn_figure, {"factor": 1, "original": 64, "width": 8, "theta": 100.0}),
        (yarn_figure, {"factor": 64, "original": 32768, "width": 128, "theta": 1e6}),
    ],
)
def test_axes_are_labelled_and_no_text_is_cut_off_or_small(
    draw: Callable[..., Figure], values: dict[str, Any]
) -> None:
    figure = draw(**values)
    figure.draw_without_rendering()
    width, height = figure.get_size_inches() * figure.dpi
    for axes in figure.axes:
        assert axes.get_xlabel()
        assert axes.get_title()
        names = [label.get_text() for label in axes.get_yticklabels()]
        assert axes.get_ylabel() or "MHA" in names
        texts = [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
        for text in filter(lambda text: text.get_text(), texts):
            assert text.get_fontsize() >= 9
            box = text.get_window_extent()
            assert box.x0 >= -1, text
            assert box.y0 >= -1, text
            assert box.x1 <= width + 1, text
            assert box.y1 <= height + 1, text


@pytest.mark.parametrize("module", [mla_explorer, rope_explorer, yarn_explorer])
def test_alt_texts_are_one_or_a_few_sentences(module: Any) -> None:
    assert module.ALT.endswith(".")
    assert len(module.ALT) < 300
