"""What one rank does in the tests of ``parallel``: run tasks, write what came out, judge nothing.

``torchrun ... -m tests.reference.parallel_worker FOLDER TASK ...``; each rank writes
FOLDER/TASK-RANK.pt. The tests build the same inputs from the functions here, and the same answers
on one process.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import TorchDispatchMode

from dsv3_mini import parallel
from dsv3_mini.config import ModelConfig
from dsv3_mini.data import Corpus
from dsv3_mini.fp8 import convert_to_fp8
from dsv3_mini.model import Transformer
from dsv3_mini.moe import Experts
from dsv3_mini.parallel_run import ParallelRun
from dsv3_mini.train import TrainConfig, TrainState, new_state

TINY = ModelConfig.tiny()
SETTINGS = TrainConfig(
    steps=20, batch_size=4, seq_len=16, accumulate=2, warmup=2, clip=0.5, gamma=0.01, alpha=0.02
)
LIMIT = 60  # seconds after which a rank that hangs ends itself


def corpus() -> Corpus:
    """Random tokens in two domains."""
    generator = torch.Generator().manual_seed(1)
    train, held_out = torch.randint(128, (2, 2, 300), generator=generator)
    names = ("python", "prose")
    streams = [dict(zip(names, part, strict=True)) for part in (train, held_out)]
    return Corpus(*streams, 128)


def model(config: ModelConfig = TINY, seed: int = 0) -> Transformer:
    """In float64, since Adam's first step turns a gradient's rounding into a whole step."""
    torch.manual_seed(seed)
    return Transformer(config).double()


def experts_of(whole: Transformer) -> Experts:
    """The experts of the first MoE layer, with weights large enough to see."""
    (experts, *_) = (module for module in whole.modules() if isinstance(module, Experts))
    return experts


# --------------------------------------------------------------------------------------- dispatch

Tokens = tuple[Tensor, Tensor, Tensor]


def _tokens(count: int, rank: int, experts: list[int]) -> Tokens:
    generator = torch.Generator().manual_seed(100 + rank)
    x = torch.randn(count, 32, generator=generator, dtype=torch.float64)
    order = torch.rand(count, len(experts), generator=generator).argsort(-1)[:, :3]
    weights = torch.rand(count, 3, generator=generator, dtype=torch.float64)
    weights[::4, 1] = 0  # a gate of 0 still has a gradient
    return x, torch.tensor(experts)[order], weights


CASES: dict[str, Callable[[int], Tokens]] = {
    "anywhere": lambda rank: _tokens(6 + 5 * rank, rank, list(range(8))),
    "half of the ranks receive nothing": lambda rank: _tokens(9, rank, [0, 1, 2, 3]),
    "the last rank answers for all": lambda rank: _tokens(9, rank, [5, 6, 7]),
    "rank 0 has no tokens": lambda rank: _tokens(7 * rank, rank, list(range(8))),
    "nobody has tokens": lambda rank: _tokens(0, rank, list(range(8))),
}
"""Tokens (N, D), experts (N, K) and gates (N, K) of a rank."""


def direction(out_ND: Tensor) -> Tensor:
    """What the output is multiplied by to make a loss: something different for every number."""
    return torch.linspace(-1, 2, out_ND.shape[1], dtype=out_ND.dtype).expand_as(out_ND)


class Collectives(TorchDispatchMode):
    """Notes the bytes to each rank of every all-to-all with autograd, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if "all_to_all_single" in str(func) and "c10d_functional" in str(func):
            rows, _, splits, *_ = args
            self.seen.append([n * rows.shape[1] * rows.element_size() for n in splits])
        return func(*args, **(kwargs or {}))


def dispatch(mesh: DeviceMesh, folder: Path) -> object:
    """Every case through spread experts: output, gradients, bytes."""
    whole = model()
    parallel.parallelize(whole, mesh)
    experts, found = experts_of(whole), {}
    for name, make in CASES.items():
        x, indices, weights = make(dist.get_rank())
        x.requires_grad_(), weights.requires_grad_(), experts.zero_grad()
        before = parallel.traffic(whole)
        with Collectives() as collectives:
            out = experts(x, indices, weights)
            (out * direction(out)).sum().backward()
        gradients = {n: p.grad.full_tensor() for n, p in experts.named_parameters()}
        found[name] = {
            "out": out.detach(), "x": x.grad, "weights": weights.grad, "experts": gradients,
            "traffic": parallel.traffic(whole) - before, "collectives": collectives.seen,
        }  # fmt: skip
    return found


LIMITS = {"limited": 1, "free": 0}


