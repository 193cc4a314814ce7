"""parallel: jobs of 1, 2 and 4 processes, started by torchrun, against one process.

Each job runs in a folder of its own and is started once; the tests read what its ranks wrote.
"""

from __future__ import annotations

import math
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv3_mini import parallel
from dsv3_mini.course.spread import torchrun
from dsv3_mini.fp8 import convert_to_fp8
from dsv3_mini.train import new_state, train, train_step
from tests.environment import FIXED, ROOT
from tests.reference import parallel_worker as worker

RANKS = pytest.mark.parametrize("ranks", [1, 2, 4])
SEVERAL = pytest.mark.parametrize("ranks", [2, 4])
EXACT = {"rtol": 0.0, "atol": 1e-12}
CLOSE = {"rtol": 0.0, "atol": 1e-9}  # after 20 steps of Adam, in float64


def job(folder: Path, ranks: int, *tasks: str) -> subprocess.CompletedProcess[str]:
    """Run the tasks in a job of so many processes, on loopback and no longer than a minute."""
    command = torchrun(ranks, "-m", "tests.reference.parallel_worker", str(folder), *tasks)
    environment = {**os.environ, **FIXED, "GLOO_SOCKET_IFNAME": "lo"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=worker.LIMIT)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun passes it on; ranks end themselves at the same limit
        output, _ = process.communicate(timeout=30)
        pytest.fail(f"{ranks} ranks did not finish {tasks} within {worker.LIMIT} s:\n{output}")
    return subprocess.CompletedProcess(command, process.returncode, output)


TASKS = {
    "1": ("train", "dispatch"),
    "2": ("train", "dispatch", "groups", "errors", "fp8"),
    "2 again": ("resume",),
    "4": ("train", "dispatch", "groups", "resume"),
}


