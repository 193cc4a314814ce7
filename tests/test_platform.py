"""The commands do the same without HOME, in other locales and time zones, below odd names.

The package is then read-only: it writes nothing into its own folder.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.environment import FIXED, ROOT
from tests.reference.folders import listing

# One process runs all commands, each as python -m does: starting torch takes seconds.
PROGRAM = """
import json, os, runpy, sys
import dsv3_mini

sys.stdout.buffer.write(os.fsencode(dsv3_mini.__file__) + b"\\n")
trained = dsv3_mini.__file__.replace("__init__.py", "assets/trained")
for module, *words in json.loads(sys.argv[1]):
    sys.argv = [module, *(word.replace("TRAINED", trained) for word in words)]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=False)
    except SystemExit as end:
        print(module, "ends with", end.code, flush=True)
"""
COMMANDS = [
    ["dsv3_mini.train", "--preset", "tiny", "--steps", "3", "--save-every", "2", "--batch-size",
     "4", "--seq-len", "16", "--characters", "4000", "--out", "run", "--export", "model"],
    ["dsv3_mini.checkpoint", "inspect", "model"],
    ["dsv3_mini.checkpoint", "inspect", "nowhere"],
    ["dsv3_mini.generate", "TRAINED", "--prompt", "def load(self):", "--max-new-tokens", "12"],
    ["dsv3_mini.generate", "model", "--prompt", "ä", "--max-new-tokens", "6"],
]  # fmt: skip
PLAIN = {**FIXED, "LC_ALL": "C.UTF-8", "TZ": "UTC"}
OTHERS = {
    "C": {"LC_ALL": "C", "TZ": "Asia/Kolkata", "PYTHONHASHSEED": "5"},
    # No UTF-8 mode either, so that text, files' names and the terminal are ASCII to Python.
    "ASCII": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "TZ": "Asia/Kolkata"},
}
KEPT = ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT")  # HOME is not among them
ODD = "ein Ördner 数"


def commands(folder: Path, package: Path, environment: dict[str, str]) -> dict[str, object]:
    """What the commands write, begun in ``folder`` with these variables and few others."""
    folder.mkdir(parents=True)
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(COMMANDS)], cwd=folder, capture_output=True,
        env={**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(package.parent),
             "PYTHONDONTWRITEBYTECODE": "1", **environment},
    )  # fmt: skip
    said = done.stderr.decode("ascii", "backslashreplace")
    assert done.returncode == 0, said
    lines = (folder / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    log = [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]
    files = {name: data for name, data in listing(folder).items() if name != "run/log.jsonl"}
    first, rest = done.stdout.split(b"\n", 1)
    assert os.fsencode(package / "__init__.py") == first
    return {"output": rest, "errors": said.count("error: "), "log": log, "files": files}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    plain = commands(tmp_path_factory.mktemp("plain") / "x", ROOT / "dsv3_mini", PLAIN)
    assert plain["errors"] == 1
    return plain


@pytest.mark.parametrize("name", OTHERS)
def test_the_commands_do_the_same_elsewhere(
    plain: dict[str, object], tmp_path: Path, name: str
) -> None:
    package = tmp_path / ODD / "site packages" / "dsv3_mini"
    shutil.copytree(ROOT / "dsv3_mini", package, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (package, *package.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = listing(package)
    ours = commands(tmp_path / ODD / "work", package, OTHERS[name])
    assert listing(package) == before
    if name == "ASCII":  # what the terminal cannot show comes as \\xe4, and stops nothing
        output = plain["output"]
        assert isinstance(output, bytes)
        assert not output.isascii()
        plain = {**plain, "output": output.decode().encode("ascii", "backslashreplace")}
    assert ours == plain
