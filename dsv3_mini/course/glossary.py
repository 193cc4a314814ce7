"""The words of the notebooks in English and Hindi, and the page that lists them.

    python -m dsv3_mini.course.glossary MLA        # one word
    python -m dsv3_mini.course.glossary --write    # docs/glossary.md, after a change of the data

Why: Hindi texts on this subject keep most English words, in Devanagari, and machines translate
them instead. Somebody who hears of secret meditation with many heads cannot look up 'MLA'. The data
is complete and plain, in ``glossary.json``.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Status = Literal["in use", "proposed"]
PAGE = Path(__file__).resolve().parents[2] / "docs" / "glossary.md"
INTRODUCTION = """# Glossary: English and Hindi

The words that the notebooks use, each with the notebook that introduces it. In Python, `look_up` of
`dsv3_mini.course.glossary` gives one entry; `python -m dsv3_mini.course.glossary MLA` prints it.

This page is written from `dsv3_mini/course/glossary.json` by
`python -m dsv3_mini.course.glossary --write`: change the data, not the page.

**How Hindi texts on this subject are written.** They keep the English words and spell them in
Devanagari: टोकन, मॉडल, कैश, अटेंशन. Translated are words that school mathematics has long had:
आव्यूह (matrix), सदिश (vector), प्रायिकता (probability), घातांक (exponent). This page does the same.
A term is marked

- **in use** where it is found in Hindi documentation, in a translated course or program, or in
  school mathematics;
- **proposed** where none was found, and the word was spelled or translated here.

The authors decided this by a search. No teacher of the field who works in Hindi has read it yet;
corrections are welcome.

**Machine translation** takes each word by its first meaning. Where that misleads, the entry quotes
the rendering. {seen} of these {all} were found in published translations of technical texts. Those
marked *possible* were not: they are what a dictionary says first. Three words cost a reader most:
कैश is cache and cash, भार is weight and load, की is key and 'of'.
"""


@dataclass(frozen=True)
class Misleading:
    """What a machine makes of a term, and why that misleads; ``seen`` in a published text or not.

    ``rendering`` and ``why`` make a sentence together.
    """

    rendering: str
    why: str
    seen: bool


@dataclass(frozen=True)
class Term:
    """A word of the notebooks. ``also``: other forms and abbreviations; ``notebook``: its stem."""

    term: str
    also: tuple[str, ...]
    meaning: str
    hindi: str
    hindi_meaning: str
    status: Status
    notebook: str
    misleading: Misleading | None = None


def _load() -> tuple[Term, ...]:
    data = json.loads(Path(__file__).with_name("glossary.json").read_text(encoding="utf-8"))
    for entry in data:
        entry["also"] = tuple(entry["also"])
        if entry["misleading"]:
            entry["misleading"] = Misleading(**entry["misleading"])
    return tuple(Term(**entry) for entry in data)


TERMS = _load()  # in the order in which the notebooks introduce them


def look_up(name: str) -> Term:
    """The entry for a term, another form of it or its Hindi name; upper and lower case are alike.

    ValueError, with the nearest terms, if there is none.
    """
    known = {
        form.casefold(): each
        for each in TERMS
        for form in (*each.hindi.split(", "), *each.also, each.term)
    }
    if name.casefold() not in known:
        near = difflib.get_close_matches(name.casefold(), known, n=3, cutoff=0.3)
        listed = ", ".join(near or [each.term for each in TERMS[:3]])
        raise ValueError(f"{name!r} is not in the glossary; expected a term such as {listed}")
    return known[name.casefold()]


def _marked(text: str) -> str:
    """Hindi words marked as such: a screen reader changes its voice by it."""
    return re.sub("[ऀ-ॿ]+(?:[ ,-]+[ऀ-ॿ]+)*", lambda m: f'<span lang="hi">{m[0]}</span>', text)


def _entry(each: Term) -> str:
    also = f" Also: {', '.join(each.also)}." if each.also else ""
    where = f"[Notebook {each.notebook.partition('_')[0]}](../notebooks/{each.notebook}.ipynb)."
    lines = [
        f"### {each.term}\n",
        f"{each.meaning}{also} {where}\n",
        f"**{each.hindi}** ({each.status}): {each.hindi_meaning}\n",
    ]
    if bad := each.misleading:
        how = "Misleading" if bad.seen else "Misleading, possible"
        lines.append(f"*{how}*: {bad.rendering} {bad.why}.\n")
    return "\n".join(lines)


def page() -> str:
    """docs/glossary.md, from the data."""
    misleading = [each.misleading for each in TERMS if each.misleading]
    counts = {"seen": sum(bad.seen for bad in misleading), "all": len(misleading)}
    parts, letter = [INTRODUCTION.format(**counts)], ""
    for each in sorted(TERMS, key=lambda each: each.term.casefold()):
        if each.term[0].upper() != letter:
            letter = each.term[0].upper()
            parts.append(f"## {letter}\n")
        parts.append(_entry(each))
    parts.append("## By notebook\n")
    for notebook in dict.fromkeys(each.notebook for each in TERMS):
        names = [each.term for each in TERMS if each.notebook == notebook]
        links = ", ".join(f"[{name}](#{name.lower().replace(' ', '-')})" for name in names)
        parts.append(f"- [{notebook}](../notebooks/{notebook}.ipynb): {links}")
    return _marked("\n".join(parts) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Print the entries that are named, or write the page."""
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_mini.course.glossary", description="English and Hindi words."
    )
    parser.add_argument("terms", nargs="*", metavar="TERM")
    parser.add_argument("--write", action="store_true", help="write docs/glossary.md anew")
    chosen = parser.parse_args(argv)
    if not (chosen.terms or chosen.write):
        parser.print_help()
    try:
        print("\n".join(_entry(look_up(name)) for name in chosen.terms), end="")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    if chosen.write:
        if not PAGE.parent.is_dir():
            parser.error(f"{PAGE.parent} does not exist: use the package from the repository")
        PAGE.write_text(page(), encoding="utf-8")
        print(f"{len(TERMS)} terms -> docs/{PAGE.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
