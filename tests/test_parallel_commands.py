"""The commands ``train`` and ``generate`` begun by torchrun: what one process does, by two."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv3_mini import Transformer, generate_command, train_command
from dsv3_mini.checkpoint import load_pretrained, save_pretrained
from dsv3_mini.config import ModelConfig
from dsv3_mini.course.spread import torchrun
from dsv3_mini.course.trained import FOLDER as TRAINED
from dsv3_mini.resume import PARALLEL, ResumeError, Run
from tests.environment import FIXED, ROOT
from tests.test_resume import SETTINGS, corpus

TRAIN = [
    *("--preset", "tiny", "--steps", "12", "--save-every", "5", "--warmup", "2"),
    *("--batch-size", "4", "--seq-len", "16", "--characters", "4000"),
]
LIMIT = 90


def begin(*words: str) -> subprocess.Popen[str]:
    """A job of two processes, in a process group of its own, as a shell begins it."""
    return subprocess.Popen(
        torchrun(2, "-m", *words), cwd=ROOT, env={**os.environ, **FIXED}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def job(*words: str) -> str:
    """What the job printed; it has to end well."""
    output, _ = (process := begin(*words)).communicate(timeout=LIMIT)
    assert process.returncode == 0, output
    return output


def log(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run 'two' of two processes, exported to 'exported'."""
    folder = tmp_path_factory.mktemp("runs")
    options = ["--out", str(folder / "two"), "--export", str(folder / "exported")]
    (folder / "said").write_text(job("dsv3_mini.train", *TRAIN, *options))
    return folder


def test_two_processes_train_what_one_does(runs: Path) -> None:
    alone = ["--out", str(runs / "one"), "--export", str(runs / "exported by one")]
    assert train_command.main([*TRAIN, *alone]) == 0
    for two, one in zip(log(runs / "two"), log(runs / "one"), strict=True):
        assert two.keys() == one.keys()
        for name in ("loss", "balance_loss", "mtp_losses"):
            assert two[name] == pytest.approx(one[name], abs=1e-5)
        assert (two["step"], two["tokens"]) == (one["step"], one["tokens"])
    ours, theirs = (load_pretrained(runs / name) for name in ("exported", "exported by one"))
    for name, weight in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], weight, atol=2e-4, rtol=0.01)
    said = (runs / "said").read_text()
    assert said.count("held-out loss") == 4  # once, not once a process
    assert "step 12 of 12 saved" in said
    assert sorted(p.name for p in (runs / "two").iterdir()) == [
        "log.jsonl", PARALLEL, "step-000012",
    ]  # fmt: skip


@pytest.mark.parametrize("how", ["interrupted", "killed"])
def test_a_stopped_job_goes_on_to_the_same_end(runs: Path, how: str) -> None:
    """Ctrl-C saves the step it is at; after kill -9 the job goes on from the last save."""
    options = ["dsv3_mini.train", *TRAIN, "--out", str(runs / how)]
    process = begin(*options)
    wanted, began = (7 if how == "killed" else 2), time.monotonic()
    path = runs / how / "log.jsonl"
    while not path.is_file() or len(path.read_text().splitlines()) < wanted:
        assert process.poll() is None
        assert time.monotonic() - began < LIMIT
        time.sleep(0.01)
    if how == "interrupted":
        os.killpg(process.pid, signal.SIGINT)
    else:  # the ranks too, which torchrun puts in sessions of their own
        found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
        for pid in (process.pid, *map(int, found.stdout.split())):
            os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=LIMIT)
    assert process.returncode != 0
    saved = [int(path.name[5:]) for path in (runs / how).glob("step-*")]
    assert saved == [5] if how == "killed" else 2 <= saved[0] < 12
    job(*options)
    assert log(runs / how) == log(runs / "two")
    for part in sorted((runs / "two" / "step-000012").glob("*.distcp")):
        assert (runs / how / "step-000012" / part.name).read_bytes() == part.read_bytes()


def test_a_full_export_folder_is_refused_before_the_run(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--out", str(tmp_path / "run"), "--export", str(runs / "exported")]
    assert train_command.main([*TRAIN, *options]) == 2
    assert "exported is not empty" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_one_process_leaves_the_run_of_several_alone(runs: Path) -> None:
    with pytest.raises(ResumeError, match=r"several processes.*torchrun"):
        Run.open(runs / "two", ModelConfig.tiny(), SETTINGS, corpus())


def test_two_processes_write_the_text_that_one_writes(capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(TRAINED), "--prompt", "def load(self, name):", "--max-new-tokens", "20"]
    assert generate_command.main(words) == 0
    plain = capsys.readouterr().out
    assert generate_command.main([*words, "--draft"]) == 0
    drafted = capsys.readouterr().out
    assert drafted.startswith(plain)
    assert "drafts accepted" in drafted
    assert job("dsv3_mini.generate", *words, "--draft").endswith(drafted)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ids", "5,a"], "--ids has 'a'; expected integers with commas"),
        (["--ids", "5,9999"], "token 9999 is outside 0 .. 2047"),
        (["--prompt", ""], "expected at least one integer token"),
        (["--prompt", "x", "--temperature", "-1"], "temperature is -1.0"),
    ],
)
def test_generate_says_what_is_wrong(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert generate_command.main([str(TRAINED), *words]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert message in said.err
    assert not said.out


def test_generate_takes_ids_and_a_tokenizer_of_the_folder(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(runs / "exported"), "--ids", "5,17", "--max-new-tokens", "3"]
    assert generate_command.main(words) == 0
    made = capsys.readouterr().out.strip()
    assert made.startswith("5,17,")
    assert made.count(",") == 4
    assert generate_command.main([*words[:1], "--prompt", "x", "--max-new-tokens", "3"]) == 0
    plain = capsys.readouterr().out
    ours = runs / "exported" / "tokenizer.json"
    package = ROOT / "dsv3_mini" / "assets" / "tokenizer.json"
    about = json.loads(package.read_text(encoding="utf-8"))
    vocabulary = about["model"]["vocab"]
    swap = {vocabulary["x"]: "y", vocabulary["y"]: "x"}
    about["model"]["vocab"] = {swap.get(i, token): i for token, i in vocabulary.items()}
    ours.write_text(json.dumps(about), encoding="utf-8")
    assert generate_command.main([*words[:1], "--prompt", "y", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out[1:].translate(str.maketrans("xy", "yx")) == plain[1:]
    ours.write_text("{}", encoding="utf-8")
    assert generate_command.main([*words[:1], "--prompt", "y"]) == 2
    assert "tokenizer.json is damaged" in capsys.readouterr().err
    ours.unlink()


def test_a_vocabulary_without_tokenizer_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_pretrained(Transformer(ModelConfig.tiny()), tmp_path / "tiny")
    assert generate_command.main([str(tmp_path / "tiny"), "--prompt", "x"]) == 2
    assert "128 tokens and the package's tokenizer 2048" in capsys.readouterr().err
