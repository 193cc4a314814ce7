"""A run of several processes on disk: ``resume.Run`` for all ranks of a job together.

Why apart from ``resume``: no rank has all weights and moments, so each writes its own part of a
save (torch.distributed.checkpoint), and only rank 0 writes what there is one of: the log, and
``run.json`` with the settings. Another number of ranks may go on with a run.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from dsv3_mini import parallel
from dsv3_mini.config import ModelConfig
from dsv3_mini.data import Corpus
from dsv3_mini.model import Transformer
from dsv3_mini.resume import (
    PARALLEL,
    ResumeError,
    Run,
    find_saves,
    fingerprint,
    refuse_changes,
    settings,
    write_whole,
)
from dsv3_mini.train import Record, TrainConfig, new_state


class ParallelRun(Run):
    """``Run`` by all ranks: each calls every method, on a file system that they share."""

    @classmethod
    def join(
        cls, folder: str | os.PathLike[str], model_config: ModelConfig, config: TrainConfig,
        corpus: Corpus, mesh: DeviceMesh,
    ) -> ParallelRun:  # fmt: skip
        """Resume the run in ``folder``, or start one there, on ``parallel.start``'s mesh.

        Raises ResumeError as ``Run.open`` does, and for a run that one process started.
        """
        folder, data = Path(folder), fingerprint(corpus)
        saves, about = find_saves(folder), folder / PARALLEL
        wanted = settings(model_config, config, data)
        if saves and not about.is_file():
            raise ResumeError(
                f"{folder} was started by one process; go on without torchrun, or use another --out"
            )
        if saves:  # of a job that was refused before its first save, nothing is kept
            refuse_changes(_read(about), wanted, folder)
        dist.barrier()  # everyone has looked before rank 0 writes
        torch.manual_seed(config.seed)
        model = Transformer(model_config)
        parallel.parallelize(model, mesh)
        run = cls(folder, model, new_state(model, config), config, data)
        if saves:
            parallel.load(saves[-1], model, run.state)
        if dist.get_rank() == 0:
            run._prepare()
            write_whole(about, json.dumps(wanted, indent=2) + "\n")
        dist.barrier()
        return run

    def save(self) -> None:
        """Write model, optimizer and step; drop older saves once this one is complete."""
        try:
            parallel.save(self.latest, self.model, self.state)
        finally:  # of a save that failed, on a full disk, nothing stays
            if dist.get_rank() == 0:
                shutil.rmtree(self.folder / f".{self.latest.name}.writing", ignore_errors=True)
        if dist.get_rank() == 0:
            self._drop_older()

    def log(self, record: Record) -> None:
        """Append one record to ``log.jsonl``, once for all ranks."""
        if dist.get_rank() == 0:
            super().log(record)

    def anyone(self, stop: bool) -> bool:
        """Whether any rank wants to stop: a signal reaches them at different steps."""
        wish = torch.tensor(int(stop), device=self.model.lm_head.weight.device)
        dist.all_reduce(wish)
        return bool(wish)


def _read(about: Path) -> dict[str, Any]:
    try:
        found = json.loads(about.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}")
    except (OSError, ValueError) as error:
        raise ResumeError(f"{about} is damaged ({error}); choose another --out") from None
    return found
