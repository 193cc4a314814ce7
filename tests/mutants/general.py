"""Small changes all over the core modules: ``python -m tests.mutants.general``, or some by name.

The list of deliberate mistakes holds what someone thought of. Here mutmut makes every change that
its rules allow (another operator, a number plus one, an argument left out) and asks whether a test
notices. Each module is changed in a copy, under the test files that are about it. What no test
notices needs a reason in ``reasons.toml``; without one, or with fewer than 85 % caught, this fails.

Left alone: the text of errors (whatever stands in a ``raise``), class fields and constants.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path

from tests.environment import FIXED, ROOT
from tests.mutants.__main__ import OWN, copy

HERE = Path(__file__).parent
REPORT, REASONS = HERE / "general.md", HERE / "reasons.toml"
SCRATCH = ROOT / "build" / "mutants"
ENOUGH = 0.85
TESTS = {
    "config": ("config", "bad_input", "checkpoint"),
    "rope": ("rope",),
    "mla": ("mla", "cache"),
    "moe": ("moe", "balance"),
    "balance": ("balance", "balance_variants", "bad_input"),
    "mtp": ("mtp", "bad_input"),
    "fp8": ("fp8", "fp8_checkpoint", "bad_input"),
    "fp8_numbers": ("fp8_numbers", "fp8", "bad_input"),
    "speculative": ("speculative", "bad_input"),
    "checkpoint": ("checkpoint", "fp8_checkpoint", "bad_input"),
}
"""For each module the test files that are about it, without ``test_``. Not ``parity``, which keeps
what it once computed: each change is tried in a fork of a process that has run all tests."""
SLOW = "tests/test_speculative.py::test_sampled_text_has_the_distribution_of_plain_sampling"
ENDINGS = {
    "config": "147", "mla": "16", "moe": "16", "fp8": "16", "fp8_numbers": "16",
    "speculative": "16", "checkpoint": "147",
}  # fmt: skip
"""A sample of the larger modules: changes count from 1 in each function, and these are the last
digits of the numbers that are tried. All of the others."""
SETTINGS = """
[tool.mutmut]
source_paths = ["dsv3_mini"]
only_mutate = ["dsv3_mini/{module}.py"]
pytest_add_cli_args = ["-o", "addopts=", "-p", "no:cacheprovider", "--deselect", "{slow}"]
pytest_add_cli_args_test_selection = {tests}
use_setproctitle = false
use_git_change_detection = false
timeout_multiplier = 3.0
timeout_constant = 5.0
"""
HEAD = """\
# Small changes all over, and what no test notices

Written by `python -m tests.mutants.general --write`: changes that the rules of {tool} make.
Left alone are the text of errors (whatever stands in a `raise`), class fields and constants of
modules. Where the table has digits, it is a sample: mutmut numbers the changes of a function from
1, and those are tried whose number ends in one of them. A change that makes a loop endless meets a
limit on time, and is then tried again.

| module | sample | changes | killed | timed out | survived | caught |
"""
FATES: dict[int | None, str] = {
    **dict.fromkeys((1, 3), "killed"),
    0: "survived",
    **dict.fromkeys((24, -24, 36, 152, 255), "timed out"),
    33: "no test gets there",
}
"""What mutmut means by a change's exit status."""

Key = tuple[str, str, str, str]
"""Module, function, the lines that went, the lines that came: line numbers would not stay."""


@dataclass(frozen=True)
class Change:
    """One change that mutmut made: the lines that went, the lines that came, what became of it."""

    module: str
    function: str
    old: str
    new: str
    fate: str
    """'killed', 'timed out', 'survived' or what else happened."""

    @property
    def caught(self) -> bool:
        return self.fate in ("killed", "timed out")

    @property
    def key(self) -> Key:
        """What a reason is found by."""
        return self.module, self.function, self.old, self.new


