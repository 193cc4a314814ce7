"""What the site is made of, without a browser: alt texts, source pages, prepared states, Binder."""

from __future__ import annotations

import importlib
import re
import tomllib
from typing import Any

import pytest

from dsv3_mini.viz import fp8_explorer, mla_explorer, states
from tests.environment import ROOT


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of docs/, as Sphinx does."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    return importlib.import_module


@pytest.mark.parametrize(
    ("printed", "source", "expected"),
    [
        (["a 1", "Figure: two lines, one falls."], "draw()", "two lines, one falls."),
        (["Figure: all of them fall,", "the last to 3.", "7 8"], "draw()",
         "all of them fall, the last to 3."),
        (["02.1, what it should look like: a ramp", "   up to 1."], "draw()", "a ramp up to 1."),
        (["x 1", "Left: bars of the bytes at each context, for all kinds."], "draw()",
         "Left: bars of the bytes at each context, for all kinds."),
        ([], 'a = "no label"\nplot(a, "step", f"{a}", "loss (nats)")', "Costs: step; loss (nats)"),
        ([], "dots(values, 'loss (nats)')", "Costs: Every value of a group as a dot (one a seed), "
         "their mean as a dash; bar names a level. loss (nats)"),
        (["12 steps"], "run.picture()", "Costs: 12 steps"),
    ],
)  # fmt: skip
def test_alt_text(part: Any, printed: list[str], source: str, expected: str) -> None:
    assert part("site_figures").alt_text(printed, source, "Costs") == expected


def test_a_source_is_cut_and_nothing_is_lost(part: Any) -> None:
    text = '"""Why."""\n\nimport os\n\n\n# about f\n@cache\ndef f():\n    return os\n\n\nclass A:\n'
    text += "    def g(self):\n        pass\n"
    found = part("site_sources").pieces(text)
    assert [(name, inside, first) for name, inside, first, _ in found] == [
        ("", [], 1), ("f", [], 6), ("A", ["g"], 12),
    ]  # fmt: skip
    for path in sorted((ROOT / "dsv3_mini").rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        pieces = part("site_sources").pieces(source)
        assert "".join("".join(code.split()) for *_, code in pieces) == "".join(source.split())


def test_states_are_the_explorers_own() -> None:
    """The first one is what the notebook's widget shows; all differ."""
    for name, numbers in (
        ("MLAExplorer", mla_explorer.cache_numbers()),
        ("Fp8Explorer", fp8_explorer.code_numbers(number=5.5)),
    ):
        found = states.MAKERS[name]()
        assert found.states[found.start].numbers == numbers
        assert len({state.value for state in found.states}) == len(found.states) > 5
        assert len({state.picture for state in found.states}) == len(found.states)


def test_binder_gets_the_versions_of_the_committed_outputs() -> None:
    binder = (ROOT / ".binder" / "requirements.txt").read_text(encoding="utf-8")
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    (torch,) = re.findall(r"^torch==(\S+)\+cpu$", binder, re.M)
    assert f"\ntorch=={torch}\n" in constraints
    for name in ("requirements.txt", "constraints.txt"):
        assert f" ../{name}" in binder
        assert (ROOT / name).is_file()


def test_colab_installs_the_ranges_of_everybody_else() -> None:
    """Four packages that notebooks import; JupyterLab, tests and the site are not needed there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    extra = project["optional-dependencies"]["notebooks"]
    assert len(extra) == 4
    for line in [*project["dependencies"], *extra]:
        assert re.search(rf"^{re.escape(line)} ", required, re.M), line