class Jobs:
    """What the ranks of each job wrote; a job starts when somebody first asks for it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, name: int | str, task: str) -> list[Any]:
        """The results of a task of the job called so, which begins with its number of ranks."""
        folder, ranks = self.folder / str(name), int(str(name)[0])
        if not folder.is_dir():
            if "resume" in TASKS[str(name)]:
                self(2, "train")  # which makes the save that is resumed
            folder.mkdir()
            result = job(folder, ranks, *TASKS[str(name)])
            (folder / "output").write_text(f"exit status {result.returncode}\n{result.stdout}")
        output = (folder / "output").read_text()
        assert output.startswith("exit status 0\n"), output
        return [torch.load(folder / f"{task}-{rank}.pt") for rank in range(ranks)]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return Jobs(tmp_path_factory.mktemp("jobs"))


def without_time(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def assert_same_records(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(without_time(ours), without_time(theirs), strict=True):
        assert one.pop("counts_LE") == other.pop("counts_LE")
        for name, value in other.items():
            assert one[name] == pytest.approx(value, abs=1e-9, rel=0), (other["step"], name)


# --------------------------------------------------------------------------------------- dispatch


def on_one_process(name: str, ranks: int) -> tuple[list[Tensor], dict[str, Any]]:
    """Output by rank, and gradients, of ``Experts.forward`` on the tokens of all ranks."""
    experts = worker.experts_of(worker.model())
    parts = list(zip(*(worker.CASES[name](rank) for rank in range(ranks)), strict=True))
    sizes = [len(x) for x in parts[0]]
    x, indices, weights = (torch.cat(part) for part in parts)
    x.requires_grad_(), weights.requires_grad_()
    if not len(x):
        zeros = {n: torch.zeros_like(p) for n, p in experts.named_parameters()}
        return [x.detach()] * ranks, {"x": [x.detach()] * ranks, "experts": zeros,
                                      "weights": [weights.detach()] * ranks}  # fmt: skip
    out = experts(x, indices, weights)
    (out * worker.direction(out)).sum().backward()
    by_rank = {"x": x.grad.split(sizes), "weights": weights.grad.split(sizes)}
    # A rank's loss is a share of the mean over ranks.
    mean = {n: p.grad / ranks for n, p in experts.named_parameters()}
    return list(out.detach().split(sizes)), {**by_rank, "experts": mean}


@RANKS
@pytest.mark.parametrize("name", worker.CASES)
def test_spread_experts_equal_experts_in_one_place(jobs: Jobs, ranks: int, name: str) -> None:
    """Output and gradients of tokens, gates and weights; also where somebody has nothing."""
    out, gradients = on_one_process(name, ranks)
    for rank, found in enumerate(jobs(ranks, "dispatch")):
        torch.testing.assert_close(found[name]["out"], out[rank], **EXACT)
        for what in ("x", "weights"):
            torch.testing.assert_close(found[name][what], gradients[what][rank], **EXACT)
        for parameter, gradient in gradients["experts"].items():
            torch.testing.assert_close(found[name]["experts"][parameter], gradient, **EXACT)


def rows_by_a_loop(chosen: list[Tensor], per_rank: int) -> list[list[int]]:
    """Rows from rank (outer) to rank: a token is sent once to each rank it has an expert on."""
    table = [[0] * len(chosen) for _ in chosen]
    for source, indices_NK in enumerate(chosen):
        for experts in indices_NK.tolist():
            for target in {expert // per_rank for expert in experts}:
                table[source][target] += 1
    return table


@RANKS
@pytest.mark.parametrize("name", worker.CASES)
def test_traffic_is_what_a_loop_over_the_routing_counts(jobs: Jobs, ranks: int, name: str) -> None:
    rows = torch.tensor(
        rows_by_a_loop([worker.CASES[name](rank)[1] for rank in range(ranks)], 8 // ranks)
    )
    row_bytes = (32 + 2 * 8 // ranks) * 8
    for rank, found in enumerate(jobs(ranks, "dispatch")):
        first_layer, other_layer = found[name]["traffic"]
        assert first_layer.tolist() == (rows * row_bytes).tolist()
        assert not other_layer.any()
        # And what went through the collectives: there and back, forward and backward.
        there, back = (rows[rank] * row_bytes).tolist(), (rows[:, rank] * 32 * 8).tolist()
        gradient_there, gradient_back = (
            (rows[rank] * 32 * 8).tolist(), (rows[:, rank] * row_bytes).tolist(),
        )  # fmt: skip
        assert found[name]["collectives"] == [there, back, gradient_there, gradient_back]


@SEVERAL
def test_a_token_reaches_no_more_ranks_than_groups_are_kept(jobs: Jobs, ranks: int) -> None:
    """With a group on each rank; without the limit some token does reach more."""
    most = {}
    for name in worker.LIMITS:
        found = [result[name] for result in jobs(ranks, "groups")]
        for layer, traffic in enumerate(found[0]["traffic"]):
            chosen = [result["chosen"][layer] for result in found]
            rows = torch.tensor(rows_by_a_loop(chosen, 8 // ranks))
            assert torch.equal(traffic, rows * (32 + 2 * 8 // ranks) * 8)
            reached = [
                len({e // (8 // ranks) for e in token}) for c in chosen for token in c.tolist()
            ]
            assert int(rows.sum()) == sum(reached)
            most[name] = max(most.get(name, 0), *reached)
    assert most["limited"] == ranks // 2
    assert most["free"] == min(ranks, 3)


# --------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """The same 20 steps by ``train.train``, on one process and without torch.distributed."""
    model = worker.model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    records = [r.scalars() for r in train(model, worker.corpus(), worker.SETTINGS)]
    return {"records": records, "weights": model.state_dict(), "before": before}


@RANKS
def test_ranks_train_as_one_process_does(jobs: Jobs, alone: dict[str, Any], ranks: int) -> None:
    for found in jobs(ranks, "train"):
        assert_same_records(found["records"], alone["records"])
        assert found["weights"].keys() == alone["weights"].keys()
        for name, weight in alone["weights"].items():
            torch.testing.assert_close(found["weights"][name], weight, **CLOSE)


def test_the_comparison_could_fail(alone: dict[str, Any]) -> None:
    """All weights and biases moved, clipping was at work, and the load was uneven."""
    for name, weight in alone["weights"].items():
        assert not torch.equal(weight, alone["before"][name]), name
    assert all(record["grad_norm"] > worker.SETTINGS.clip for record in alone["records"])
    assert min(max(record["max_violation"]) for record in alone["records"]) > 0.1


@SEVERAL
def test_what_mtp_shares_stays_shared(jobs: Jobs, ranks: int) -> None:
    weights = jobs(ranks, "train")[0]["weights"]
    for name, twin in (
        ("model.embed_tokens.weight", "model.layers.2.embed_tokens.weight"),
        ("lm_head.weight", "model.layers.2.shared_head.head.weight"),
    ):
        assert torch.equal(weights[name], weights[twin])


def test_a_resumed_job_is_the_uninterrupted_one(jobs: Jobs) -> None:
    """Bit for bit, in new processes whose model began elsewhere."""
    for whole, again in zip(jobs(2, "train"), jobs("2 again", "resume"), strict=True):
        assert without_time(again["records"]) == without_time(whole["records"][10:])
        for name, weight in whole["weights"].items():
            assert torch.equal(again["weights"][name], weight), name


def test_a_save_of_two_ranks_goes_on_with_four(jobs: Jobs, alone: dict[str, Any]) -> None:
    for found in jobs(4, "resume"):
        assert_same_records(found["records"], alone["records"][10:])


def test_fp8_layers_can_be_spread(jobs: Jobs) -> None:
    """Rank 1 receives nothing; the loss before the step is that of one process."""
    model = worker.model().float()
    with torch.no_grad():
        for gate in model.gates:
            gate.e_score_correction_bias[4:] -= 10
    convert_to_fp8(model)
    batch, _ = worker.corpus().batch(0, 4, 16)
    record = train_step(model, new_state(model, worker.SETTINGS), worker.SETTINGS, [batch])
    for found in jobs(2, "fp8"):
        assert found["loss"] == pytest.approx(record.loss, abs=1e-5)
        assert found["counts_LE"] == record.counts_LE.tolist()
        assert math.isclose(found["grad_norm"], record.grad_norm, rel_tol=0.02)


# ------------------------------------------------------------------------------- when it goes wrong


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_killed_rank_ends_the_job(tmp_path: Path) -> None:
    began = time.monotonic()
    result = job(tmp_path, 2, "die")
    assert time.monotonic() - began < 30
    assert result.returncode != 0
    assert "Signal 9 (SIGKILL)" in result.stdout
    pids = [int((tmp_path / f"pid-{rank}").read_text()) for rank in range(2)]
    assert not any(alive(pid) for pid in pids)


@pytest.mark.parametrize(
    ("attempt", "parts"),
    [
        ("experts", ["n_routed_experts 9", "2 ranks", "--nproc-per-node 1"]),
        ("twice", ["parallel already"]),
        ("batch-wise loss", ["alpha_batch is 0.1", "expected 0"]),
        ("batch", ["3 rows", "2 ranks", "batch_size 4"]),
        ("traffic", ["parallelize first"]),
        ("save", ["step-10 exists", "new folder"]),
        ("load nothing", ["step-11 holds no complete save"]),
        ("load another", ["step-10 does not fit this model", "Size mismatch"]),
        ("join one", ["one was started by one process", "without torchrun", "another --out"]),
        ("join another", ["run was started differently: seed was 0 and is now 5"]),
        ("join damaged", ["run.json is damaged"]),
        ("join without a part", ["step-000000 does not fit this model", "No such file"]),
    ],
)
def test_what_is_refused_says_why(jobs: Jobs, attempt: str, parts: list[str]) -> None:
    for messages in jobs(2, "errors"):
        for part in parts:
            assert part in messages[attempt]


def test_start_outside_a_job_says_how_to_start_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match=r"RANK.*not set.*torchrun --standalone --nproc-per-node"):
        parallel.start("cpu")
