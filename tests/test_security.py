"""Nothing is unpickled, evaluated or fetched; nothing but loopback; no path leads outside."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml  # type: ignore[import-untyped]
from safetensors.torch import load_file, save_file

from dsv3_mini import parallel
from dsv3_mini.checkpoint import load_pretrained, save_pretrained
from dsv3_mini.config import ModelConfig
from dsv3_mini.inspect_command import main as inspect_main
from dsv3_mini.model import Transformer
from dsv3_mini.shards import INDEX, SINGLE, CheckpointError
from tests.environment import FIXED, ROOT

FILES = sorted((ROOT / "dsv3_mini").rglob("*.py"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))

PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
CALLS = {
    "eval": "evaluates text",
    "exec": "runs text",
    "compile": "compiles text",
    "__import__": "imports by name",
    "os.system": "starts a shell",
    "os.popen": "starts a shell",
    "subprocess.getoutput": "starts a shell",
    "subprocess.getstatusoutput": "starts a shell",
    "yaml.load": "may run code",
    "yaml.unsafe_load": "may run code",
    "torch.jit.load": "runs the code of a file",
    "torch.hub.load": "fetches code and runs it",
}


def dangers(source: str) -> list[str]:
    """What is dangerous in a module."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        found += [f"imports {name}" for name in names if name.split(".")[0] in PICKLES]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func).removeprefix("builtins.")
        options = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if called in CALLS:
            found.append(f"{called} {CALLS[called]}")
        if options.get("shell", "False") != "False":
            found.append(f"{called} starts a shell")
        if called == "torch.load" and options.get("weights_only") != "True":
            found.append("torch.load without weights_only=True unpickles anything")
        if options.get("allow_pickle", "False") != "False":
            found.append(f"{called} unpickles")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_package_runs_no_text_and_unpickles_nothing(path: Path) -> None:
    assert dangers(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "danger"),
    [
        ("import pickle", "imports pickle"),
        ("def f():\n    from joblib.x import load", "imports joblib.x"),
        ("eval('1')", "eval evaluates text"),
        ("import builtins\nbuiltins.exec('1')", "exec runs text"),
        ("os.system('ls')", "starts a shell"),
        ("subprocess.run('ls', shell=True)", "subprocess.run starts a shell"),
        ("subprocess.run('ls', shell=wish)", "subprocess.run starts a shell"),
        ("yaml.load(text, Loader=yaml.Loader)", "may run code"),
        ("torch.load(path)", "weights_only=True"),
        ("torch.load(path, weights_only=False)", "weights_only=True"),
        ("numpy.load(path, allow_pickle=True)", "unpickles"),
    ],
)
def test_a_danger_is_found(source: str, danger: str) -> None:
    [found] = dangers(source)
    assert danger in found


def test_what_only_sounds_dangerous_is_let_through() -> None:
    assert dangers("model.eval()\nast.literal_eval('1')\nre.compile('x')") == []
    assert dangers("torch.load(path, weights_only=True)\nsubprocess.run(['ls'], shell=False)") == []


def test_the_one_pickle_is_that_of_a_parallel_run_and_says_so() -> None:
    """torch.distributed.checkpoint keeps its index in one; there is no other way to read it."""
    users = {path.stem for path in FILES if "distributed.checkpoint import" in path.read_text()}
    assert users == {"parallel"}
    assert "Load only your own saves" in (parallel.load.__doc__ or "")


# -------------------------------------------------------------------------------- folders


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in several shards."""
    folder = tmp_path_factory.mktemp("written") / "model"
    save_pretrained(Transformer(ModelConfig.tiny()), folder, max_shard_bytes=20_000)
    return folder


@pytest.mark.parametrize("name", ["../{}", "./{}", "sub/../{}", "{}/", "//{}", "/{}/x/../../../{}"])
def test_an_index_leads_to_no_other_folder(written: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(written, folder)
    (folder / "sub").mkdir()
    index = json.loads((folder / INDEX).read_text())
    file = index["weight_map"]["lm_head.weight"]
    shutil.copy(folder / file, tmp_path / file)  # it is there, and still not read
    index["weight_map"]["lm_head.weight"] = name.format(file, file)
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="expected file names inside the folder"):
        load_pretrained(folder)


def test_a_symbolic_link_is_followed_as_in_the_hubs_cache(written: Path, tmp_path: Path) -> None:
    """There each file is a link to ../../blobs. Whoever can put links can also put files."""
    shutil.copytree(written, tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(Path("..") / "blobs" / path.name)
    ours, linked = (load_pretrained(folder) for folder in (written, tmp_path / "snapshot"))
    assert torch.equal(ours.lm_head.weight, linked.lm_head.weight)


def test_a_tensors_name_writes_nothing_to_the_terminal(
    written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_pretrained(load_pretrained(written), tmp_path / "model")
    tensors = load_file(tmp_path / "model" / SINGLE)
    tensors["\x1b]0;owned\x07"] = torch.zeros(1)
    save_file(tensors, tmp_path / "model" / SINGLE)
    assert inspect_main(["inspect", str(tmp_path / "model")]) == 2
    said = "".join(capsys.readouterr())
    assert r"\x1b]0;owned\x07" in said
    assert "\x1b" not in said


# -------------------------------------------------------------------------------- network

PROGRAM = """
import importlib, pkgutil, sys

