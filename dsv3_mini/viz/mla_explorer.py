"""What a KV cache costs: MLA beside the multi-head, grouped and multi-query attention it replaces.

Why: a decode step makes one token but reads the whole cache and all the weights, so a long context
is paid for in bytes. Multi-head attention keeps 2 x heads x width numbers a token and layer,
grouped-query attention saves by sharing keys among heads, and MLA keeps one latent and one rotary
key whatever the number of heads. The yardsticks have heads of width ``v_head_dim`` and the same
number of heads, layers and hidden units; weights and cache are taken to be of one dtype.

``cache_figure`` and ``cache_numbers`` are plain functions of sizes (V3's where none is given), all
through ``accounting`` or real shapes; ``MLAExplorer`` puts sliders on them.
"""

from __future__ import annotations

import math

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsv3_mini import measure
from dsv3_mini.accounting import cache_bytes, cache_numbers_per_token, count_parameters
from dsv3_mini.config import ConfigError, ModelConfig
from dsv3_mini.mla import MultiHeadLatentAttention
from dsv3_mini.viz.shell import Explorer, choice, slider
from dsv3_mini.viz.style import COLOURS, INK, new_figure, styled

ALT = (
    "Left: bars of the cache bytes at the chosen context for multi-head, grouped, multi-query and "
    "both forms of latent attention. Right: how much of what a decode step reads is weights and "
    "how much is cache, for multi-head attention and for MLA's latents."
)
BYTES = {"FP8": 1, "BF16": 2, "FP32": 4}
MHA, MQA, EXPANDED, LATENT = "MHA", "MQA", "MLA expanded", "MLA latent"


def readable(size: float) -> str:
    """A number of bytes with its binary unit: '70,272 B' below a MiB, then '8.58 GiB'."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB")):
        if size >= 1024**power:
            return f"{size / 1024**power:,.2f} {unit}"
    return f"{size:,.0f} B"


def mla_config(**sizes: int) -> ModelConfig:
    """V3 with some sizes changed; ``q_lora_rank=0`` leaves queries whole. Raises ConfigError."""
    changes: dict[str, int | None] = dict(sizes)
    if "q_lora_rank" in changes:
        changes["q_lora_rank"] = changes["q_lora_rank"] or None
    # Which layers are dense, and the yardstick's key heads, are no matter of MLA.
    heads = sizes.get("num_attention_heads", ModelConfig.v3().num_attention_heads)
    return ModelConfig.v3().replace(first_k_dense_replace=0, num_key_value_heads=heads, **changes)


def kinds(config: ModelConfig, groups: int) -> dict[str, measure.Kind]:
    """The five caches compared, under the names of the picture."""
    found = measure.kinds(config, groups)
    return {
        MHA: found["MHA"],
        f"GQA, {groups} group{'s' if groups != 1 else ''}": found["GQA"],
        MQA: found["MQA"],
        EXPANDED: found["MLA, expanded"],
        LATENT: found["MLA, absorbed"],
    }


def projections(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Every matrix of one MLA layer and its shape (out, in), from the module itself."""
    with torch.device("meta"):
        layer = MultiHeadLatentAttention(config)
    shapes = {name: tuple(value.shape) for name, value in layer.named_parameters()}
    return {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in shapes.items()
        if len(shape) == 2
    }


def decode_reads(
    config: ModelConfig, context: int, batch: int, dtype: str, expanded: bool = False
) -> tuple[int, int]:
    """Bytes of attention weights and of cache that one decode step reads, over all layers.

    Weights are read once for the whole batch (absorbed or not), the cache for every sequence.
    """
    weights = count_parameters(config).attention * BYTES[dtype]
    return weights, cache_bytes(config, context, batch, BYTES[dtype], expanded)


def _check(context: int, batch: int, dtype: str) -> None:
    if dtype not in BYTES:
        raise ConfigError(f"dtype is {dtype!r}; expected one of {list(BYTES)}")
    if context < 1 or batch < 1:
        raise ConfigError(f"context is {context} and batch {batch}; expected at least 1 of each")


def cache_numbers(
    num_key_value_heads: int = 8,
    context: int = 131072,
    batch: int = 1,
    dtype: str = "BF16",
    **sizes: int,
) -> dict[str, str]:
    """Cache sizes of all five kinds, MLA's matrices, and what a decode step reads, as texts."""
    _check(context, batch, dtype)
    config, width = mla_config(**sizes), BYTES[dtype]
    compared = kinds(config, num_key_value_heads)
    latent = cache_numbers_per_token(config)
    rows = {"cached": f"{batch:,} x {context:,} tokens"}
    for name, kind in reversed(compared.items()):
        count = cache_numbers_per_token(kind.config, kind.expanded)
        per_token = cache_bytes(kind.config, 1, 1, width, kind.expanded)
        total = cache_bytes(kind.config, context, batch, width, kind.expanded)
        rows[name] = (
            f"{count:,} numbers a layer ({count / latent:.2f}x), {per_token:,} B a token, "
            f"{readable(total)}"
        )
    one_group = cache_numbers_per_token(compared[MQA].config)
    rows["GQA groups that cost as much as MLA latent"] = f"{latent / one_group:.2f}"
    shapes = projections(config)
    for name, (out, inputs) in shapes.items():
        rows[f"{name}, {out:,} x {inputs:,}"] = f"{out * inputs:,} parameters"
    every = sum(math.prod(shape) for shape in shapes.values())
    rows["all projections of a layer"] = f"{every:,} parameters"
    for name in (LATENT, MHA):
        weights, cache = decode_reads(compared[name].config, context, batch, dtype)
        share = cache / (weights + cache)
        rows[f"{name}: attention reads in a step"] = (
            f"{readable(weights + cache)}, {share:.1%} of it cache"
        )
    return rows


