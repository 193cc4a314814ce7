"""The same model trained in fp32, in bf16 and in FP8, and with FP8 done wrong.

Why pairs: a seed moves the loss more than a format does. Every arithmetic starts from the same
weights and sees the same batches, and only the difference from its own fp32 twin is looked at.

Two starts, as each shows what the other hides. A model that has learnt little more than which
tokens are frequent does not notice a coarse forward pass: ``WAYS`` goes on from the model that
comes with the package. And one that is trained already does not notice that its updates are lost:
``FROM_SCRATCH`` starts a smaller one from nothing.

All of ``WAYS`` take minutes, so what they gave is kept beside the package, made anew by

    python -m dsv3_mini.course.fp8_study

(about ten minutes; names of ways after it run those alone), and a notebook runs the first steps of
some again and compares.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch

from dsv3_mini.config import ModelConfig
from dsv3_mini.course.experts import small_moe
from dsv3_mini.course.fp8_formats import formats
from dsv3_mini.course.runs import run_all
from dsv3_mini.course.trained import load_trained
from dsv3_mini.data import load_corpus
from dsv3_mini.fp8 import (
    E5M2,
    KEPT,
    SQUARE,
    TENSOR,
    Block,
    Recipe,
    convert_to_fp8,
    dequantize,
    quantize,
)
from dsv3_mini.model import Transformer
from dsv3_mini.train import TrainConfig, evaluate, train

RECORD = Path(__file__).parent.parent / "assets" / "fp8_study.json"
STEPS, SEEDS, SEQ_LEN = 40, 5, 64
SMOOTH = 0.9
"""Share of the past in the running mean of losses: the report's (App. B)."""


@dataclass(frozen=True)
class Arithmetic:
    """How a run multiplies: a recipe, or None for fp32; what is kept out; where it starts."""

    recipe: Recipe | None = None
    keep: tuple[str, ...] = KEPT
    scratch: bool = False
    master: bool = True
    """False rounds the cast weights themselves after every step."""


ROW: Block = (1, None)
EVERY_TENSOR = Recipe(input_block=TENSOR, weight_block=TENSOR, gradient_block=TENSOR)
# Without promotion a scale cannot change along the sum: one for a row is the finest there is.
UNPROMOTED = Recipe(input_block=ROW, weight_block=TENSOR, gradient_block=ROW, accumulate_bits=14)
WAYS = {
    "fp32": Arithmetic(),
    "bf16": Arithmetic(Recipe(torch.bfloat16, torch.bfloat16)),
    "FP8 as V3": Arithmetic(Recipe()),
    "FP8, 14 bits promoted": Arithmetic(Recipe(accumulate_bits=14, promote_every=128)),
    "no promotion": Arithmetic(UNPROMOTED),
    "a scale per tensor": Arithmetic(EVERY_TENSOR),
    "gradients 128x128": Arithmetic(Recipe(gradient_block=SQUARE)),
    "gradients E5M2": Arithmetic(Recipe(gradient=E5M2)),
    "forward E5M2": Arithmetic(Recipe(forward=E5M2)),
    "head and router, too": Arithmetic(Recipe(), keep=()),
}
FROM_SCRATCH = {
    "fp32": Arithmetic(scratch=True),
    "bf16": Arithmetic(WAYS["bf16"].recipe, scratch=True),
    "FP8 as V3": Arithmetic(Recipe(), scratch=True),
    "no scale": Arithmetic(Recipe(scaled=False), scratch=True),
    "no fp32 weights": Arithmetic(Recipe(), scratch=True, master=False),
}


@dataclass(frozen=True)
class Outcome:
    """One run: its loss at every step, and at the end on held-out text, in nats a token."""

    losses: list[float]
    held_out: float


def smooth(losses: Sequence[float]) -> list[float]:
    """Exponential running mean, the first loss being the first value."""
    means = [losses[0]]
    for loss in losses[1:]:
        means.append(SMOOTH * means[-1] + (1 - SMOOTH) * loss)
    return means


def differences(outcomes: Sequence[Outcome], base: Sequence[Outcome]) -> list[float]:
    """By how much the smoothed last loss of each run exceeds its twin's, relative to it."""
    pairs = zip(outcomes, base, strict=True)
    return [smooth(a.losses)[-1] / smooth(b.losses)[-1] - 1 for a, b in pairs]


def tiny_moe() -> ModelConfig:
    """A dense layer and a layer of 4 experts, 2 of them used; no MTP."""
    return small_moe().replace(
        n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2, first_k_dense_replace=1
    )


def run(way: Arithmetic, seed: int, steps: int, stop: int | None = None) -> Outcome:
    """Train one way; the seed decides the batches, and the weights where they are new.

    ``stop`` ends a run of ``steps`` before its last one.
    """
    corpus = load_corpus()
    torch.manual_seed(seed)
    model = Transformer(tiny_moe()) if way.scratch else load_trained()
    if way.recipe is not None:
        convert_to_fp8(model, way.recipe, way.keep)
    settings = TrainConfig(
        steps=steps, batch_size=8, seq_len=SEQ_LEN, seed=seed,
        learning_rate=2e-3 if way.scratch else 3e-4, warmup=20 if way.scratch else 5,
    )  # fmt: skip
    losses = []
    for record in islice(train(model, corpus, settings), stop):
        losses.append(record.loss)
        if not way.master:
            round_weights(model)
    windows = torch.cat([corpus.windows(domain, SEQ_LEN, 16) for domain in corpus.domains])
    return Outcome(losses, evaluate(model, windows))


@torch.no_grad()
def round_weights(model: Transformer) -> None:
    """What is cast when it is used becomes what the cast made of it: no master weights."""
    parameters = dict(model.named_parameters())
    for row in formats(model):
        if row.weight.startswith("E4M3"):
            weight = parameters[row.name]
            weight.copy_(dequantize(*quantize(weight, SQUARE), SQUARE))


def recorded() -> dict[str, list[Outcome]]:
    """What the command gave: every way of ``WAYS``, seeds 0 to 4. Raises ValueError."""
    if not RECORD.is_file():
        raise ValueError(f"{RECORD} is missing; python -m dsv3_mini.course.fp8_study makes it")
    kept = json.loads(RECORD.read_text(encoding="utf-8"))
    return {name: [Outcome(**one) for one in runs] for name, runs in kept["ways"].items()}


def main(names: Sequence[str] = (), seeds: int = SEEDS, steps: int = STEPS) -> int:
    """Run the named ways, or all, from every seed; print the differences; keep the record."""
    unknown = set(names) - set(WAYS)
    if unknown:
        print(f"no way is called {', '.join(sorted(unknown))}; there are {', '.join(WAYS)}")
        return 2
    kept = json.loads(RECORD.read_text(encoding="utf-8")) if names else {"ways": {}}
    outcomes = run_all(run, {name: WAYS[name] for name in names or WAYS}, seeds, steps)
    for name, runs in outcomes.items():
        kept["ways"][name] = [asdict(one) for one in runs]
    kept["torch"] = torch.__version__
    written = RECORD.with_suffix(".new")
    written.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    written.replace(RECORD)
    found = recorded()
    for name, runs in found.items():
        each = " ".join(f"{d:+.3%}" for d in differences(runs, found["fp32"]))
        print(f"{name:24s} {each}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