def limited(ranks: int, kept: int) -> ModelConfig:
    """As many groups as ranks, of which a token may use half, or all."""
    return TINY.replace(n_group=ranks, topk_group=ranks // 2 if kept else ranks)


def groups(mesh: DeviceMesh, folder: Path) -> object:
    """A whole model's routing, with and without the limit of groups, and its traffic."""
    found = {}
    for name, kept in LIMITS.items():
        whole = model(limited(mesh.size(), kept))
        parallel.parallelize(whole, mesh)
        tokens, _ = corpus().batch(dist.get_rank(), 3, 16)
        with torch.no_grad():
            routing = whole(tokens, mtp=True).routing
        chosen = [layer.indices_BTK.flatten(0, 1) for layer in routing]
        found[name] = {"chosen": chosen, "traffic": parallel.traffic(whole)}
    return found


# --------------------------------------------------------------------------------------- training


def _train(whole: Transformer, state: TrainState, folder: Path | None = None) -> object:
    records, text = [], corpus()
    while state.step < SETTINGS.steps:
        first = state.step * SETTINGS.accumulate
        sizes = (SETTINGS.batch_size, SETTINGS.seq_len)
        batches = [text.batch(first + i, *sizes)[0] for i in range(SETTINGS.accumulate)]
        records.append(parallel.train_step(whole, state, SETTINGS, batches).scalars())
        if folder is not None and state.step == 10:
            parallel.save(folder / "step-10", whole, state)
    return {"records": records, "weights": parallel.gather(whole)}


def train(mesh: DeviceMesh, folder: Path) -> object:
    """20 steps, saved after 10. Other ranks start from other weights, which may not matter."""
    whole = model(seed=dist.get_rank())
    parallel.parallelize(whole, mesh)
    return _train(whole, new_state(whole, SETTINGS), folder)


def resume(mesh: DeviceMesh, folder: Path) -> object:
    """The last 10 of them, from the save of job 2, in a model that starts from other weights."""
    whole = model(seed=9)
    parallel.parallelize(whole, mesh)
    state = new_state(whole, SETTINGS)
    parallel.load(folder.parent / "2" / "step-10", whole, state)
    return _train(whole, state)


def die(mesh: DeviceMesh, folder: Path) -> object:
    """Rank 1 is killed between two steps, while the others wait for its tokens."""
    (folder / f"pid-{dist.get_rank()}").write_text(str(os.getpid()))
    whole = model()
    parallel.parallelize(whole, mesh)
    state, text = new_state(whole, SETTINGS), corpus()
    for step in range(1000):
        parallel.train_step(whole, state, SETTINGS, [text.batch(step, 4, 16)[0]])
        if step == 2 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    return None


def fp8(mesh: DeviceMesh, folder: Path) -> object:
    """A step of a model whose linear layers are FP8, with an expert that gets nothing."""
    whole = model().float()
    with torch.no_grad():
        for gate in whole.gates:
            gate.e_score_correction_bias[4:] -= 10
    convert_to_fp8(whole)
    parallel.parallelize(whole, mesh)
    batch, _ = corpus().batch(0, 4, 16)
    record = parallel.train_step(whole, new_state(whole, SETTINGS), SETTINGS, [batch])
    return record.scalars()


def errors(mesh: DeviceMesh, folder: Path) -> object:
    """The message of everything that is refused; step-10 is there from ``train``."""
    whole = model()
    parallel.parallelize(whole, mesh)
    state = new_state(whole, SETTINGS)
    odd = TINY.replace(n_routed_experts=9, n_group=1, topk_group=1)
    other = model(TINY.replace(hidden_size=64))
    parallel.parallelize(other, mesh)
    other_state = new_state(other, replace(SETTINGS, steps=1))
    attempts: dict[str, Callable[[], object]] = {
        "experts": lambda: parallel.parallelize(model(odd), mesh),
        "twice": lambda: parallel.parallelize(whole, mesh),
        "batch-wise loss": lambda: parallel.train_step(
            whole, state, replace(SETTINGS, alpha_batch=0.1), [torch.zeros(4, 17).long()]
        ),
        "batch": lambda: parallel.train_step(
            whole, state, SETTINGS, [torch.zeros(3, 17, dtype=torch.int64)]
        ),
        "traffic": lambda: parallel.traffic(model()),
        "save": lambda: parallel.save(folder / "step-10", whole, state),
        "load nothing": lambda: parallel.load(folder / "step-11", whole, state),
        "load another": lambda: parallel.load(folder / "step-10", other, other_state),
    }
    attempts |= _joins(folder, mesh)
    messages = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except ValueError as error:
            messages[name] = str(error)
    return messages


def _joins(folder: Path, mesh: DeviceMesh) -> dict[str, Callable[[], object]]:
    """A run of one process, one of these, one whose settings are damaged, one saved in parts."""

    def join(name: str, settings: TrainConfig = SETTINGS) -> ParallelRun:
        return ParallelRun.join(folder / name, TINY, settings, corpus(), mesh)

    join("run", replace(SETTINGS, seed=7))  # never saved, so other settings may follow
    join("run").save()
    join("damaged").save()
    if dist.get_rank() == 0:
        (folder / "damaged" / "run.json").write_text("[")
        (folder / "one" / "step-000003").mkdir(parents=True)
        (folder / "run" / "step-000000" / "__1_0.distcp").unlink()
    dist.barrier()
    return {
        "join one": lambda: join("one"),
        "join another": lambda: join("run", replace(SETTINGS, seed=5)),
        "join damaged": lambda: join("damaged"),
        "join without a part": lambda: join("run"),
    }


TASKS = (dispatch, groups, train, resume, die, fp8, errors)


def main() -> None:
    """Run the tasks named on the command line."""
    signal.alarm(LIMIT)
    torch.set_num_threads(1)
    mesh = parallel.start("cpu")
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    for name in names:
        (task,) = (task for task in TASKS if task.__name__ == name)
        torch.save(task(mesh, folder), folder / f"{name}-{dist.get_rank()}.pt")
    parallel.stop()


if __name__ == "__main__":
    main()
