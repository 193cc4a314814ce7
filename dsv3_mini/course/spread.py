"""One small model on four processes, begun from a notebook: what travels, what each one holds.

Why processes: counting on indices says what *should* travel. Here torch's own all-to-all carries
the tokens between processes, and ``parallel.traffic`` counts what it was given. A process stands
for a node. With four of them, the eight groups of experts are spread two to a node; the limit on
groups is 1, 2, 4 or 8.

``spread()`` starts the job by torchrun and waits; ``python -m dsv3_mini.course.spread`` is what
each of its processes runs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from dsv3_mini import parallel
from dsv3_mini.config import ModelConfig
from dsv3_mini.model import Transformer
from dsv3_mini.train import TrainConfig, new_state

LIMITS = (1, 2, 4, 8)
SETTINGS = TrainConfig(steps=3, batch_size=8, seq_len=64, warmup=1, gamma=0.01)


@dataclass(frozen=True)
class Spread:
    """What came out; numbers are fp64, 8 bytes, so that no near tie is routed two ways."""

    sent: dict[int, Tensor]
    """By limit: bytes dispatched from node (row) to node (column), by MoE layer: (layers, R, R)."""
    experts: list[int]
    """Bytes of routed experts that each process holds."""
    rest: list[int]
    """Bytes of all other weights that each process holds."""
    losses: list[float]
    """Of three training steps by all processes together."""


def config(limit: int) -> ModelConfig:
    """``mini`` with 64 experts in 8 groups, 8 chosen from at most ``limit`` groups."""
    return ModelConfig.mini().replace(
        n_routed_experts=64, num_experts_per_tok=8, n_group=8, topk_group=limit,
        moe_intermediate_size=32,
    )  # fmt: skip


def model(limit: int) -> Transformer:
    """The same weights in every process and in the notebook."""
    torch.manual_seed(0)
    return Transformer(config(limit)).double()


def tokens(rank: int) -> Tensor:
    """The tokens that begin on process ``rank``: (8, 64) int64."""
    return torch.randint(2048, (8, 64), generator=torch.Generator().manual_seed(rank))


def batch(step: int) -> Tensor:
    """The whole batch of a training step: (8, 65) int64."""
    return torch.randint(2048, (8, 65), generator=torch.Generator().manual_seed(1000 + step))


def torchrun(ranks: int, *words: str) -> list[str]:
    """The command for a job of so many processes of this machine, on loopback, that run ``words``.

    ``words`` are what would follow python: '-m', a module, its arguments.
    """
    begin = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*begin, "--local-addr", "127.0.0.1", "--nproc-per-node", str(ranks), *words]


def spread(ranks: int = 4, timeout: float = 120) -> Spread:
    """Run it on so many processes of this machine, for ``timeout`` seconds at most.

    Raises RuntimeError with what they printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spread.pt"
        job = subprocess.Popen(
            torchrun(ranks, "-m", "dsv3_mini.course.spread", str(path)),
            env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            said, _ = job.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            job.terminate()  # torchrun passes it on to its processes
            said, _ = job.communicate()
        if job.returncode:
            raise RuntimeError(f"{ranks} processes did not finish:\n{said[-3000:]}")
        return Spread(**torch.load(path, weights_only=True))


def main(path: str) -> None:
    """What one process does; process 0 writes the results to ``path``."""
    mesh = parallel.start("cpu")
    sent = {limit: _dispatch(limit, mesh) for limit in LIMITS}
    whole = model(LIMITS[-1])
    parallel.parallelize(whole, mesh)
    experts_R, rest_R = torch.zeros(2, mesh.size(), dtype=torch.int64)
    for name, parameter in whole.named_parameters():
        assert isinstance(parameter, DTensor)
        held_R = experts_R if ".experts." in name else rest_R
        held_R[mesh.get_rank()] += parameter.to_local().nbytes
    dist.all_reduce(experts_R)
    dist.all_reduce(rest_R)
    state = new_state(whole, SETTINGS)
    steps = [parallel.train_step(whole, state, SETTINGS, [batch(n)]) for n in range(SETTINGS.steps)]
    if mesh.get_rank() == 0:
        found = {"sent": sent, "losses": [step.loss for step in steps]}
        torch.save({**found, "experts": experts_R.tolist(), "rest": rest_R.tolist()}, path)
    parallel.stop()


@torch.no_grad()
def _dispatch(limit: int, mesh: DeviceMesh) -> Tensor:
    whole = model(limit)
    parallel.parallelize(whole, mesh)
    whole(tokens(mesh.get_rank()))
    return parallel.traffic(whole)


if __name__ == "__main__":
    main(sys.argv[1])
