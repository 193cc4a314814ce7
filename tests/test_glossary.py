"""The glossary is complete, its words stand in the notebooks it names, and its page is current."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from pathlib import Path

import nbformat
import pytest

from dsv3_mini.course import glossary
from dsv3_mini.course.glossary import TERMS, Term, look_up
from tests.environment import NOTEBOOKS, ROOT

PAGE = ROOT / "docs" / "glossary.md"
DEVANAGARI = re.compile("[ऀ-ॿ]")
NOTATION = re.compile(r"^## Notation\n(.*?)(?=^## |\Z)", re.M | re.S)


def forms(each: Term) -> tuple[str, ...]:
    return (each.term, *each.also)


def text_of(notebook: str) -> str:
    """All that a reader sees: sources, printed outputs, and outputs shown as text."""
    parts: list[str] = []
    for cell in nbformat.read(NOTEBOOKS / f"{notebook}.ipynb", as_version=4).cells:
        parts.append(cell.source)
        for output in cell.get("outputs", []):
            parts += [output.get("text", ""), output.get("data", {}).get("text/plain", "")]
    return "\n".join(parts)


def stands_in(form: str, text: str) -> bool:
    """As a word of its own, in any case; 'key' does not stand in 'monkeys'."""
    return bool(re.search(rf"(?<![a-z]){re.escape(form)}(?![a-z])", text, re.I))


def notation_terms(text: str) -> list[str]:
    """What a section called Notation explains: in bold, with a letter, as a short name in code."""
    terms: list[str] = []
    for section in NOTATION.findall(text):
        terms += re.findall(r"\*\*(?:The )?(.+?)\*\*", section)
        terms += re.findall(r"(\w+(?: \w+)?) \([A-Z]\)", section)
        terms += re.findall(r"`([A-Za-z]\w{1,5})`", section)
    return terms


def test_between_60_and_90_terms() -> None:
    assert 60 <= len(TERMS) <= 90


def test_no_form_belongs_to_two_terms() -> None:
    counts = Counter(form.casefold() for each in TERMS for form in forms(each))
    assert [form for form, count in counts.items() if count > 1] == []
    assert len({each.hindi for each in TERMS}) == len(TERMS)


@pytest.mark.parametrize("each", TERMS, ids=lambda each: each.term)
def test_an_entry_is_complete(each: Term) -> None:
    assert each.term == each.term.strip() != ""
    assert each.status in ("in use", "proposed")
    assert 30 <= len(each.meaning) <= 260
    assert each.meaning.endswith(".")
    assert not DEVANAGARI.search(each.meaning)
    assert len(re.findall(r"[.:] [A-Z]", each.meaning)) <= 2, "one or two sentences, plain"
    assert DEVANAGARI.search(each.hindi)
    assert DEVANAGARI.search(each.hindi_meaning)
    assert each.hindi_meaning.endswith("।")
    if bad := each.misleading:
        assert DEVANAGARI.search(bad.rendering)
        assert 8 <= len(bad.why) <= 260
        assert bad.seen in (True, False)
        assert not bad.why.endswith("."), "the page makes the sentence"


@pytest.mark.parametrize("each", TERMS, ids=lambda each: each.term)
def test_a_term_stands_in_the_notebook_that_introduces_it(each: Term) -> None:
    text = text_of(each.notebook)
    assert any(stands_in(form, text) for form in forms(each)), f"none of {forms(each)}"


def test_terms_stand_in_the_order_of_the_notebooks() -> None:
    notebooks = [each.notebook for each in TERMS]
    assert notebooks == sorted(notebooks)
    assert set(notebooks) >= {path.stem for path in NOTEBOOKS.glob("*.ipynb")} - {"12_claims"}


def test_devanagari_is_written_in_one_way() -> None:
    data = Path(glossary.__file__).with_name("glossary.json").read_text(encoding="utf-8")
    assert unicodedata.is_normalized("NFC", data), "two spellings of a letter look alike: use NFC"
    assert json.loads(data)


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_what_a_notation_section_explains_is_in_the_glossary(path: Path) -> None:
    known = {form.casefold() for each in TERMS for form in forms(each)}
    for term in notation_terms(text_of(path.stem)):
        words = {term.casefold(), *term.casefold().split()}
        assert words & known, f"{term} of {path.stem} has no entry"


def test_notation_is_found() -> None:
    found = notation_terms(text_of("00_start_here"))
    assert {"report", "tokens", "latent width", "mini", "V3"} <= {each.strip() for each in found}


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == glossary.page(), (
        "run python -m dsv3_mini.course.glossary --write"
    )


def test_the_page_names_every_term_and_marks_hindi() -> None:
    page = glossary.page()
    for each in TERMS:
        assert f"\n### {each.term}\n" in page
        assert f"](#{each.term.lower().replace(' ', '-')})" in page
    assert not DEVANAGARI.search(re.sub('<span lang="hi">.*?</span>', "", page))


def test_looking_up() -> None:
    mla = look_up("MLA")
    assert mla.notebook == "02_mla"
    assert mla == look_up("mla") == look_up("Multi-head latent attention")
    assert mla == look_up("मल्टी-हेड लेटेंट अटेंशन (MLA)")
    assert look_up("weight").term == "parameter"
    assert look_up("वेट").term == "parameter"


def test_a_word_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"'attentoin' is not in the glossary.*such as attention"):
        look_up("attentoin")
    with pytest.raises(ValueError, match="expected a term such as"):
        look_up("")


def test_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert glossary.main(["mla"]) == 0
    assert "### MLA" in capsys.readouterr().out
    assert glossary.main(["nonsense"]) == 1
    assert "is not in the glossary" in capsys.readouterr().err
    assert glossary.main([]) == 0
    assert "--write" in capsys.readouterr().out
    monkeypatch.setattr(glossary, "PAGE", tmp_path / "glossary.md")
    assert glossary.main(["--write"]) == 0
    assert (tmp_path / "glossary.md").read_text(encoding="utf-8") == glossary.page()
    monkeypatch.setattr(glossary, "PAGE", tmp_path / "nowhere" / "glossary.md")
    with pytest.raises(SystemExit):
        glossary.main(["--write"])
    assert "does not exist: use the package from the repository" in capsys.readouterr().err
