"""What learners have heard about DeepSeek-V3, and what is true of it.

Why: an idea heard somewhere sits firmer than one just read. A reader who first commits to a
verdict, and then measures, notices what to unlearn. The data is complete and plain, in
``claims.json``; nothing here needs a notebook.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Verdict = Literal["correct", "imprecise", "wrong"]
VERDICTS: tuple[Verdict, ...] = ("correct", "imprecise", "wrong")

# What a claim's ``source`` is short for; numbers after it are sections, unless it says eq or Table.
SOURCES = {
    "report": "DeepSeek-V3 Technical Report, arXiv 2412.19437",
    "README": "README of the repository deepseek-ai/DeepSeek-V3 on GitHub",
    "DeepSeek-V2": "DeepSeek-V2, arXiv 2405.04434",
    "DeepSeekMoE": "DeepSeekMoE, arXiv 2401.06066",
    "arXiv 2408.15664": "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts",
    "arXiv 2505.09343": "Insights into DeepSeek-V3",
    "arXiv 2104.09864": "RoFormer: Enhanced Transformer with Rotary Position Embedding",
    "arXiv 2209.05433": "FP8 Formats for Deep Learning",
}


@dataclass(frozen=True)
class Claim:
    """A sentence as heard, how far it holds, what is true instead, and where to look it up."""

    number: int
    topic: str
    text: str
    verdict: Verdict
    truth: str
    source: str


def _load() -> tuple[Claim, ...]:
    data = Path(__file__).with_name("claims.json").read_text(encoding="utf-8")
    return tuple(Claim(**entry) for entry in json.loads(data))


CLAIMS = _load()  # in the order of their numbers, 1 to 63


def claim(number: int) -> Claim:
    """The claim with this number; ValueError if there is none."""
    for each in CLAIMS:
        if each.number == number:
            return each
    raise ValueError(f"claim {number!r} does not exist; expected a number from 1 to {len(CLAIMS)}")
