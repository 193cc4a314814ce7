"""A run that is killed at any moment and started again ends as if nothing had happened."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsv3_mini.checkpoint import load_pretrained
from dsv3_mini.config import ModelConfig
from dsv3_mini.data import Corpus
from dsv3_mini.fp8 import Fp8Linear
from dsv3_mini.resume import ResumeError, Run
from dsv3_mini.train import TrainConfig, train

SETTINGS = TrainConfig(steps=6, batch_size=4, seq_len=16, warmup=2, gamma=0.01)
COMMAND = [
    *(sys.executable, "-m", "dsv3_mini.train", "--preset", "tiny", "--steps", "40"),
    *("--save-every", "2", "--batch-size", "4", "--seq-len", "16", "--characters", "4000"),
]


def corpus(seed: int = 0) -> Corpus:
    generator = torch.Generator().manual_seed(seed)
    streams = {
        name: torch.randint(128, (400,), generator=generator) for name in ("python", "prose")
    }
    return Corpus(streams, streams, vocab_size=128)


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in run.model.state_dict().items()}


@pytest.mark.parametrize("fp8", [False, True])
def test_saved_and_resumed_is_bit_identical_to_uninterrupted(tmp_path: Path, fp8: bool) -> None:
    settings = dataclasses.replace(SETTINGS, fp8=fp8)
    whole = Run.open(tmp_path / "whole", ModelConfig.tiny(), settings, corpus())
    for record in train(whole.model, corpus(), settings, whole.state):
        whole.log(record)
    first = Run.open(tmp_path / "parts", ModelConfig.tiny(), settings, corpus())
    for record in train(first.model, corpus(), settings, first.state):
        first.log(record)
        if record.step == 3:
            first.save()
        if record.step == 4:
            break  # step 4 was never saved and is done again
    second = Run.open(tmp_path / "parts", ModelConfig.tiny(), settings, corpus())
    assert second.state.step == 3
    for record in train(second.model, corpus(), settings, second.state):
        second.log(record)
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(second)[name]), name
    second.save()
    lines = (tmp_path / "parts" / "log.jsonl").read_text().splitlines()
    assert len(lines) == 6
    loaded = load_pretrained(second.latest)
    assert torch.equal(loaded.lm_head.weight, second.model.lm_head.weight)
    cast = any(isinstance(module, Fp8Linear) for module in second.model.modules())
    assert cast == fp8
    other = dataclasses.replace(settings, fp8=not fp8)
    with pytest.raises(ResumeError, match="fp8"):
        Run.open(tmp_path / "parts", ModelConfig.tiny(), other, corpus())


def test_killed_runs_end_with_the_same_weights(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
    subprocess.run([*COMMAND, "--out", str(tmp_path / "whole")], check=True, **quiet)
    killed = 0
    for wanted in (2, 14, 26):
        process = subprocess.Popen([*COMMAND, "--out", str(tmp_path / "parts")], **quiet)
        while process.poll() is None:
            saves = [int(p.name[5:]) for p in (tmp_path / "parts").glob("step-*")]
            if saves and max(saves) >= wanted:
                time.sleep(0.013)  # into the next steps, or the next save
                process.send_signal(signal.SIGKILL)
                break
        killed += process.wait() == -signal.SIGKILL
    assert killed >= 2
    subprocess.run([*COMMAND, "--out", str(tmp_path / "parts")], check=True, **quiet)
    for file in ("model.safetensors", "optimizer.safetensors"):
        whole, parts = (load_file(tmp_path / r / "step-000040" / file) for r in ("whole", "parts"))
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == ["log.jsonl", "step-000040"]
    assert len((tmp_path / "parts" / "log.jsonl").read_text().splitlines()) == 40


def test_another_run_is_refused(tmp_path: Path) -> None:
    run = Run.open(tmp_path / "run", ModelConfig.tiny(), SETTINGS, corpus())
    next(iter(train(run.model, corpus(), SETTINGS, run.state)))
    run.save()
    other = TrainConfig(**{**SETTINGS.__dict__, "seed": 3})
    with pytest.raises(ResumeError, match="seed was 0 and is now 3"):
        Run.open(tmp_path / "run", ModelConfig.tiny(), other, corpus())
    with pytest.raises(ResumeError, match="data was"):
        Run.open(tmp_path / "run", ModelConfig.tiny(), SETTINGS, corpus(seed=1))
    with pytest.raises(ResumeError, match="hidden_size was 32 and is now 64"):
        Run.open(tmp_path / "run", ModelConfig.tiny().replace(hidden_size=64), SETTINGS, corpus())
    (run.latest / "optimizer.safetensors").write_bytes(b"short")
    with pytest.raises(ResumeError, match="damaged"):
        Run.open(tmp_path / "run", ModelConfig.tiny(), SETTINGS, corpus())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ResumeError, match="choose a new folder"):
        Run.open(tmp_path / "mine", ModelConfig.tiny(), SETTINGS, corpus())
    with pytest.raises(ResumeError, match="is a file"):
        Run.open(tmp_path / "mine" / "thesis.txt", ModelConfig.tiny(), SETTINGS, corpus())


def started(folder: Path) -> Run:
    """A run of three steps, saved and logged."""
    run = Run.open(folder, ModelConfig.tiny(), SETTINGS, corpus())
    for record in train(run.model, corpus(), SETTINGS, run.state):
        run.log(record)
        if record.step == 3:
            break
    run.save()
    return run


def reopened(folder: Path) -> Run:
    return Run.open(folder, ModelConfig.tiny(), SETTINGS, corpus())


def test_moments_biases_and_steps_come_back_bit_for_bit(tmp_path: Path) -> None:
    first = started(tmp_path / "run")
    second = reopened(tmp_path / "run")
    for name, tensor in weights(first).items():
        assert torch.equal(tensor, weights(second)[name]), name
    assert any(gate.e_score_correction_bias.any() for gate in second.model.gates)
    ahead, behind = first.state.optimizer.state_dict(), second.state.optimizer.state_dict()
    assert ahead["param_groups"][0].keys() == behind["param_groups"][0].keys()
    assert ahead["state"].keys() == behind["state"].keys()
    for number, kept in ahead["state"].items():
        for kind in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(kept[kind], behind["state"][number][kind]), (number, kind)
    rests = [train(run.model, corpus(), SETTINGS, run.state) for run in (first, second)]
    for one, two in zip(*rests, strict=True):
        assert {**one.scalars(), "seconds": 0} == {**two.scalars(), "seconds": 0}


def test_the_log_has_every_step_once_even_after_a_torn_line(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    log = tmp_path / "run" / "log.jsonl"
    record = next(train(run.model, corpus(), SETTINGS, run.state))
    run.log(record)  # step 4, never saved
    with log.open("a") as file:
        file.write('{"step": 5, "lo')
    again = reopened(tmp_path / "run")
    for record in train(again.model, corpus(), SETTINGS, again.state):
        again.log(record)
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_what_a_kill_left_half_written_is_ignored_and_removed(tmp_path: Path) -> None:
    started(tmp_path / "run")
    # Of a step that no later save has: the first kill came while Ctrl-C was saving.
    for name in (".step-000005.writing", "..step-000005.writing.writing"):
        (tmp_path / "run" / name).mkdir()
        (tmp_path / "run" / name / "model.safetensors").write_bytes(b"half")
    shutil.copytree(tmp_path / "run" / "step-000003", tmp_path / "run" / "step-000002")
    (tmp_path / "run" / "step-000002" / "train.json").unlink()  # killed while deleting it
    run = reopened(tmp_path / "run")
    assert run.state.step == 3
    next(train(run.model, corpus(), SETTINGS, run.state))
    run.save()
    names = sorted(p.name for p in (tmp_path / "run").iterdir())
    assert names == ["log.jsonl", "step-000004"]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("train.json", None),
        ("train.json", "{"),
        ("train.json", "[1]"),
        ("train.json", '{"train": {}}'),
        ("train.json", '{"train": 3, "data": "", "step": 3}'),
        ("config.json", "{}"),
        ("optimizer.safetensors", None),
        ("optimizer.safetensors", ""),
    ],
)
def test_a_damaged_save_is_named(tmp_path: Path, file: str, text: str | None) -> None:
    path = started(tmp_path / "run").latest / file
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(ResumeError, match=r"step-000003 is damaged .* delete it to start again"):
        reopened(tmp_path / "run")


@pytest.mark.parametrize("step", [None, "3", -1, 3.0])
def test_a_save_without_its_step_is_damaged(tmp_path: Path, step: object) -> None:
    path = started(tmp_path / "run").latest / "train.json"
    about = {**json.loads(path.read_text()), "step": step}
    if step is None:
        del about["step"]
    path.write_text(json.dumps(about))
    with pytest.raises(ResumeError, match=r"is damaged .*step"):
        reopened(tmp_path / "run")


def test_missing_or_misshapen_moments_are_named(tmp_path: Path) -> None:
    path = started(tmp_path / "run").latest / "optimizer.safetensors"
    tensors = load_file(path)
    wrong = {**tensors, "exp_avg.lm_head.weight": torch.zeros(2)}
    del tensors["exp_avg_sq.lm_head.weight"]
    for damaged, kind in ((tensors, "exp_avg_sq"), (wrong, "exp_avg")):
        save_file(damaged, path)
        with pytest.raises(ResumeError, match=rf"has no {kind} of shape .* for lm_head.weight"):
            reopened(tmp_path / "run")


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ResumeError, match=r"cannot make .*; choose another place"):
        reopened(tmp_path / "file" / "run")
