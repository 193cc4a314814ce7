"""The model that is shipped: what its card says, and that speculation never changes its text."""

from __future__ import annotations

import re

import pytest
import torch

from dsv3_mini.course.trained import FOLDER, load_trained
from dsv3_mini.data import DOMAINS, load_corpus, load_tokenizer
from dsv3_mini.generate import generate as plain
from dsv3_mini.model import Transformer
from dsv3_mini.speculative import generate
from dsv3_mini.train import evaluate

CARD = (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def model() -> Transformer:
    return load_trained()


def test_it_is_small_and_in_the_official_layout() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 16 * 2**20
    assert {path.name for path in FOLDER.iterdir()} == {
        "README.md", "config.json", "model.safetensors",
    }  # fmt: skip


@pytest.mark.parametrize("domain", DOMAINS)
def test_held_out_loss_is_what_the_card_says(model: Transformer, domain: str) -> None:
    """To 0.1 nats: the held-out text comes from installed packages, whose versions differ."""
    [stated] = re.findall(rf"\| {domain} \| (\d\.\d\d) \|", CARD)
    measured = evaluate(model, load_corpus().windows(domain, 256, 16))
    assert measured == pytest.approx(float(stated), abs=0.1)


def test_its_python_looks_like_python(model: Transformer) -> None:
    tokenizer = load_tokenizer()
    prompt = tokenizer.encode("    def __init__(self, name):\n        ").ids
    texts = [
        tokenizer.decode(plain(model, prompt, 80, 0.5, seed=s)[0, len(prompt) :].tolist())
        for s in range(6)
    ]
    together = "\n".join(texts)
    assert together.count("self.") > 6
    assert re.search(r"\n {4}\S", together), "indented lines"
    assert re.search(r"\b(self|return|if|for|class|import)\b", together)


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("domain", DOMAINS)
def test_speculative_text_is_plain_text(domain: str, batch: int) -> None:
    """200 prompts in all, at every start of a window; in fp64, where no tie can turn."""
    model = load_trained().double()
    windows = load_corpus().windows(domain, 40, 10 if batch == 1 else 40)
    for number, prompts in enumerate(windows.split(batch)):
        prompts = prompts[:, : 4 + 3 * (number % 10)]
        out, _ = generate(model, prompts, 16)
        assert torch.equal(out, plain(model, prompts, 16))


def test_many_drafts_are_accepted(model: Transformer) -> None:
    accepted = drafted = 0
    for domain in DOMAINS:
        for row in load_corpus().windows(domain, 32, 3):
            _, stats = generate(model, row[:32], 48)
            accepted, drafted = accepted + stats.accepted, drafted + stats.drafted
    assert accepted / drafted > 0.5