FORBIDDEN = ("socket.", "urllib.", "http.", "ftplib.", "smtplib.", "subprocess.", "os.system",
             "os.exec", "os.posix_spawn", "os.fork", "pickle.find_class")

def hook(event, arguments):
    # A torch that was built for CUDA asks the linker where the driver lies.
    asks = str(arguments[:1]).endswith("/ldconfig',)")
    if event.startswith(FORBIDDEN) and not asks:
        sys.exit(f"forbidden: {event} {arguments}")

sys.addaudithook(hook)
import dsv3_mini
for module in pkgutil.iter_modules(dsv3_mini.__path__):
    importlib.import_module(f"dsv3_mini.{module.name}")
from dsv3_mini import generate_command, inspect_command, train_command

folder = sys.argv[1]
train = ["--preset", "tiny", "--batch-size", "4", "--seq-len", "16", "--characters", "4000",
         "--steps", "2", "--save-every", "1", "--out", folder + "/run"]
assert train_command.main([*train, "--export", folder + "/model"]) == 0
assert train_command.main(train) == 0  # which loads the last save
assert inspect_command.main(["inspect", folder + "/model"]) == 0
assert generate_command.main([folder + "/model", "--ids", "5", "--max-new-tokens", "2"]) == 0
"""


def offline(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run PROGRAM; where the system allows it, in a network that has not even a loopback."""
    alone = ["unshare", "--user", "--map-root-user", "--net"]
    if (
        not shutil.which("unshare")
        or subprocess.run([*alone, "true"], capture_output=True).returncode
    ):
        alone = []
    return subprocess.run(
        [*alone, sys.executable, "-c", PROGRAM, str(folder)], cwd=ROOT,
        env={**os.environ, **FIXED}, capture_output=True, text=True,
    )  # fmt: skip


def test_nothing_is_fetched_started_or_unpickled(tmp_path: Path) -> None:
    """Importing, training, saving, resuming, inspecting and generating."""
    done = offline(tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "everything fits" in done.stdout
    assert re.search(r"^5,\d+,\d+$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    "wrong",
    [
        "import socket; socket.create_connection(('127.0.0.1', 1))",
        "import pickle, collections; pickle.loads(pickle.dumps(collections.Counter))",
        "import subprocess; subprocess.run(['true'])",
    ],
    ids=["socket", "pickle", "process"],
)
def test_the_guard_against_that_works(wrong: str) -> None:
    hook = PROGRAM[: PROGRAM.index("import dsv3_mini")]
    done = subprocess.run([sys.executable, "-c", hook + wrong], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("forbidden: ")


# -------------------------------------------------------------------------------- Jupyter and CI


def test_jupyterlab_listens_on_loopback_with_its_token() -> None:
    recipe = re.search(r"^lab:.*\n\t(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe is not None
    words = recipe[1].split()
    assert [word for word in words if re.search(r"[-.]ip\b", word)] == ["--ip=127.0.0.1"]
    off = ("token", "password", "allow_remote", "disable_check_xsrf", "allow_origin", "no-auth")
    assert not [word for word in words if any(each in word.lower() for each in off)]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_may_only_read_and_uses_only_what_is_pinned(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    workflow: dict[Any, Any] = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}
    assert "secrets." not in text
    assert "pull_request_target" not in text
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    used = [step["uses"] for step in steps if "uses" in step]
    assert used
    assert not [action for action in used if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action)]
    assert text.count(" # v") == len(used), "a pin says its version"
    for job in workflow["jobs"].values():
        assert "permissions" not in job
        assert job["timeout-minutes"] <= 300
    for step in steps:
        if "checkout" in step.get("uses", ""):
            assert step["with"]["persist-credentials"] is False
        # What others write (a branch's name, a title) never becomes part of a script.
        assert "github." not in step.get("run", "")


def test_there_are_workflows_for_every_push_and_every_week() -> None:
    assert [path.name for path in WORKFLOWS] == ["test.yml", "weekly.yml"]
