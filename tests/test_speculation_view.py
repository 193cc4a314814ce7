"""What the explorer and the timeline show is what speculation reported."""

from __future__ import annotations

import pytest

from dsv3_mini import ModelConfig, Transformer
from dsv3_mini.data import VOCAB_SIZE, load_tokenizer
from dsv3_mini.viz.speculation import SpeculationExplorer, coloured, steps, timeline
from dsv3_mini.viz.style import png

FATES = ["plain", "accepted", "plain", "rejected", "rejected", "accepted", "plain", "plain"]


def test_steps_are_passes_of_the_main_model() -> None:
    assert steps(FATES) == [[0], [1, 2], [3], [4], [5, 6], [7]]
    assert steps([]) == []


def test_coloured_text_has_every_token_in_its_look_and_is_escaped() -> None:
    tokenizer = load_tokenizer()
    tokens = tokenizer.encode("a<b>\nc d").ids
    fates = (FATES * 2)[: len(tokens)]
    text = coloured(tokenizer, tokens, fates)
    assert text.count("<span") == len(tokens) + 3
    assert "&lt;" in text
    assert "<b>" not in text
    assert text.count("draft, accepted") == fates.count("accepted") + 2  # title and key
    with pytest.raises(ValueError, match="expected one for each"):
        coloured(tokenizer, tokens, fates[1:])


def test_timeline_draws_a_box_a_token() -> None:
    tokenizer = load_tokenizer()
    tokens = tokenizer.encode("for $x in range(9): pass").ids[: len(FATES)]
    figure = timeline(tokenizer, tokens, FATES)
    png(figure)
    assert len(figure.axes[0].patches) == len(FATES)
    hatched = [patch for patch in figure.axes[0].patches if patch.get_hatch()]
    assert len(hatched) == FATES.count("rejected")


def test_the_explorer_generates_and_refuses() -> None:
    model = Transformer(ModelConfig.tiny().replace(vocab_size=VOCAB_SIZE)).eval()
    explorer = SpeculationExplorer(model, load_tokenizer(), "x = 1")
    explorer.count.value = 12
    explorer.button.click()
    assert explorer.last is not None
    assert explorer.text.value.count("<span") == 12 + 3
    assert "the same text" in explorer.status.value
    explorer.prompt.value = ""
    explorer.button.click()
    assert "Not possible" in explorer.status.value
    assert repr(explorer) == "SpeculationExplorer: type a prompt and press Generate"
