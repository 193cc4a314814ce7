"""Which tokens came from accepted drafts: a text in three looks, a timeline of steps, an explorer.

Why see it: a rate of acceptance says how often, not where. Drafts hold inside words, names and
indentation, and fail where the text decides something.

``coloured`` and ``timeline`` are plain functions of what ``speculative.generate`` returns;
``SpeculationExplorer`` puts a prompt and a button on them.
"""

from __future__ import annotations

import html
import time
from collections.abc import Sequence

import ipywidgets as widgets
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from tokenizers import Tokenizer

from dsv3_mini import generate as plain
from dsv3_mini import speculative
from dsv3_mini.model import Transformer
from dsv3_mini.speculative import Acceptance
from dsv3_mini.viz.shell import refusal
from dsv3_mini.viz.style import COLOURS, INK, new_figure, styled

ALT = (
    "Columns are steps of the main model. A dark box is an accepted draft, with the token that the "
    "same step made after it on top; a hatched box is the main model's token in place of a refused "
    "draft; white boxes are its own tokens."
)
LOOKS = {
    "plain": "border:1px solid #9a9a9a",
    "accepted": "background:#1b2a5e;color:white;border:1px solid #1b2a5e",
    "rejected": "border:2px dashed #b5423c",
}
KEY = {"plain": "main model", "accepted": "draft, accepted", "rejected": "draft refused, corrected"}


def words(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[str]:
    """Each token as text that can be seen: spaces as ␣, line ends as ↵."""
    return [tokenizer.decode([t]).replace(" ", "␣").replace("\n", "↵") for t in tokens]


def coloured(tokenizer: Tokenizer, tokens: Sequence[int], fates: Sequence[str]) -> str:
    """The new tokens as HTML, each in the look of its fate, and the key to the looks."""
    if len(tokens) != len(fates):
        raise ValueError(f"{len(tokens)} tokens and {len(fates)} fates; expected one for each")

    def box(text: str, fate: str) -> str:
        look = f"display:inline-block;padding:1px 2px;margin:1px;border-radius:3px;{LOOKS[fate]}"
        return f"<span style='{look}' title='{KEY[fate]}'>{html.escape(text)}</span>"

    key = " ".join(box(KEY[fate], fate) for fate in LOOKS)
    text = ""
    for word, fate in zip(words(tokenizer, tokens), fates, strict=True):
        text += box(word, fate) + ("<br>" if "↵" in word else "")
    return f"<p>{key}</p><p style='font-family:monospace;line-height:1.9;font-size:14px'>{text}</p>"


def steps(fates: Sequence[str]) -> list[list[int]]:
    """Places of the new tokens by the main-model pass that made them; the first is the prompt's."""
    found: list[list[int]] = []
    for place, fate in enumerate(fates):
        bonus = fate == "plain" and place > 0 and fates[place - 1] == "accepted"
        if bonus:
            found[-1].append(place)
        else:
            found.append([place])
    return found


def timeline(tokenizer: Tokenizer, tokens: Sequence[int], fates: Sequence[str]) -> Figure:
    """One column a pass of the main model, with the one or two tokens that it made (at most 20)."""
    texts, columns = words(tokenizer, tokens), steps(fates)[:20]
    with styled():
        figure = new_figure(9.6, 2.5)
        axes = figure.add_subplot()
        for x, places in enumerate(columns):
            for y, place in enumerate(places):
                accepted, refused = fates[place] == "accepted", fates[place] == "rejected"
                axes.add_patch(
                    Rectangle(
                        (x - 0.46, y), 0.92, 0.86, facecolor=COLOURS[0] if accepted else "white",
                        edgecolor=COLOURS[1] if refused else INK, hatch="//" if refused else "",
                        linewidth=1.6 if refused else 0.9,
                    )
                )  # fmt: skip
                axes.text(
                    x, y + 0.43, texts[place][:7].replace("$", r"\$"), ha="center", va="center",
                    fontsize=9, rotation=0 if len(texts[place]) < 5 else 35,
                    color="white" if accepted else INK,
                    bbox=None if not refused else {"facecolor": "white", "pad": 1, "linewidth": 0},
                )  # fmt: skip
        axes.set(
            xlim=(-0.7, max(len(columns), 8) - 0.3), ylim=(-0.15, 2.0), yticks=[0.43, 1.43],
            yticklabels=["verified", "and after it"],
            xlabel="pass of the main model (0: the prompt)",
        )  # fmt: skip
        axes.set_xticks(range(len(columns)))
        axes.grid(visible=False)
    return figure


class SpeculationExplorer(widgets.VBox):  # type: ignore[misc]
    """Type a prompt, press Generate: the text by fate, and both decoders' speed."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, text: str = "def ") -> None:
        self.model, self.tokenizer = model, tokenizer
        self.last: Acceptance | None = None
        wide = {"description_width": "110px"}
        self.prompt = widgets.Textarea(value=text, description="prompt", style=wide, rows=3)
        self.prompt.layout.width, self.prompt.layout.max_width = "560px", "98%"
        self.count = widgets.IntSlider(
            value=60, min=4, max=200, step=4, description="new tokens", style=wide
        )
        self.heat = widgets.FloatSlider(
            value=0, min=0, max=1.5, step=0.1, description="temperature", style=wide
        )
        self.button = widgets.Button(description="Generate")
        self.status, self.text = widgets.HTML(), widgets.HTML()
        self.button.on_click(lambda _: self.generate())
        controls = [self.prompt, self.count, self.heat, self.button]
        super().__init__([*controls, self.status, self.text])

    def generate(self) -> None:
        """Decode both ways and show the result, or the reason why not."""
        ids = self.tokenizer.encode(self.prompt.value).ids
        arguments = (self.model, ids, self.count.value, self.heat.value, 0)
        try:
            began = time.perf_counter()
            usual = plain.generate(*arguments)
            between = time.perf_counter()
            tokens, stats = speculative.generate(*arguments)
            ended = time.perf_counter()
        except ValueError as error:
            self.status.value = refusal(error)
            return
        new, self.last = tokens[0, len(ids) :].tolist(), stats
        same = (
            "the same text" if bool((tokens == usual).all()) else "another sample of the same model"
        )
        speeds = len(new) / (between - began), len(new) / (ended - between)
        self.status.value = (
            f"accepted {stats.accepted} of {stats.drafted} drafts ({stats.rate:.0%}), "
            f"{stats.tokens_per_step:.2f} tokens a step; plain {speeds[0]:.0f} tokens/s, "
            f"speculative {speeds[1]:.0f} ({speeds[1] / speeds[0]:.2f} x); {same}"
        )
        self.text.value = coloured(self.tokenizer, new, stats.fates)

    def __repr__(self) -> str:
        return "SpeculationExplorer: type a prompt and press Generate"