def prepare(source: str) -> str:
    """The same module, in a form of which mutmut changes what it should and nothing else.

    It leaves decorated functions alone, so ``@d def f`` becomes ``def f`` and ``f = d(f)``; and a
    comment on either side tells it to leave each ``raise`` as it is.
    """
    lines = source.splitlines()
    put: dict[int, list[str]] = defaultdict(list)  # before which line of the source
    gone: set[int] = set()
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Raise | ast.FunctionDef)]
    for node in sorted(nodes, key=lambda node: (isinstance(node, ast.FunctionDef), node.lineno)):
        space, after = " " * node.col_offset, (node.end_lineno or 0) + 1
        if isinstance(node, ast.Raise):
            put[node.lineno].append(f"{space}# pragma: no mutate start")
            put[after].append(f"{space}# pragma: no mutate end")
            continue
        names = [ast.unparse(decorator) for decorator in node.decorator_list]
        if names and names not in (["classmethod"], ["staticmethod"]):
            put[after] += [f"{space}{node.name} = {name}({node.name})" for name in reversed(names)]
            gone.update(range(node.decorator_list[0].lineno, node.lineno))
    kept = [[*put[n], *([] if n in gone else [line])] for n, line in enumerate(lines, start=1)]
    return "\n".join([*chain(*kept), *put[len(lines) + 1]]) + "\n"


def attempt(module: str) -> list[Change]:
    """Make every change to one module and run its tests on each."""
    folder = SCRATCH / module
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    copy(ROOT, folder)
    path = folder / "dsv3_mini" / f"{module}.py"
    path.write_text(prepare(path.read_text(encoding="utf-8")), encoding="utf-8")
    with (folder / "pyproject.toml").open("a", encoding="utf-8") as settings:
        tests = json.dumps(tests_of(module))
        settings.write(SETTINGS.format(module=module, tests=tests, slow=SLOW))
    mutmut(folder, *([f"*__mutmut_*[{ENDINGS[module]}]"] if module in ENDINGS else []))
    # Whoever took too long gets a second chance: this process may have had to wait meanwhile.
    found = codes(folder, module)
    if late := [name for name in found if FATES.get(found[name]) == "timed out"]:
        mutmut(folder, *late)
    made = (folder / "mutants" / "dsv3_mini" / f"{module}.py").read_text(encoding="utf-8")
    return list(changes(module, made, codes(folder, module)))


def tests_of(module: str) -> list[str]:
    return [f"tests/test_{name}.py" for name in TESTS[module]]


