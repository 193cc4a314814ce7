"""One DeepSeek-V3 layer as a picture: every tensor with its shape, at one or more scales.

The shapes come from the config, never from the drawing; a test compares them with the tensors
that a real layer makes.
"""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from dsv3_mini.config import ModelConfig
from dsv3_mini.viz.style import COLOURS, INK, new_figure, styled

ALT = (
    "One DeepSeek-V3 layer. Above, attention: the hidden state is projected to a query latent, a "
    "key-value latent and one rotary key; the last two are cached. Queries, keys and values are "
    "expanded per head from the latents and attended. Below, the mixture of experts: a router "
    "scores all experts, a few are chosen, and a shared expert always runs."
)


def block_tensors(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Each tensor of one MoE layer and its shape for T tokens of one sequence, as text.

    Names are the report's symbols (eqs 1-16); a query without compression has no c_Q.
    """
    heads, hidden = config.num_attention_heads, config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "h": (hidden,),
        "c_Q": (config.q_lora_rank or 0,),
        "q_C": (heads, config.qk_nope_head_dim),
        "q_R": (heads, config.qk_rope_head_dim),
        "c_KV": (config.kv_lora_rank,),
        "k_R": (config.qk_rope_head_dim,),
        "k_C": (heads, config.qk_nope_head_dim),
        "v_C": (heads, config.v_head_dim),
        "o": (heads, config.v_head_dim),
        "u": (hidden,),
        "s": (config.n_routed_experts,),
        "g": (config.num_experts_per_tok,),
        "routed": (config.num_experts_per_tok, config.moe_intermediate_size),
        "shared": (config.n_shared_experts * config.moe_intermediate_size,),
        "h'": (hidden,),
    }
    return {name: ("T", *(f"{n:,}" for n in shape)) for name, shape in shapes.items()}


# name: (x, y, label); the unit is a grid cell of the drawing.
_TENSORS = {
    "h": (0, 3.0, r"$h_t$  stream"),
    "c_Q": (2, 4.4, r"$c_t^{Q}$  query latent"),
    "q_C": (4, 4.95, r"$q_{t,i}^{C}$  content"),
    "q_R": (4, 3.95, r"$q_{t,i}^{R}$  rotated"),
    "c_KV": (2, 2.4, r"$c_t^{KV}$  CACHED"),
    "k_C": (4, 2.85, r"$k_{t,i}^{C}$  content"),
    "v_C": (4, 1.9, r"$v_{t,i}^{C}$  value"),
    "k_R": (4, 0.9, r"$k_t^{R}$  rotated, CACHED"),
    "o": (6, 3.0, r"$o_{t,i}$  per head"),
    "u": (8, 3.0, r"$u_t$  attention out"),
    "s": (2, -0.9, r"$s_{i,t}$  affinities"),
    "g": (4, -0.9, r"$g_{i,t}$  gates of chosen"),
    "routed": (6, -0.9, "inside routed experts"),
    "shared": (6, -2.0, "inside shared expert"),
    "h'": (8, -1.4, r"$h'_t$  stream"),
}
# from, to, what happens on the way
_ARROWS = (
    ("h", "c_Q", "q_a_proj"),
    ("c_Q", "q_C", "norm,\nq_b_proj"),
    ("c_Q", "q_R", "then RoPE"),
    ("h", "c_KV", "kv_a_proj,\nnorm"),
    ("c_KV", "k_C", "kv_b_proj"),
    ("c_KV", "v_C", ""),
    ("q_C", "o", ""),
    ("q_R", "o", ""),
    ("k_C", "o", ""),
    ("v_C", "o", ""),
    ("k_R", "o", ""),
    ("o", "u", "o_proj"),
    ("s", "g", "+ bias,\ngroups,\ntop-k"),
    ("g", "routed", "experts"),
    ("routed", "h'", "sum"),
    ("shared", "h'", ""),
)
_CACHED = ("c_KV", "k_R")
_WIDTH, _HEIGHT, _STEP = 1.42, 0.72, 1.32


def block_diagram(configs: dict[str, ModelConfig]) -> Figure:
    """Draw one MoE layer, its shapes written once per entry of ``configs`` (label to config)."""
    with styled():
        figure = new_figure(13, 7.6)
        axes = figure.add_subplot()
        axes.set_xlim(-0.95, 11.35)
        axes.set_ylim(-2.75, 5.95)
        axes.axis("off")
        shapes = {label: block_tensors(config) for label, config in configs.items()}
        for name, (x, y, label) in _TENSORS.items():
            lines = [f"{at}: ({', '.join(table[name])})" for at, table in shapes.items()]
            _box(axes, x * _STEP, y, label, lines, name in _CACHED)
        for start, end, text in _ARROWS:
            _arrow(axes, start, end, text)
        _margins(axes)
    return figure


def _box(axes: Axes, x: float, y: float, label: str, lines: list[str], cached: bool) -> None:
    height = _HEIGHT * (0.55 + 0.23 * len(lines))
    box = FancyBboxPatch(
        (x - _WIDTH / 2, y - height / 2), _WIDTH, height, boxstyle="round,pad=0.02",
        facecolor="#f3ead6" if cached else "white", edgecolor=COLOURS[1] if cached else INK,
        linewidth=2.4 if cached else 1.0, zorder=3,
    )  # fmt: skip
    axes.add_patch(box)
    text = "\n".join([label, *lines])
    axes.text(x, y, text, ha="center", va="center", fontsize=9, linespacing=1.35, zorder=4)


def _arrow(axes: Axes, start: str, end: str, text: str) -> None:
    (x0, y0, _), (x1, y1, _) = _TENSORS[start], _TENSORS[end]
    tail, head = (x0 * _STEP + _WIDTH / 2, y0), (x1 * _STEP - _WIDTH / 2 - 0.03, y1)
    arrow = {"arrowstyle": "-|>", "color": INK, "linewidth": 0.9, "shrinkA": 1, "shrinkB": 1}
    axes.annotate("", xy=head, xytext=tail, arrowprops=arrow, zorder=1)
    if text:
        _label(axes, (tail[0] + head[0]) / 2, (tail[1] + head[1]) / 2, text)


def _label(axes: Axes, x: float, y: float, text: str) -> None:
    white = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
    axes.text(x, y, text, ha="center", va="center", fontsize=9, style="italic", bbox=white)


def _margins(axes: Axes) -> None:
    axes.text(-0.9, 5.72, "Attention (report eqs 1-11)", fontsize=12, weight="bold")
    axes.text(-0.9, -0.05, "Mixture of experts (report eqs 12-16)", fontsize=12, weight="bold")
    axes.plot([-0.9, 11.3], [0.32, 0.32], color=INK, linewidth=0.6, linestyle=":")
    note = (
        "Both halves read norm(stream)\nand add their result to the stream.\n"
        "i counts heads or experts.\nShapes for T tokens of one sequence."
    )
    axes.text(-0.9, 0.62, note, fontsize=9, va="bottom", linespacing=1.4)
    axes.text(0.0, -0.9, "norm($u_t + h_t$)", fontsize=10, ha="center", va="center")
    style = {"arrowstyle": "-|>", "color": INK, "linewidth": 0.9}
    left = 2 * _STEP - _WIDTH / 2 - 0.03
    axes.annotate("", xy=(left, -0.9), xytext=(0.62, -0.9), arrowprops=style)
    _label(axes, 1.25, -0.9, "gate")
    # From the stream itself, past the latent: the rotary key is not made from c_KV.
    rotary = (4 * _STEP - _WIDTH / 2 - 0.03, 0.9)
    axes.annotate("", xy=rotary, xytext=(0.15, 2.62), arrowprops=style)
    _label(axes, 2.75, 1.5, "kv_a_proj, RoPE")
    corner = 6 * _STEP - _WIDTH / 2 - 0.03
    axes.annotate("", xy=(corner, -2.0), xytext=(0.3, -1.12), arrowprops=style)
    _label(axes, 3.0, -1.62, "every token, no router")
