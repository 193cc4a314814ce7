"""Who is asked: a sentence through a trained router, token by token.

Why: routing looks like a black box and is four small steps, all of which fit in one picture. Every
expert gets an affinity s; a bias is added; groups stay or drop out by the sum of their best two;
the best of the rest are chosen. What a chosen expert counts, its gate, is made from s alone. So
look for bars whose order the bias changes, and for tall bars in a group that dropped out.

``token_routing`` runs the model and keeps what its own ``Gate`` decided, ``routing_figure`` and
``routing_numbers`` are plain functions of that, and ``RoutingExplorer`` puts controls on them.
Layers carry their numbers in the model, from 0, and only those of the main model are offered.

Legend: T tokens, E experts, K chosen, G groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import ipywidgets as widgets
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.patches import Rectangle
from tokenizers import Tokenizer
from torch import Tensor

from dsv3_mini.config import ModelConfig
from dsv3_mini.course.nodes import nodes_touched
from dsv3_mini.model import Transformer
from dsv3_mini.moe import Routing
from dsv3_mini.viz.shell import Explorer, choice
from dsv3_mini.viz.style import COLOURS, GRID, INK, new_figure, styled

ALT = (
    "Left: heat map of affinities, tokens by experts; chosen experts are dotted, surviving groups "
    "framed. Right: bars of s and s + bias of every expert for one token, and the gates it gave."
)
SENTENCE = "In the beginning was the function, and it returned x + 1."
MOST = 24  # tokens in one picture
WIDEST = 14  # characters of a token
Pick = tuple[int, float, float, float]  # expert, s, bias, gate


@dataclass(frozen=True)
class TokenRouting:
    """One layer's decisions on one text: of its first ``len(tokens)`` of ``total`` tokens."""

    config: ModelConfig
    layer: int
    tokens: list[str]
    total: int
    routing: Routing  # with a batch of one: (1, T, E) affinities, (1, T, K) choices and gates
    bias_E: Tensor
    kept_TG: Tensor  # which groups survived

    @property
    def choice_TE(self) -> Tensor:
        """s + bias of every expert, before groups drop out."""
        return self.routing.scores_BTE[0] + self.bias_E

    @property
    def heading(self) -> str:
        """Layer, and how much of the text is shown."""
        only = "only the first " if len(self.tokens) < self.total else ""
        return f"layer {self.layer}, {only}{len(self.tokens)} of {self.total} tokens"

    @property
    def size(self) -> int:
        """Experts in a group."""
        return self.config.n_routed_experts // self.config.n_group

    def survivors(self, token: int) -> list[int]:
        """The groups that this token may choose from."""
        return self.kept_TG[token].nonzero().flatten().tolist()

    def picks(self, token: int) -> list[Pick]:
        """The chosen experts of this token, by falling s + bias. Raises ValueError."""
        if not 0 <= token < len(self.tokens):
            raise ValueError(f"token is {token}; expected 0 to {len(self.tokens) - 1}")
        chosen_K = self.routing.indices_BTK[0, token]
        score_K, bias_K = self.routing.scores_BTE[0, token, chosen_K], self.bias_E[chosen_K]
        columns = (chosen_K, score_K, bias_K, self.routing.weights_BTK[0, token])
        return list(zip(*(column.tolist() for column in columns), strict=True))


def moe_layers(config: ModelConfig) -> list[int]:
    """The numbers of the main layers that have experts. Raises ValueError if there are none."""
    if config.first_k_dense_replace >= config.num_hidden_layers:
        raise ValueError("no layer of this model has experts; lower first_k_dense_replace")
    return list(range(config.first_k_dense_replace, config.num_hidden_layers))


def token_texts(tokenizer: Tokenizer, text: str) -> list[str]:
    """The first ``MOST`` tokens with visible spaces; mere bytes of a letter say 'part of é'."""
    encoding, glyphs = tokenizer.encode(text), get_font(findfont("DejaVu Sans")).get_charmap()
    texts = []
    for number, (start, end) in list(zip(encoding.ids, encoding.offsets, strict=True))[:MOST]:
        part = "part of " if "\ufffd" in tokenizer.decode([number]) else ""
        piece = text[start:end].replace(" ", "␣").replace("\n", "↵")
        drawn = (c if ord(c) in glyphs and c.isprintable() else ascii(c)[1:-1] for c in piece)
        name = part + "".join(drawn)
        texts.append(name if len(name) <= WIDEST else f"{name[: WIDEST - 1]}…")
    return texts


