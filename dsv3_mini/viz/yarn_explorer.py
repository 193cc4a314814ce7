"""YaRN: which pairs a longer context slows down, which it leaves alone, and what becomes of logits.

Why: a model trained on 4K tokens knows a pair that turned many times at every angle, and may keep
it as it is: it tells neighbours apart. A pair that made less than one turn has shown only a part
of its circle; at 160K tokens it would reach angles nobody trained. Dividing every frequency by the
factor (plain interpolation) cures that and blurs the neighbours; YaRN divides only the slow pairs,
with a ramp between. ``beta_fast`` and ``beta_slow`` are where the ramp begins and ends, in turns
over the training length. Since a softmax over more keys is flatter, logits grow by mscale squared.

``yarn_figure`` and ``yarn_numbers`` are plain functions; ``YarnExplorer`` puts sliders on them.
"""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from dsv3_mini.config import ConfigError, ModelConfig, RopeScaling
from dsv3_mini.rope import frequencies, softmax_scale, yarn_mscale, yarn_ramp
from dsv3_mini.viz.shell import Explorer, choice, slider
from dsv3_mini.viz.style import COLOURS, DASHES, INK, new_figure, styled

ALT = (
    "Left: how far each pair is interpolated, a ramp from 0 for fast pairs to 1 for slow ones. "
    "Right: tokens until each pair has come round, plain, with every pair stretched, and with "
    "YaRN, beside the trained and the stretched length."
)


def scaling_of(
    factor: float, original: int, beta_fast: float, beta_slow: float, mscale: float
) -> RopeScaling:
    """YaRN's numbers, with one mscale for both of its fields. Raises ConfigError."""
    return RopeScaling(factor, original, beta_fast, beta_slow, mscale, mscale)


def parts(ramp: list[float]) -> tuple[list[int], list[int], list[int]]:
    """The pairs left alone, those blended, and those divided by the whole factor."""
    return (
        [pair for pair, share in enumerate(ramp) if share == 0],
        [pair for pair, share in enumerate(ramp) if 0 < share < 1],
        [pair for pair, share in enumerate(ramp) if share == 1],
    )


def model_config(scaling: RopeScaling, width: int, theta: float, head_width: int) -> ModelConfig:
    """V3 with these rotary numbers and query heads of ``head_width``. Raises ConfigError."""
    if head_width <= width:
        raise ConfigError(
            f"a head of width {head_width} has no room for content beside {width} rotary numbers; "
            f"expected more than {width}"
        )
    return ModelConfig.v3().replace(
        rope_scaling=scaling, rope_theta=theta, qk_rope_head_dim=width,
        qk_nope_head_dim=head_width - width,
    )  # fmt: skip


def yarn_numbers(
    factor: float = 40, original: int = 4096, beta_fast: float = 32, beta_slow: float = 1,
    mscale: float = 1.0, width: int = 64, theta: float = 10000.0, head_width: int = 192,
) -> dict[str, str]:  # fmt: skip
    """The ramp's pairs, the temperature and the softmax scale, as texts."""
    scaling = scaling_of(factor, original, beta_fast, beta_slow, mscale)
    config = model_config(scaling, width, theta, head_width)
    kept, blended, divided = parts(yarn_ramp(width, theta, scaling).tolist())
    term = yarn_mscale(factor, mscale)
    return {
        "pairs untouched": _span(kept),
        "pairs blended": _span(blended),
        f"pairs divided by {factor:g}": _span(divided),
        "trained length": f"{original:,} tokens",
        "stretched length": f"{factor * original:,.0f} tokens",
        "mscale, 0.1 m ln s + 1": f"{term:.5f}",
        "mscale squared": f"{term**2:.6f}",
        "softmax scale": f"{softmax_scale(config):.6f}",
        f"softmax scale without YaRN, 1 / sqrt({head_width})": (
            f"{softmax_scale(config.replace(rope_scaling=None)):.7f}"
        ),
    }


def _span(pairs: list[int]) -> str:
    if not pairs:
        return "none"
    return f"{pairs[0]} to {pairs[-1]} ({len(pairs)})" if len(pairs) > 1 else f"{pairs[0]} (1)"


