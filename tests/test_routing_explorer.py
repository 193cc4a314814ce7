"""routing explorer: what is drawn and written is what the model's own router decided."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from dsv3_mini.config import ModelConfig
from dsv3_mini.data import load_tokenizer
from dsv3_mini.model import Transformer
from dsv3_mini.moe import Gate
from dsv3_mini.viz import routing_explorer
from dsv3_mini.viz.routing_explorer import (
    MOST,
    SENTENCE,
    RoutingExplorer,
    TokenRouting,
    moe_layers,
    routing_figure,
    routing_numbers,
    token_routing,
    token_texts,
)
from dsv3_mini.viz.style import png
from tests.reference import oracles

TOKENIZER = load_tokenizer()
LAYERS = [1, 2, 3]


@pytest.fixture(scope="module")
def model() -> Transformer:
    """A mini model whose biases, also negative ones, change what is chosen."""
    torch.manual_seed(0)
    made = Transformer(ModelConfig.mini()).requires_grad_(False)
    for gate in made.gates:
        gate.weight *= 8
        gate.e_score_correction_bias.normal_(-0.3, 0.3)
    return made


def decided(model: Transformer, text: str, layer: int) -> tuple[Gate, Any]:
    """The gate of a layer and what it answers, by a hook."""
    gate: Any = model.model.layers[layer].get_submodule("mlp.gate")
    answers: list[Any] = []
    hook = gate.register_forward_hook(lambda _, inputs, answer: answers.append(answer))
    with torch.no_grad():  # as the explorer does: experts that learn add up in another order
        model(torch.tensor([TOKENIZER.encode(text).ids]))
    hook.remove()
    return gate, answers[0]


def labels(figure: Figure) -> list[str]:
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


# ---------------------------------------------------------------------------------------- routing


@pytest.mark.parametrize("layer", LAYERS)
def test_everything_is_what_the_gate_decided(model: Transformer, layer: int) -> None:
    routed = token_routing(model, TOKENIZER, SENTENCE, layer)
    gate, answer = decided(model, SENTENCE, layer)
    assert torch.equal(routed.routing.scores_BTE, answer.scores_BTE)
    assert torch.equal(routed.routing.indices_BTK, answer.indices_BTK)
    assert torch.equal(routed.routing.weights_BTK, answer.weights_BTK)
    choice = answer.scores_BTE[0] + gate.e_score_correction_bias
    assert torch.equal(routed.choice_TE, choice)
    for token in range(len(routed.tokens)):
        picks = routed.picks(token)
        ranks = [sum(sorted(group.tolist())[-2:]) for group in choice[token].split(4)]
        assert set(routed.survivors(token)) == set(np.argsort(ranks)[-2:].tolist())
        assert {pick[0] // 4 for pick in picks} <= set(routed.survivors(token))
        bias = oracles.numbers(gate.e_score_correction_bias)
        scores = oracles.numbers(answer.scores_BTE[0, token])
        experts = oracles.route(scores, bias, model.config)
        assert [pick[0] for pick in picks] == experts
        gates = oracles.gates(scores, experts, model.config)
        assert {pick[0]: pick[3] for pick in picks} == pytest.approx(gates, rel=1e-5)
        assert [pick[1:3] for pick in picks] == [(scores[e], bias[e]) for e in experts]


def test_the_bias_moves_choices_and_no_gate(model: Transformer) -> None:
    """One bias for all experts moves nothing; one expert's own brings it in, at its plain s."""
    layer, last = 3, model.gates[2]  # nothing behind the last layer's router feeds back into it
    before, kept = token_routing(model, TOKENIZER, SENTENCE, layer), last.e_score_correction_bias
    last.e_score_correction_bias = kept + 5
    shifted = token_routing(model, TOKENIZER, SENTENCE, layer)
    assert torch.equal(before.routing.indices_BTK, shifted.routing.indices_BTK)
    assert torch.equal(before.routing.weights_BTK, shifted.routing.weights_BTK)
    outsider = next(e for e in range(16) if e not in before.routing.indices_BTK[0, 0])
    last.e_score_correction_bias = kept.clone()
    last.e_score_correction_bias[outsider] = 3
    after = token_routing(model, TOKENIZER, SENTENCE, layer)
    last.e_score_correction_bias = kept
    assert torch.equal(before.routing.scores_BTE, after.routing.scores_BTE)
    scores = after.routing.scores_BTE[0, 0]
    picks = after.picks(0)
    assert picks[0][0] == outsider
    total = sum(float(scores[expert]) for expert, *_ in picks)
    for expert, _, _, gate in picks:
        assert gate == pytest.approx(2.5 * float(scores[expert]) / total, rel=1e-5)
    assert before.bias_E[outsider] != 3  # a copy, although the model has moved on