def cache_figure(
    num_key_value_heads: int = 8,
    context: int = 131072,
    batch: int = 1,
    dtype: str = "BF16",
    **sizes: int,
) -> Figure:
    """Cache bytes of the five kinds, and what a decode step reads: weights against cache."""
    _check(context, batch, dtype)
    compared = kinds(mla_config(**sizes), num_key_value_heads)
    width = BYTES[dtype]
    cached = {
        name: cache_bytes(kind.config, context, batch, width, kind.expanded)
        for name, kind in compared.items()
    }
    read = {
        name: decode_reads(compared[name].config, context, batch, dtype) for name in (MHA, LATENT)
    }
    with styled():
        figure = new_figure(9.6, 3.6)
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        _cache_panel(left, cached)
        _reads_panel(right, read)
        sequences = "one sequence" if batch == 1 else f"{batch:,} sequences"
        left.set_title(f"KV cache of {sequences} of {context:,} tokens, {dtype}")
    return figure


def _cache_panel(axes: Axes, cached: dict[str, int]) -> None:
    largest, latent = max(cached.values()), cached[LATENT]
    power, unit = next(
        (p, u) for p, u in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB"), (0, "B"))
        if largest >= 1024**p
    )  # fmt: skip
    sizes = [size / 1024**power for size in cached.values()]
    colours = [COLOURS[3] if name == LATENT else COLOURS[0] for name in cached]
    axes.barh(range(len(sizes)), sizes, 0.62, color=colours)
    for row, size in enumerate(cached.values()):
        label = f" {readable(size)}, {size / latent:.2f}x"
        axes.text(size / 1024**power, row, label, va="center", fontsize=9)
    axes.set_yticks(range(len(sizes)), list(cached))
    axes.invert_yaxis()
    axes.set_xlim(0, max(sizes) * 1.5)
    axes.set_xlabel(f"cache ({unit}); x: multiple of MLA latent")
    axes.grid(axis="y", visible=False)


def _reads_panel(axes: Axes, read: dict[str, tuple[int, int]]) -> None:
    for row, (weights, cache) in enumerate(read.values()):
        share = 100 * weights / (weights + cache)
        axes.barh(row, share, 0.5, color=COLOURS[4], edgecolor=INK, hatch="//")
        axes.barh(row, 100 - share, 0.5, left=share, color=COLOURS[0], edgecolor=INK)
        text = f"weights {readable(weights)} ({share:.0f}%), cache {readable(cache)}"
        axes.text(1, row - 0.33, text, va="bottom", fontsize=9)
    axes.set_yticks(range(len(read)), list(read))
    axes.set_ylim(len(read) - 0.5, -0.75)
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the bytes (%)\nhatched: weights, solid: cache")
    axes.set_title("What attention reads in a decode step")
    axes.grid(axis="y", visible=False)


class MLAExplorer(Explorer):
    """Sliders over ``cache_figure`` and ``cache_numbers``, starting at V3's sizes."""

    def __init__(self) -> None:
        v3 = ModelConfig.v3()
        powers = {f"{2**power}": 2**power for power in range(8)}
        contexts = {f"{2**power}K": 1024 * 2**power for power in range(8)}
        batches = {f"{2**power}": 2**power for power in range(11)}
        name = "num_key_value_heads"
        controls = {
            "num_attention_heads": slider("num_attention_heads", v3.num_attention_heads, 8, 256, 8),
            name: choice(f"{name} (GQA)", 8, powers),
            "kv_lora_rank": slider("kv_lora_rank", v3.kv_lora_rank, 32, 2048, 32),
            "q_lora_rank": slider("q_lora_rank (0: none)", v3.q_lora_rank or 0, 0, 4096, 64),
            "qk_nope_head_dim": slider("qk_nope_head_dim", v3.qk_nope_head_dim, 16, 256, 16),
            "qk_rope_head_dim": slider("qk_rope_head_dim", v3.qk_rope_head_dim, 8, 256, 8),
            "v_head_dim": slider("v_head_dim", v3.v_head_dim, 16, 256, 16),
            "hidden_size": slider("hidden_size", v3.hidden_size, 256, 16384, 256),
            "num_hidden_layers": slider("num_hidden_layers", v3.num_hidden_layers, 1, 128),
            "context": choice("context (tokens)", contexts["128K"], contexts),
            "batch": choice("batch (sequences)", 1, batches),
            "dtype": choice("dtype", "BF16", {f"{kind} ({BYTES[kind]} B)": kind for kind in BYTES}),
        }
        super().__init__(controls, cache_figure, cache_numbers, ALT)