def yarn_figure(
    factor: float = 40, original: int = 4096, beta_fast: float = 32, beta_slow: float = 1,
    mscale: float = 1.0, width: int = 64, theta: float = 10000.0, head_width: int = 192,
) -> Figure:  # fmt: skip
    """The ramp over the pairs, and every pair's wavelength before and after stretching."""
    scaling = scaling_of(factor, original, beta_fast, beta_slow, mscale)
    model_config(scaling, width, theta, head_width)
    with styled():
        figure = new_figure(9.6, 3.8)
        left, right = figure.subplots(1, 2, width_ratios=(2, 3))
        _ramp_panel(left, yarn_ramp(width, theta, scaling).tolist(), factor)
        _wave_panel(right, width, theta, scaling)
    return figure


def _ramp_panel(axes: Axes, ramp: list[float], factor: float) -> None:
    kept, _, divided = parts(ramp)
    axes.plot(ramp, "o-", color=COLOURS[0], markersize=3.5)
    if kept:
        axes.axvline(kept[-1], color=COLOURS[2], linestyle=DASHES[1], linewidth=1.2)
        axes.text(kept[-1], 1.07, f"{kept[-1]} ", ha="right", fontsize=9)
    if divided:
        axes.axvline(divided[0], color=COLOURS[1], linestyle=DASHES[2], linewidth=1.2)
        axes.text(divided[0], 1.07, f" {divided[0]}", fontsize=9)
    left = f"Untouched to pair {kept[-1]}" if kept else "None untouched"
    right = f"÷ {factor:g} from pair {divided[0]}" if divided else f"none ÷ {factor:g}"
    axes.set(ylim=(-0.1, 1.16), xlabel="pair", title=f"{left}, {right}")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_ylabel("share interpolated (0 to 1)")


def _wave_panel(axes: Axes, width: int, theta: float, scaling: RopeScaling) -> None:
    factor, length = scaling.factor, scaling.original_max_position_embeddings
    plain = 2 * math.pi / frequencies(width, theta)
    yarn = 2 * math.pi / frequencies(width, theta, scaling)
    axes.plot((plain * factor).tolist(), color=COLOURS[3], linestyle=DASHES[1], linewidth=3)
    axes.plot(plain.tolist(), color=COLOURS[2], linestyle=DASHES[2], linewidth=3)
    axes.plot(yarn.tolist(), "o-", color=COLOURS[0], linewidth=1.2, markersize=3.5)
    names = (f"every pair ÷ {factor:g}", "plain RoPE", "YaRN")
    axes.legend(axes.get_lines(), names, loc="lower right", framealpha=1, edgecolor="white")
    lengths = [(length, f" trained:\n {length:,}", "top")]
    if factor > 1:
        lengths.append((round(factor * length), f" stretched:\n {factor * length:,.0f}", "bottom"))
    for level, label, side in lengths:
        axes.axhline(level, color=INK, linewidth=1, linestyle=DASHES[3])
        axes.text(
            1, level, label, fontsize=9, va=side, transform=axes.get_yaxis_transform(),
        )  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_minor_locator(NullLocator())  # a quarter of the drawing time
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    axes.set(xlabel="pair", ylabel="wavelength (tokens)", title="Tokens until a full turn")


class YarnExplorer(Explorer):
    """Sliders over ``yarn_figure`` and ``yarn_numbers``, starting at V3's numbers."""

    def __init__(self) -> None:
        lengths = {f"{2**power:,}": 2**power for power in range(6, 16)}
        bases = {f"{base:,}": float(base) for base in (100, 1000, 10_000, 100_000, 1_000_000)}
        controls = {
            "factor": slider("factor s", 40, 1, 64),
            "original": choice("trained length (tokens)", 4096, lengths),
            "beta_fast": slider("beta_fast (turns)", 32, 1, 128),
            "beta_slow": slider("beta_slow (turns)", 1.0, 0.5, 10.0, 0.5),
            "mscale": slider("mscale, mscale_all_dim", 1.0, 0.0, 2.0, 0.1),
            "width": slider("rotary width", 64, 8, 128, 2),
            "theta": choice("theta, the base", 10000.0, bases),
            "head_width": slider("query head width", 192, 16, 512, 16),
        }
        super().__init__(controls, yarn_figure, yarn_numbers, ALT)
