"""How RoPE tells distances: one pair as arrows, all pairs as clocks, and the score they add up to.

Why: pair i of a query or key is turned by position x theta_i. Turning both arrows further by the
same angle leaves the angle between them, so a dot product knows the distance m - n and nothing
else. Fast pairs come round every few tokens and tell neighbours apart; slow ones hardly move within
a text and tell far from near.

Query and key are the same vector here, all ones over sqrt(width): the score is then the mean of
cos((m - n) theta_i) over the pairs, 1 at distance 0 and the same in both directions.

``rope_figure`` and ``rope_numbers`` are plain functions; ``RopeExplorer`` puts sliders on them.
"""

from __future__ import annotations

import math

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator
from torch import Tensor

from dsv3_mini.config import ConfigError
from dsv3_mini.rope import apply_rope, frequencies
from dsv3_mini.viz.shell import Explorer, choice, slider
from dsv3_mini.viz.style import COLOURS, DASHES, INK, new_figure, styled

ALT = (
    "Left: one pair of the query and of the key as arrows, before and after they are turned by "
    "their positions. Middle: tokens until each pair has come round, on a log scale. Right: the "
    "score against the distance of query and key."
)
FARTHEST = 256  # tokens of distance drawn
SHIFT = 100  # tokens by which both positions move, to show that the score stays


def turned(positions: Tensor, width: int, theta: float) -> Tensor:
    """The all-ones vector of length 1 after its rotation at each position: (T, width)."""
    angle_TR = positions.double()[:, None] * frequencies(width, theta).double()
    ones_TR = torch.ones(len(positions), width, dtype=torch.float64) / math.sqrt(width)
    return apply_rope(ones_TR, angle_TR.cos(), angle_TR.sin())


def score(query: int, key: int, width: int = 64, theta: float = 10000.0) -> float:
    """The dot product of the vector turned to position ``query`` and the one turned to ``key``."""
    q_R, k_R = turned(torch.tensor([query, key]), width, theta)
    return float(q_R @ k_R)


def _check(query: int, key: int, pair: int, width: int, theta: float) -> None:
    if width < 2 or width % 2:
        raise ConfigError(f"width is {width}; expected an even width: RoPE turns pairs")
    if not 0 <= pair < width // 2:
        raise ConfigError(
            f"pair is {pair}, but a width of {width} has pairs 0 to {width // 2 - 1}; "
            "choose one of them or a larger width"
        )
    if min(query, key) < 0 or not theta > 1:
        raise ConfigError(
            f"positions are {query} and {key} and theta is {theta}; expected 0 or more, and above 1"
        )


def rope_numbers(
    query: int = 12, key: int = 5, pair: int = 4, width: int = 64, theta: float = 10000.0
) -> dict[str, str]:
    """The pair's angles at both positions, the distance and the score, as texts."""
    _check(query, key, pair, width, theta)
    speed = float(frequencies(width, theta)[pair])

    def angle(position: int) -> str:
        radians = position * speed
        return f"{radians:.4f} rad = {radians / (2 * math.pi):.4f} turns"

    return {
        "distance m - n": f"{query - key}",
        "score": f"{score(query, key, width, theta):.6f}",
        f"score, both positions + {SHIFT}": (
            f"{score(query + SHIFT, key + SHIFT, width, theta):.6f}"
        ),
        f"pair {pair}, theta": f"{speed:.4g} rad per token",
        f"pair {pair}, wavelength": f"{2 * math.pi / speed:,.2f} tokens",
        f"pair {pair}, query turned": angle(query),
        f"pair {pair}, key turned": angle(key),
        f"pair {pair}, difference": angle(query - key),
    }


def rope_figure(
    query: int = 12, key: int = 5, pair: int = 4, width: int = 64, theta: float = 10000.0
) -> Figure:
    """The chosen pair turned, every pair's wavelength, and the score against the distance."""
    _check(query, key, pair, width, theta)
    with styled():
        figure = new_figure(9.8, 3.9)
        arrows, waves, scores = figure.subplots(1, 3, width_ratios=(4, 4, 5))
        _arrow_panel(arrows, query, key, pair, width, theta)
        _wave_panel(waves, pair, width, theta)
        _score_panel(scores, abs(query - key), width, theta)
    return figure


