"""Where 671B and 37B come from: change any config field, see everything that follows from it.

``breakdown`` is a plain function from a config to a figure, and ``summary`` one to numbers;
``config_explorer`` is a thin shell of ipywidgets over both.
"""

from __future__ import annotations

from typing import Any

import ipywidgets as widgets
from matplotlib.figure import Figure

from dsv3_mini.accounting import (
    cache_bytes,
    count_parameters,
    forward_flops,
    training_flops_per_token,
)
from dsv3_mini.config import ConfigError, ModelConfig, RopeScaling
from dsv3_mini.viz.shell import refusal
from dsv3_mini.viz.style import COLOURS, new_figure, png, styled

PARTS = {
    "routed_experts": "routed experts",
    "attention": "attention",
    "shared_experts": "shared experts",
    "dense_ffn": "dense feed-forward",
    "embedding": "embedding",
    "head": "output head",
    "routers": "routers",
    "norms": "norms",
}
# Every field of ModelConfig, in three tabs.
GROUPS = {
    "size": ("vocab_size", "hidden_size", "num_hidden_layers", "first_k_dense_replace",
             "intermediate_size", "num_nextn_predict_layers", "max_position_embeddings",
             "rope_theta", "rope_scaling", "rms_norm_eps", "initializer_range"),
    "attention": ("attention", "num_attention_heads", "num_key_value_heads", "q_lora_rank",
                  "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    "experts": ("n_routed_experts", "num_experts_per_tok", "n_shared_experts",
                "moe_intermediate_size", "n_group", "topk_group", "norm_topk_prob",
                "routed_scaling_factor"),
}  # fmt: skip


def human(number: float) -> str:
    """1,234 as text, and 671.0 billion as '671.03B'."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.2f}{letter}"
    return f"{number:,.0f}"


def summary(config: ModelConfig, context: int = 4096) -> dict[str, int]:
    """The figures that follow from a config: parameters, cache bytes (BF16) and operations."""
    parameters = count_parameters(config)
    return {
        "parameters": parameters.total,
        "active per token, without the embedding table": parameters.active,
        "active per token, with it": parameters.active_with_embedding,
        "MTP layers, on top": parameters.mtp,
        "cache bytes per token (BF16)": cache_bytes(config, 1),
        f"cache bytes at {context:,} tokens (BF16)": cache_bytes(config, context),
        f"forward FLOPs per token at context {context:,}": forward_flops(config, context).total,
        f"training FLOPs per token, sequences of {context:,}": training_flops_per_token(
            config, context
        ),
    }


def breakdown(config: ModelConfig) -> Figure:
    """All parameters by part, and those that one token uses, as two bars a part (log axis)."""
    parameters = count_parameters(config)
    names = [name for name in PARTS if getattr(parameters, name)]
    total = [getattr(parameters, name) for name in names]
    active = list(total)
    if "routed_experts" in names:
        active[names.index("routed_experts")] -= parameters.idle_experts
    with styled():
        figure = new_figure(8.6, 0.46 * len(names) + 1.2)
        axes = figure.add_subplot()
        rows = range(len(names))
        axes.barh([r - 0.2 for r in rows], total, 0.38, color=COLOURS[0], label="all")
        axes.barh([r + 0.2 for r in rows], active, 0.38, color=COLOURS[3], label="used by a token")
        for row, (every, used) in enumerate(zip(total, active, strict=True)):
            share = f"{human(every)}  {every / parameters.total:.2%}"
            text = share if every == used else f"{share};  used {human(used)}"
            axes.text(max(every, used) * 1.15, row, text, va="center", fontsize=9)
        axes.set_yticks(list(rows), [PARTS[name] for name in names])
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_xlim(min(active) / 3, max(total) * 3000)
        axes.set_xlabel("parameters (log scale)")
        axes.set_title(
            f"{human(parameters.total)} parameters, {human(parameters.active)} used by one token"
        )
        axes.legend(loc="lower right", frameon=False)
        axes.grid(axis="y", visible=False)
    return figure


class ConfigExplorer(widgets.VBox):  # type: ignore[misc]
    """A field for every entry of the config; ``.config`` is the last valid one.

    A change that cannot work shows the package's own error and leaves the numbers as they were.
    """

    def __init__(self, config: ModelConfig | None = None) -> None:
        self.config = config or ModelConfig.v3()
        self.fields: dict[str, Any] = {}
        self.numbers = widgets.HTML()
        self.problem = widgets.HTML()
        self.picture = widgets.Image(format="png", layout={"max_width": "860px"})
        presets = {"V3 (671B)": "v3", "gpu": "gpu", "mini": "mini", "tiny": "tiny"}
        self.preset = widgets.Dropdown(options=presets, description="start from", value=None)
        self.preset.observe(self._choose_preset, names="value")
        tabs = widgets.Tab([self._group(names) for names in GROUPS.values()])
        tabs.titles = tuple(GROUPS)
        super().__init__([self.preset, tabs, self.problem, self.numbers, self.picture])
        self._show()

    def _group(self, names: tuple[str, ...]) -> widgets.GridBox:
        for name in names:
            self.fields[name] = self._field(name, getattr(self.config, name))
            self.fields[name].observe(self._changed, names="value")
        columns = {"grid_template_columns": "repeat(auto-fill, minmax(340px, 1fr))"}
        return widgets.GridBox([self.fields[name] for name in names], layout=columns)

    def _field(self, name: str, value: Any) -> widgets.Widget:
        look = {"description": name, "style": {"description_width": "210px"}}
        if name == "attention":
            return widgets.Dropdown(options=["mla", "gqa"], value=value, **look)
        if name == "rope_scaling":
            return widgets.Checkbox(value=value is not None, **(look | {"description": "YaRN"}))
        if isinstance(value, bool):
            return widgets.Checkbox(value=value, layout={"width": "auto"}, **look)
        if isinstance(value, float):
            return widgets.FloatText(value=value, **look)
        note = " (0: none)" if name == "q_lora_rank" else ""
        return widgets.IntText(value=value or 0, **(look | {"description": name + note}))

    def _read(self) -> ModelConfig:
        values = {name: field.value for name, field in self.fields.items()}
        values["q_lora_rank"] = values["q_lora_rank"] or None
        if values["rope_scaling"]:
            values["rope_scaling"] = self.config.rope_scaling or RopeScaling()
        else:
            values["rope_scaling"] = None
        return ModelConfig(**values)

    def _changed(self, _: object) -> None:
        try:
            self.config = self._read()
        except ConfigError as error:
            self.problem.value = refusal(error)
            return
        self._show()

    def _choose_preset(self, change: dict[str, Any]) -> None:
        self.config = getattr(ModelConfig, change["new"])()
        for name, field in self.fields.items():
            field.unobserve(self._changed, names="value")
            value = getattr(self.config, name)
            field.value = value is not None if name == "rope_scaling" else (value or 0)
            field.observe(self._changed, names="value")
        self._show()

    def _show(self) -> None:
        self.problem.value = ""
        rows = "".join(
            f"<tr><td>{name}</td><td style='text-align:right'>{value:,}</td>"
            f"<td style='text-align:right'>{human(value)}</td></tr>"
            for name, value in summary(self.config).items()
        )
        self.numbers.value = f"<table style='border-spacing:12px 2px'>{rows}</table>"
        self.picture.value = png(breakdown(self.config))

    def __repr__(self) -> str:
        return f"ConfigExplorer({human(count_parameters(self.config).total)} parameters)"
