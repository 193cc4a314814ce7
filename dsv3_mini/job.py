"""What the commands share: each runs as one process or, begun by torchrun, as a rank of a job."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from dsv3_mini import parallel
from dsv3_mini.environment import device


def run(work: Callable[[DeviceMesh | None], int]) -> int:
    """The exit status of ``work(mesh)``; the mesh is None where torchrun did not begin the process.

    A ValueError is said on stderr, by each rank that has it, and gives 2.
    """
    mesh = None
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may lack a letter that is written
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if dist.is_torchelastic_launched():
            mesh = parallel.start(device().split(":")[0])
        status = work(mesh)
    except ValueError as error:
        rank = 0 if mesh is None else mesh.get_rank()
        print(f"rank {rank}: " * bool(rank) + f"error: {error}", file=sys.stderr)
        return 2
    if mesh is not None:
        parallel.stop()
    return status


def speaks(mesh: DeviceMesh | None) -> bool:
    """Whether this process is the one that prints."""
    return mesh is None or mesh.get_rank() == 0
