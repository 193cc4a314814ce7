"""A run that is killed at any moment and started again ends as if nothing had happened."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dsv3_mini.balance import update_bias
from dsv3_mini.checkpoint import load_pretrained
from dsv3_mini.config import ConfigError, ModelConfig
from dsv3_mini.data import Corpus
from dsv3_mini.model import Transformer
from dsv3_mini.resume import ResumeError, Run
from dsv3_mini.train import TrainConfig, evaluate, new_state, train, train_step

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


def test_saved_and_resumed_is_bit_identical_to_uninterrupted(tmp_path: Path) -> None:
    whole = Run.open(tmp_path / "whole", ModelConfig.tiny(), SETTINGS, corpus())
    for record in train(whole.model, corpus(), SETTINGS, whole.state):
        whole.log(record)
    first = Run.open(tmp_path / "parts", ModelConfig.tiny(), SETTINGS, corpus())
    for record in train(first.model, corpus(), SETTINGS, first.state):
        first.log(record)
        if record.step == 3:
            first.save()
        if record.step == 4:
            break  # step 4 was never saved and is done again
    second = Run.open(tmp_path / "parts", ModelConfig.tiny(), SETTINGS, corpus())
    assert second.state.step == 3
    for record in train(second.model, corpus(), SETTINGS, second.state):
        second.log(record)
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(second)[name]), name
    second.save()
    lines = (tmp_path / "parts" / "log.jsonl").read_text().splitlines()
    assert len(lines) == 6
    loaded = load_pretrained(second.latest)
    assert torch.equal(loaded.lm_head.weight, second.model.lm_head.weight)


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


def test_accumulation_is_one_larger_batch_and_one_bias_step() -> None:
    torch.manual_seed(0)
    one, two = (Transformer(ModelConfig.tiny()) for _ in range(2))
    two.load_state_dict(one.state_dict())
    tokens, _ = corpus().batch(0, 8, 16)
    whole = train_step(one, new_state(one, SETTINGS), SETTINGS, [tokens])
    parts = train_step(two, new_state(two, SETTINGS), SETTINGS, [tokens[:4], tokens[4:]])
    assert torch.equal(whole.counts_LE, parts.counts_LE)
    assert abs(whole.loss - parts.loss) < 1e-5
    assert abs(whole.grad_norm - parts.grad_norm) < 1e-4
    for gate, load in zip(two.gates, parts.counts_LE, strict=True):
        once = update_bias(torch.zeros(8), load, SETTINGS.gamma)
        assert torch.equal(gate.e_score_correction_bias, once)


def test_evaluation_moves_no_bias_and_equals_a_loop() -> None:
    model = Transformer(ModelConfig.tiny())
    windows = corpus().windows("prose", 16, 5)
    loss = evaluate(model, windows, batch_size=2)
    by_hand = 0.0
    with torch.no_grad():
        for row in windows:
            log_p = model(row[None, :-1]).logits[0].log_softmax(-1)
            by_hand -= sum(float(log_p[i, row[i + 1]]) for i in range(16))
    assert abs(loss - by_hand / (5 * 16)) < 1e-5
    assert all(not gate.e_score_correction_bias.any() for gate in model.gates)


@pytest.mark.parametrize(
    ("field", "value"), [("steps", 0), ("gamma", -1), ("learning_rate", 0), ("beta1", 2)]
)
def test_impossible_settings_are_refused(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{field} is {value}; expected"):
        TrainConfig(**{field: value})