def test_long_texts_are_cut_and_say_so(model: Transformer) -> None:
    text = SENTENCE * 9
    routed = token_routing(model, TOKENIZER, text, 2)
    count = len(TOKENIZER.encode(text).ids)
    assert len(routed.tokens) == MOST < count == routed.total
    _, whole = decided(model, text, 2)
    torch.testing.assert_close(routed.routing.scores_BTE, whole.scores_BTE[:, :MOST])
    message = f"layer 2, only the first {MOST} of {count} tokens"
    assert routing_numbers(routed)["shown"] == routing_figure(routed).axes[0].get_title() == message
    short = token_routing(model, TOKENIZER, "x", 1)
    assert short.heading == "layer 1, 1 of 1 tokens"


def test_token_texts_can_be_read_and_drawn(model: Transformer) -> None:
    text = "In $$ é\n中\x01 <b> supercalifragilistic" + "=" * 60
    texts = token_texts(TOKENIZER, text)
    assert texts[:2] == ["In", "␣$"]
    assert texts.count("part of é") == 2
    assert texts.count("part of \\u4e2d") == 3
    assert "\\x01" in texts
    assert any(name.startswith("↵") for name in texts)
    assert all(0 < len(name) <= routing_explorer.WIDEST for name in texts)
    assert any(name.endswith("…") for name in token_texts(TOKENIZER, "=" * 64))
    for token in range(len(texts)):  # a $ is no formula, and no glyph is missing (a warning)
        figure = routing_figure(token_routing(model, TOKENIZER, text, 1), token)
        assert figure.axes[1].get_title().startswith(f"token {token}: {texts[token]}\n")
    assert png(figure)


# ----------------------------------------------------------------------------- figure and numbers


@pytest.fixture(scope="module")
def routed(model: Transformer) -> TokenRouting:
    return token_routing(model, TOKENIZER, SENTENCE, 2)