@torch.no_grad()
def token_routing(model: Transformer, tokenizer: Tokenizer, text: str, layer: int) -> TokenRouting:
    """What the router of this layer decides for the first ``MOST`` tokens of ``text``.

    Cutting the rest changes nothing: a token only looks back. Raises ValueError on a text without
    tokens and on a layer without experts.
    """
    ids, layers = tokenizer.encode(text).ids, moe_layers(model.config)
    if not ids:
        raise ValueError(f"the text {text!r} has no tokens; type at least one character")
    if layer not in layers:
        raise ValueError(f"layer {layer} has no experts; expected one of {layers}")
    tokens = torch.tensor([ids[:MOST]], device=model.lm_head.weight.device)
    row, texts = layers.index(layer), token_texts(tokenizer, text)
    found, gate = model(tokens).routing[row], model.gates[row]
    bias_E = gate.e_score_correction_bias
    kept_TG = gate.groups(found.scores_BTE + bias_E)[0].cpu()
    found = Routing(found.scores_BTE.cpu(), found.indices_BTK.cpu(), found.weights_BTK.cpu())
    return TokenRouting(model.config, layer, texts, len(ids), found, bias_E.cpu().clone(), kept_TG)


def routing_numbers(routed: TokenRouting, token: int = 0) -> dict[str, str]:
    """Groups, choices and gates of one token, as texts."""
    config, picks = routed.config, routed.picks(token)
    rows = {"shown": routed.heading, "token": f"{token}: {routed.tokens[token]}"}
    kept = ", ".join(map(str, routed.survivors(token)))
    rows["surviving groups"] = f"{kept} (of 0 to {config.n_group - 1})"
    by_group = routed.choice_TE[token].view(config.n_group, -1)
    for group, best in enumerate(by_group.topk(min(2, routed.size)).values.tolist()):
        terms = " + ".join(f"{value:.4f}" for value in best)
        rows[f"group {group}, best two s + bias"] = f"{terms} = {sum(best):.4f}"
    for rank, (expert, score, bias, gate) in enumerate(picks, start=1):
        values = f"s {score:.4f}, bias {bias:+.4f}, s + bias {score + bias:.4f}, gate {gate:.4f}"
        rows[f"choice {rank}: expert {expert}"] = values
    total, factor = sum(gate for *_, gate in picks), config.routed_scaling_factor
    rows["sum of gates"] = f"{total:.4f} (routed_scaling_factor {factor:g})"
    chosen_1K = routed.routing.indices_BTK[0, token : token + 1]
    touched = int(nodes_touched(chosen_1K, config.n_routed_experts, config.n_group))
    rows["nodes touched (one group each)"] = f"{touched} of at most {config.topk_group}"
    return rows


def routing_figure(routed: TokenRouting, token: int = 0) -> Figure:
    """Affinities of all tokens with the choices made, and one token's choice bar by bar."""
    picks, groups, size = routed.picks(token), routed.config.n_group, routed.size
    with styled():
        figure = new_figure(9.6, max(4.2, 0.22 * len(routed.tokens) + 1.8))
        left, right = figure.subplots(1, 2)
        _affinity_panel(figure, left, routed, token)
        _token_panel(right, routed, token, picks)
        for axes in (left, right):
            axes.set_xlim(-0.5, groups * size - 0.5)
            ticks = 16 if groups * size <= 100 else 8
            axes.set_xticks(range(0, groups * size, math.ceil(groups * size / ticks)))
            axes.set_xlabel(f"expert (number); above: groups of {size}")
            above = axes.get_xaxis_transform()
            for group in range(groups):
                axes.axvline(group * size - 0.5, color=INK, linewidth=1.2)
                name, middle = f"{'group ' * (groups <= 4)}{group}", (group + 0.5) * size - 0.5
                axes.text(middle, 1.01, name, ha="center", fontsize=9, transform=above)
        figure.legend(loc="outside lower center", ncols=5, frameon=False)
    return figure