def mutmut(folder: Path, *names: str) -> None:
    """Run the tool in a copy, on some changes or all. Raises SystemExit if it cannot work."""
    done = subprocess.run(
        [sys.executable, "-m", "mutmut", "run", "--max-children", "1", *names], cwd=folder,
        env=os.environ | FIXED | OWN | {"PYTHONPATH": os.environ.get("PYTHONPATH", "")},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise SystemExit(f"mutmut failed in {folder}:\n{(done.stdout + done.stderr)[-3000:]}")


def codes(folder: Path, module: str) -> dict[str, int | None]:
    """The exit status that the tests had for each change."""
    notes = folder / "mutants" / "dsv3_mini" / f"{module}.py.meta"
    found: dict[str, int | None] = json.loads(notes.read_text("utf-8"))["exit_code_by_key"]
    return found


def changes(module: str, made: str, code_of: Mapping[str, int | None]) -> Iterator[Change]:
    """Read the changes out of what mutmut wrote: a copy of its function for each of them."""
    lines = made.splitlines()
    body = {
        node.name: lines[node.lineno - 1 : node.end_lineno]
        for node in ast.walk(ast.parse(made))
        if isinstance(node, ast.FunctionDef)
    }
    for name, code in code_of.items():
        if code is None:  # not in the sample
            continue
        name = name.rpartition(".")[2]
        stem = re.sub(r"__mutmut_\d+$", "", name)
        whole = f"{stem}__mutmut_orig"
        before = [line.replace(whole, "f") for line in body[whole]]
        after = [line.replace(name, "f") for line in body[name]]
        found = list(difflib.ndiff(before, after))
        old, new = (
            " ".join(line[2:].strip() for line in found if line.startswith(sign))
            for sign in ("- ", "+ ")
        )
        function = stem.removeprefix("x_").removeprefix("xǁ").replace("ǁ", ".")  # x_f or xǁCǁf
        yield Change(module, function, old, new, FATES.get(code, f"exit status {code}"))


def results(module: str, fresh: bool) -> list[Change]:
    """Of one module: as noted by an earlier run if neither it nor its tests have changed since."""
    notes = SCRATCH / f"{module}.json"
    read = [ROOT / "dsv3_mini" / f"{module}.py", *(ROOT / test for test in tests_of(module))]
    parts = [SETTINGS, version("mutmut"), ENDINGS.get(module, "")]
    parts += [path.read_text(encoding="utf-8") for path in read]
    state = hashlib.sha256("".join(parts).encode()).hexdigest()
    if not fresh and notes.exists():
        noted = json.loads(notes.read_text("utf-8"))
        if noted["state"] == state:
            return [Change(**each) for each in noted["changes"]]
    found = attempt(module)
    noted = {"state": state, "changes": [asdict(change) for change in found]}
    notes.write_text(json.dumps(noted, indent=1, ensure_ascii=False), encoding="utf-8")
    return found


def reasons() -> dict[Key, str]:
    """Why each survivor is left, from ``reasons.toml``, where one reason may have many changes."""
    found = {}
    for entry in tomllib.loads(REASONS.read_text(encoding="utf-8"))["left"]:
        for old, new in entry["changes"]:
            found[entry["module"], entry["function"], old, new] = entry["why"]
    return found


def row(name: str, found: Sequence[Change]) -> str:
    """Of the table: how many, killed, timed out, survived, the share."""
    fates, many = [change.fate for change in found], len(found)
    killed, late = fates.count("killed"), fates.count("timed out")
    counts = f"{many} | {killed} | {late} | {many - killed - late} | {(killed + late) / many:.1%}"
    return f"| {name} | {ENDINGS.get(name, '')} | {counts} |"


def table(found: dict[str, list[Change]], why: dict[Key, str], tool: str) -> str:
    """The report in Markdown, with the ``tool``'s name and version."""
    every = [change for part in found.values() for change in part]
    lines = HEAD.format(tool=tool).splitlines()
    lines += ["|-|-|-|-|-|-|-|", *(row(name, part) for name, part in found.items())]
    lines += [row("all", every)]
    lines += ["", "Run for each module:", ""]
    lines += [f"- `{name}.py`: `{' '.join(tests_of(name))}`" for name in found]
    for name, part in found.items():
        lines += ["", f"## {name}.py: what survives, or timed out", ""]
        lines += ["| in | from | to | why it is left |", "|-|-|-|-|"]
        for change in dict.fromkeys(change for change in part if change.fate != "killed"):
            reason = "" if change.caught else why.get(change.key, "**no reason yet**")
            if change.fate != "survived":
                reason = f"{reason} ({change.fate})".strip()
            cells = (code(change.function), code(change.old), code(change.new), reason)
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|") if text else "(nothing)"


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if enough was caught and every survivor has a reason, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants.general", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    named = f"of {', '.join(TESTS)}; else all"
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=named)
    anew = "also modules that have not changed since an earlier run, nor their tests"
    parser.add_argument("--fresh", action="store_true", help=anew)
    parser.add_argument("--write", action="store_true", help=f"all of them, into {REPORT.name}")
    options = parser.parse_args(arguments)
    if unknown := set(options.modules) - set(TESTS):
        parser.error(f"there is no list of tests for {', '.join(sorted(unknown))}")
    if options.write and options.modules:
        parser.error("--write makes a report of all modules; leave out names")

    found, why = {}, reasons()
    for module in options.modules or TESTS:
        found[module] = results(module, options.fresh)
        print(row(module, found[module]), flush=True)
    every = [change for part in found.values() for change in part]
    left = {change.key for change in every if not change.caught}
    print(row("all", every))
    for module, function, old, new in sorted(left - why.keys()):
        print(f"no reason: {module}.{function}\n  - {old}\n  + {new}")
    for module, function, old, new in sorted(why.keys() - left):
        if module in found:
            print(f"reason no longer needed: {module}.{function}\n  - {old}\n  + {new}")
    if options.write:
        tool = f"mutmut {version('mutmut')}"
        REPORT.write_text(table(found, why, tool), encoding="utf-8")
    caught = sum(change.caught for change in every)
    return 0 if caught >= ENOUGH * len(every) and left <= why.keys() else 1


if __name__ == "__main__":
    sys.exit(main())