@pytest.mark.parametrize("token", [0, 7, 15])
def test_numbers_are_the_gates(routed: TokenRouting, token: int) -> None:
    numbers, routing = routing_numbers(routed, token), routed.routing
    experts, weights = routing.indices_BTK[0, token], routing.weights_BTK[0, token]
    total = float(weights.sum())
    assert total == pytest.approx(2.5, rel=1e-6)
    assert numbers["sum of gates"] == f"{total:.4f} (routed_scaling_factor 2.5)"
    chosen = [label for label in numbers if label.startswith("choice")]
    assert chosen == [f"choice {k + 1}: expert {e}" for k, e in enumerate(experts.tolist())]
    falling = []
    for label, expert, weight in zip(chosen, experts.tolist(), weights.tolist(), strict=True):
        score, bias = float(routing.scores_BTE[0, token, expert]), float(routed.bias_E[expert])
        falling.append(score + bias)
        expected = f"s {score:.4f}, bias {bias:+.4f}, s + bias {score + bias:.4f}, "
        assert numbers[label] == f"{expected}gate {weight:.4f}"
    assert falling == sorted(falling, reverse=True)
    groups = sorted({expert // 4 for expert in experts.tolist()})
    assert numbers["nodes touched (one group each)"] == f"{len(groups)} of at most 2"
    survivors, _, _ = numbers["surviving groups"].partition(" (")
    assert {str(group) for group in groups} <= set(survivors.split(", "))
    sums = [float(numbers[f"group {g}, best two s + bias"].split(" = ")[1]) for g in range(4)]
    assert survivors == ", ".join(map(str, sorted(np.argsort(sums)[-2:].tolist())))
    assert numbers["token"] == f"{token}: {routed.tokens[token]}"


def test_the_map_shows_affinities_choices_and_groups(routed: TokenRouting) -> None:
    axes = routing_figure(routed, 4).axes[0]
    scores = routed.routing.scores_BTE[0].numpy()
    np.testing.assert_array_equal(axes.images[0].get_array(), scores)
    dots = {(int(row), int(expert)) for expert, row in axes.collections[0].get_offsets()}
    picks = routed.routing.indices_BTK[0].tolist()
    assert dots == {(row, expert) for row, experts in enumerate(picks) for expert in experts}
    frames = {(round(box.get_y()), round(box.get_x() / 4)) for box in axes.patches}
    assert frames == {(row, group) for row, group in routed.kept_TG.nonzero().tolist()}
    assert all(box.get_width() == pytest.approx(3.88) for box in axes.patches)


@pytest.mark.parametrize("token", [0, 9])
def test_bars_shades_and_gates_of_a_token(routed: TokenRouting, token: int) -> None:
    figure = routing_figure(routed, token)
    axes, names = figure.axes[1], labels(figure)
    assert [row for row, name in enumerate(names) if "▶" in name] == [token]
    assert [name.rstrip(" ▶") for name in names] == routed.tokens
    plain, biased = ([bar.get_height() for bar in bars] for bars in axes.containers)
    np.testing.assert_array_equal(plain, routed.routing.scores_BTE[0, token])
    np.testing.assert_array_equal(biased, routed.choice_TE[token])
    bars = {id(bar) for container in axes.containers for bar in container}
    shades = [patch for patch in axes.patches if id(patch) not in bars]
    assert [shade.get_x() for shade in shades] == [4 * g - 0.5 for g in routed.survivors(token)]
    marks = {int(mark.get_position()[0]): mark for mark in axes.texts if mark.get_rotation()}
    gates = {expert: f"{gate:.2f}" for expert, _, _, gate in routed.picks(token)}
    assert {expert: mark.get_text() for expert, mark in marks.items()} == gates
    for expert, mark in marks.items():
        assert mark.get_position()[1] > max(plain[expert], biased[expert])


def test_figures_can_be_read(routed: TokenRouting) -> None:
    """Text of 9 points or more, labelled axes, and no two texts on one another."""
    figure = routing_figure(routed, 5)
    png(figure)
    renderer: Any = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    for axes in figure.axes[:2]:
        assert axes.get_xlabel()
        texts = [*axes.texts, *axes.get_xticklabels(), *axes.get_yticklabels(), axes.title]
        boxes = [text.get_window_extent(renderer) for text in texts if text.get_text().strip()]
        assert all(text.get_fontsize() >= 9 for text in texts)
        for index, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[:index])
    assert figure.axes[1].get_ylabel()
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(legend) == len(set(legend)) == 5


@pytest.mark.parametrize(
    "changes", [{"n_group": 1, "topk_group": 1}, {"n_group": 8, "topk_group": 8}]
)
def test_without_a_limit_every_group_survives(changes: dict[str, int]) -> None:
    plain = Transformer(ModelConfig.mini().replace(num_hidden_layers=2, **changes))
    routed = token_routing(plain, TOKENIZER, "x", 1)
    assert routed.survivors(0) == list(range(changes["n_group"]))
    assert png(routing_figure(routed))


@pytest.mark.parametrize(
    ("text", "layer", "message"),
    [("", 1, "the text '' has no tokens"), ("x", 0, "layer 0 has no experts"), ("x", 4, "layer 4")],
)
def test_refuses_what_cannot_be(model: Transformer, text: str, layer: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_routing(model, TOKENIZER, text, layer)


def test_refuses_other_tokens_and_models_without_experts(routed: TokenRouting) -> None:
    for function in (routing_figure, routing_numbers):
        for token in (-1, 16):
            with pytest.raises(ValueError, match="expected 0 to 15"):
                function(routed, token)
    dense = ModelConfig.tiny().replace(first_k_dense_replace=2)
    with pytest.raises(ValueError, match="no layer of this model has experts"):
        RoutingExplorer(Transformer(dense), TOKENIZER)
    assert moe_layers(ModelConfig.v3()) == list(range(3, 61))


# ----------------------------------------------------------------------------------------- widget


def test_moving_controls_changes_text_and_picture(model: Transformer) -> None:
    explorer = RoutingExplorer(model, TOKENIZER)
    moves: list[tuple[str, Any]] = [("token", 15), ("layer", 3), ("text", "the function f")]
    for name, value in moves:
        numbers, picture = explorer.shown, explorer.picture.value
        explorer.controls[name].value = value
        assert explorer.problem.value == ""
        assert explorer.values == {key: each.value for key, each in explorer.controls.items()}
        assert explorer.shown != numbers
        assert explorer.picture.value != picture
        where = {key: explorer.values[key] for key in ("text", "layer")}
        routed = token_routing(model, TOKENIZER, **where)
        assert explorer.shown == routing_numbers(routed, explorer.values["token"])
    assert explorer.picture.value == png(routing_figure(routed, explorer.values["token"]))
    # Three tokens now: the token control went to the last one, and has one step for each.
    assert explorer.values == {
        "text": "the function f",
        "layer": 3,
        "token": len(routed.tokens) - 1,
    }
    options = [label for label, _ in explorer.controls["token"].options]
    assert options == [f"{number}: {name}" for number, name in enumerate(routed.tokens)]


def test_problems_are_shown_and_leave_everything(model: Transformer) -> None:
    explorer = RoutingExplorer(model, TOKENIZER, "x < y")
    before = (explorer.values, explorer.shown, explorer.picture.value)
    explorer.controls["text"].value = ""
    assert "the text '' has no tokens; type at least one" in explorer.problem.value
    assert (explorer.values, explorer.shown, explorer.picture.value) == before
    explorer.controls["text"].value = "x < y"
    assert explorer.problem.value == ""
    assert re.search("␣&lt;", RoutingExplorer(model, TOKENIZER, " < y").numbers.value)


def test_keyboard_labels_and_repr(model: Transformer) -> None:
    explorer = RoutingExplorer(model, TOKENIZER)
    assert repr(explorer) == "RoutingExplorer: layer 1, 16 of 16 tokens; token 0: In"
    assert repr(RoutingExplorer(model, TOKENIZER, "")) == "RoutingExplorer: nothing to show"
    assert list(explorer.controls) == ["text", "layer", "token"]
    for control in explorer.controls.values():
        assert control.description
        assert not control.continuous_update
    assert [value for _, value in explorer.controls["layer"].options] == LAYERS
    captions = [getattr(child, "value", "") for child in explorer.children]
    assert any(routing_explorer.ALT in str(caption) for caption in captions)