def _affinity_panel(figure: Figure, axes: Axes, routed: TokenRouting, token: int) -> None:
    size, indices_TK = routed.size, routed.routing.indices_BTK[0]
    image = axes.imshow(routed.routing.scores_BTE[0].numpy(), cmap="Blues", aspect="auto")
    figure.colorbar(image, ax=axes, aspect=30, pad=0.02, label="affinity s (sigmoid: 0 to 1)")
    rows_TK = torch.arange(len(indices_TK))[:, None].expand_as(indices_TK)
    look: dict[str, Any] = {"color": "white", "edgecolors": INK, "zorder": 3, "label": "chosen"}
    axes.scatter(indices_TK.flatten(), rows_TK.flatten(), 26, **look)
    frame: dict[str, Any] = {"fill": False, "ec": INK, "lw": 1.6, "label": "framed: group survives"}
    for row, group in routed.kept_TG.nonzero().tolist():
        axes.add_patch(Rectangle((group * size - 0.44, row - 0.42), size - 0.12, 0.84, **frame))
        frame["label"] = None  # one entry in the legend
    names = [f"{text} {'▶' if row == token else ' '}" for row, text in enumerate(routed.tokens)]
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.get_yticklabels()[token].set_fontweight("bold")
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False)
    axes.set_title(routed.heading, pad=18)


def _token_panel(axes: Axes, routed: TokenRouting, token: int, picks: list[Pick]) -> None:
    score_E, choice_E = routed.routing.scores_BTE[0, token], routed.choice_TE[token]
    expert_E, size = torch.arange(len(score_E)).numpy(), routed.size
    look: dict[str, Any] = {"width": 0.38, "edgecolor": INK, "linewidth": 0.5}
    axes.bar(expert_E - 0.2, score_E.numpy(), color=COLOURS[4], hatch="////", label="s", **look)
    axes.bar(expert_E + 0.2, choice_E.numpy(), color=COLOURS[0], label="s + bias", **look)
    shade: dict[str, Any] = {"color": GRID, "zorder": 0, "label": "shaded: group survives"}
    for group in routed.survivors(token):
        axes.axvspan(group * size - 0.5, (group + 1) * size - 0.5, **shade)
        shade["label"] = None
    low, high = min(float(choice_E.min()), 0), float(torch.maximum(score_E, choice_E).max())
    for expert, score, bias, gate in picks:
        top = max(score, score + bias) + 0.02 * (high - low)
        axes.text(expert, top, f"{gate:.2f}", rotation=90, ha="center", va="bottom", fontsize=9)
    axes.set_ylim(low * 1.1, high + 0.2 * (high - low))
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.xaxis.grid(visible=False)
    axes.set_ylabel("s and s + bias (no unit)")
    gates = f"written on top: gates, sum {sum(gate for *_, gate in picks):.2f}"
    axes.set_title(f"token {token}: {routed.tokens[token]}\n{gates}", pad=18, parse_math=False)


class RoutingExplorer(Explorer):
    """A text, a layer and a token over the functions above; every change asks the model anew."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, text: str = SENTENCE) -> None:
        self.tokenizer, layers = tokenizer, moe_layers(model.config)
        controls = {
            "text": widgets.Text(description="text", value=text),
            "layer": choice("layer", layers[0], {str(layer): layer for layer in layers}),
            "token": choice("token", 0, {"0": 0}),
        }
        routed = partial(token_routing, model, tokenizer)
        super().__init__(
            controls,
            lambda text, layer, token: routing_figure(routed(text, layer), token),
            lambda text, layer, token: routing_numbers(routed(text, layer), token),
            ALT,
        )

    def _changed(self, change: object) -> None:
        # One step of the token slider for every token; it stays where it is, or at the last one.
        control = self.controls["token"]
        texts = token_texts(self.tokenizer, self.controls["text"].value)
        options = [(f"{number}: {text}", number) for number, text in enumerate(texts)]
        if options and tuple(options) != tuple(control.options):
            here = min(control.index, len(options) - 1)
            control.unobserve(self._changed, names="value")
            control.options, control.index = options, here
            control.observe(self._changed, names="value")
        super()._changed(change)

    def __repr__(self) -> str:  # of the text only: affinities differ from machine to machine
        shown = self.shown
        where = f"{shown['shown']}; token {shown['token']}" if shown else "nothing to show"
        return f"{type(self).__name__}: {where}"