def _arrow_panel(
    axes: Axes, query: int, key: int, pair: int, width: int, theta: float
) -> None:  # fmt: skip
    positions = torch.tensor([0, key, query])
    start, k, q = turned(positions, width, theta)[:, 2 * pair : 2 * pair + 2].numpy()
    radius = math.sqrt(2 / width)
    looks = (
        (start, INK, 1.0, DASHES[3], "both before turning"),
        (k, COLOURS[3], 4.0, DASHES[0], f"key turned by n θ, n = {key}"),
        (q, COLOURS[0], 1.8, DASHES[0], f"query turned by m θ, m = {query}"),
    )
    for (x, y), colour, thickness, dash, label in looks:
        axes.plot([], [], color=colour, linewidth=thickness, linestyle=dash, label=label)
        arrow = {"arrowstyle": "-|>", "color": colour, "linewidth": thickness, "linestyle": dash}
        arrow |= {"shrinkA": 0, "shrinkB": 0, "mutation_scale": 10 + 2 * thickness}
        axes.annotate("", (x, y), (0, 0), arrowprops=arrow)
    speed = float(frequencies(width, theta)[pair])
    _arc(axes, key * speed, query * speed, 0.4 * radius)
    axes.set(xlim=(-1.25 * radius, 1.25 * radius), ylim=(-1.25 * radius, 1.25 * radius))
    axes.set_aspect("equal")
    axes.locator_params(nbins=5)
    axes.set_xlabel(f"number {2 * pair} of the vector")
    axes.set_ylabel(f"number {2 * pair + 1}")
    angle = f"{(query - key) * speed:.3g}".replace("-", "−")
    axes.set_title(f"Pair {pair}: (m − n) θ = {angle} rad")
    axes.figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower left", ncols=3, frameon=False
    )


def _arc(axes: Axes, start: float, end: float, radius: float) -> None:
    # From the key's angle to the query's; both began at 45 degrees, as all ones do.
    end = start + max(-2 * math.pi, min(2 * math.pi, end - start))
    angles = torch.linspace(start, end, 60) + math.pi / 4
    x, y = radius * angles.cos(), radius * angles.sin()
    axes.plot(x.numpy(), y.numpy(), color=COLOURS[1], linewidth=1.4)


def _wave_panel(axes: Axes, pair: int, width: int, theta: float) -> None:
    lengths = (2 * math.pi / frequencies(width, theta)).tolist()
    axes.plot(lengths, "o", color=COLOURS[2], markersize=3.5)
    axes.plot(pair, lengths[pair], "D", color=COLOURS[1], markersize=9)
    right = pair >= len(lengths) / 2
    axes.annotate(
        f"pair {pair}: {lengths[pair]:,.1f}", (pair, lengths[pair]), fontsize=9,
        xytext=(-9, 5) if right else (9, -5), textcoords="offset points",
        ha="right" if right else "left", va="bottom" if right else "top",
    )  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_minor_locator(NullLocator())  # a quarter of the drawing time
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.margins(x=0.08, y=0.12)
    axes.set(xlabel="pair", ylabel="wavelength 2π / θ (tokens)", title="Tokens until a full turn")


def _score_panel(axes: Axes, distance: int, width: int, theta: float) -> None:
    vectors = turned(torch.arange(FARTHEST + 1), width, theta)
    curve = (vectors @ vectors[0]).tolist()
    axes.plot(curve, color=COLOURS[0], linewidth=1.4)
    axes.axhline(0, color=INK, linewidth=0.8)
    if distance <= FARTHEST:
        axes.axvline(distance, color=COLOURS[1], linestyle=DASHES[1], linewidth=1.2)
        axes.plot(distance, curve[distance], "D", color=COLOURS[1], markersize=7)
        title = f"Score {curve[distance]:.3f} at distance {distance}"
    else:
        title = f"Score; distance {distance:,} lies to the right"
    axes.set(xlim=(-6, FARTHEST + 6), xlabel="distance |m − n| (tokens)", title=title)
    axes.set_ylabel("score q·k (no unit)")


class RopeExplorer(Explorer):
    """Sliders over ``rope_figure`` and ``rope_numbers``, starting at V3's width and theta."""

    def __init__(self) -> None:
        bases = {f"{base:,}": float(base) for base in _bases()}
        controls = {
            "query": slider("position m of the query", 12, 0, 200),
            "key": slider("position n of the key", 5, 0, 200),
            "pair": slider("pair shown", 4, 0, 63),
            "width": slider("rotary width", 64, 8, 128, 2),
            "theta": choice("theta, the base", 10000.0, bases),
        }
        super().__init__(controls, rope_figure, rope_numbers, ALT)


def _bases() -> list[int]:
    return [step * 10**power for power in range(2, 6) for step in (1, 2, 5)] + [1_000_000]
