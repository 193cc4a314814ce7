"""A training run on disk that can be killed at any moment and goes on with the same weights.

Why a folder a save: model and optimizer must be from the same step. Each save is written beside
its target (``.step-000100.writing``) and renamed once complete; only then is the older one
deleted. Whatever instant a run dies at, one complete save exists. The model part of it is an
ordinary checkpoint, which ``load_pretrained`` and transformers read; optimizer moments are
safetensors too, so nothing is ever unpickled.

Two processes in one folder would delete each other's saves, so the command holds its folder with
a lock of the operating system, which goes when the process goes, even by kill -9.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsv3_mini.checkpoint import load_pretrained, save_pretrained
from dsv3_mini.config import ModelConfig
from dsv3_mini.data import Corpus
from dsv3_mini.model import Transformer
from dsv3_mini.shards import CheckpointError, new_folders, replacing
from dsv3_mini.train import Record, TrainConfig, TrainState, new_state

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
PARALLEL = "run.json"
"""The file of settings in the folder of a run of several processes."""
LOCK = ".lock"
"""The file in a run's folder that says which process holds it, while one does."""


class ResumeError(ValueError):
    """A run folder that does not belong to this command, or that is damaged."""


class Run:
    """A model, its training state, and the folder that they are saved in.

    ``Run.open`` starts or resumes; ``save`` writes the current step; ``log`` appends to log.jsonl.
    """

    def __init__(
        self, folder: Path, model: Transformer, state: TrainState, config: TrainConfig, data: str
    ) -> None:
        self.folder, self.model, self.state, self.config = folder, model, state, config
        self.data = data

    @classmethod
    def open(
        cls, folder: str | os.PathLike[str], model_config: ModelConfig, config: TrainConfig,
        corpus: Corpus, device: str = "cpu",
    ) -> Run:  # fmt: skip
        """Resume the run in ``folder``, or start one there. Raises ResumeError.

        A run is resumed only with the very configs and text that it was started with.
        """
        folder, data = Path(folder), fingerprint(corpus)
        saves = find_saves(folder)
        if (folder / PARALLEL).exists():
            raise ResumeError(
                f"{folder} was started by several processes; start them by torchrun again, or "
                "choose another --out"
            )
        if saves:
            run = cls._load(saves[-1], model_config, config, data, device)
        else:
            torch.manual_seed(config.seed)
            model = Transformer(model_config).to(device)
            run = cls(folder, model, new_state(model, config), config, data)
        run._prepare()
        return run

    def _prepare(self) -> None:
        """Make the folder, and remove what a kill left in it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = f"cannot make {self.folder} ({error}); choose another place"
            raise ResumeError(problem) from None
        for half in self.folder.glob(".*step-*"):  # of a save that was not finished
            shutil.rmtree(half, ignore_errors=True)
        self._trim_log()

    @classmethod
    def _load(
        cls, save: Path, model_config: ModelConfig, config: TrainConfig, data: str, device: str
    ) -> Run:
        try:
            saved = json.loads((save / "train.json").read_text(encoding="utf-8"))
            tensors = load_file(save / "optimizer.safetensors", device=device)
            found = {**saved["train"], **ModelConfig.from_hf(save).to_hf(), "data": saved["data"]}
            if type(saved["step"]) is not int or saved["step"] < 0:
                raise ValueError(f"its step is {saved['step']!r}")
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
            raise ResumeError(f"{save} is damaged ({error}); delete it to start again") from None
        wanted = settings(model_config, config, data)
        refuse_changes(found, wanted, save.parent)
        model = load_pretrained(save, device=device)
        state = new_state(model, config)
        state.step = saved["step"]
        _restore(model, state, tensors, save)
        return cls(save.parent, model, state, config, data)

    @property
    def latest(self) -> Path:
        """The folder of the current step's save."""
        return self.folder / f"step-{self.state.step:06d}"

    def save(self) -> None:
        """Write model, optimizer and step, then drop older saves. Raises ResumeError; they stay."""
        about = {"step": self.state.step, "train": dataclasses.asdict(self.config),
                 "data": self.data}  # fmt: skip
        text = json.dumps(about, indent=2) + "\n"
        try:
            with replacing(self.latest) as beside:
                save_pretrained(self.model, beside)
                save_file(_moments(self.model, self.state), beside / "optimizer.safetensors")
                (beside / "train.json").write_text(text, encoding="utf-8")
        except (OSError, SafetensorError, CheckpointError) as error:
            raise ResumeError(
                f"cannot save into {self.folder} ({error.__cause__ or error}); the save before is "
                "as it was: make room, then start again with the same words"
            ) from error
        self._drop_older()

    def _drop_older(self) -> None:
        for older in self.folder.glob("step-*"):
            if older != self.latest:
                shutil.rmtree(older, ignore_errors=True)

    def log(self, record: Record) -> None:
        """Append one record to ``log.jsonl``. Raises ResumeError."""
        path = self.folder / "log.jsonl"
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record.scalars()) + "\n")
        except OSError as error:
            raise ResumeError(f"cannot write {path} ({error}); is the disk full?") from error

    def anyone(self, stop: bool) -> bool:
        """Whether to ``stop``; in a job of several processes, whether any of them wants to."""
        return stop

    def _trim_log(self) -> None:
        # Steps after the last save are done again, so their lines would stand twice.
        path = self.folder / "log.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= self.state.step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue
        write_whole(path, "".join(kept))


def write_whole(path: Path, text: str) -> None:
    """Write beside ``path``, then rename: there is never half a file. Raises ResumeError."""
    beside = path.with_name(f".{path.name}.writing")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise ResumeError(f"cannot write {path} ({error}); is the disk full?") from error


@contextmanager
def hold(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Keep other processes out of the run in ``folder``, new or not, while the block runs.

    Only among callers of ``hold``: ``Run`` does not look. Raises ResumeError naming the process
    that has it, or as ``find_saves`` does. On Windows, where it has not yet run, the file stays.
    """
    folder = Path(folder)
    find_saves(folder)
    path = folder / LOCK
    with ExitStack() as stack:
        try:
            stack.enter_context(new_folders(path))
            file = stack.enter_context(_locked(path))
            if sys.platform != "win32":  # which deletes no open file
                stack.callback(path.unlink, missing_ok=True)
            now = datetime.now().astimezone().isoformat(" ", "seconds")
            who = f"process {os.getpid()} on {platform.node()} since {now}"
            file.truncate(0)
            # At once: what a full disk refuses, closing the file would try to write once more.
            os.write(file.fileno(), who.encode())
        except OSError as error:
            raise ResumeError(f"cannot write {path} ({error}); choose another place") from None
        yield


def _locked(path: Path) -> IO[str]:
    while True:
        file = path.open("a+", encoding="utf-8", errors="replace")
        try:
            if sys.platform == "win32":
                import msvcrt

                file.seek(2**30)  # nobody can read a locked byte: not one of the text
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                    return file
            file.close()  # its holder has deleted it since we opened it
        except (BlockingIOError, PermissionError):
            file.seek(0)
            with file:
                who = file.read() or "another process"
            raise ResumeError(
                f"{path.parent} is in use by {who}; wait for it, stop it, or choose another --out"
            ) from None
        except OSError:
            file.close()
            raise


def find_saves(folder: Path) -> list[Path]:
    """The complete saves in ``folder``, oldest first. Raises ResumeError if it is no run's."""
    if folder.exists() and not folder.is_dir():
        raise ResumeError(f"{folder} is a file; expected the name of a folder for this run")
    saves = sorted(folder.glob("step-*"))
    if folder.is_dir() and not saves:
        known = ("log.jsonl", PARALLEL, LOCK)
        strange = [p.name for p in folder.iterdir() if p.name not in known]
        strange = [name for name in strange if not name.endswith((".writing", ".old"))]
        if strange:
            raise ResumeError(f"{folder} holds {strange[:3]} and no run; choose a new folder")
    return saves


def settings(model_config: ModelConfig, config: TrainConfig, data: str) -> dict[str, Any]:
    """All that must be the same when a run is resumed, by name."""
    return {**dataclasses.asdict(config), **model_config.to_hf(), "data": data}


def refuse_changes(found: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    """Raises ResumeError where the run in ``folder`` was started with other settings or text."""
    changed = [
        f"{name} was {found.get(name)!r} and is now {value!r}"
        for name, value in wanted.items()
        if found.get(name) != value
    ]
    if changed:
        raise ResumeError(
            f"{folder} was started differently: {'; '.join(changed[:4])}. Use the same options "
            "(and the same Python for the same text), or another --out"
        )


def fingerprint(corpus: Corpus) -> str:
    """A digest of every training token, so that a run is not resumed on other text."""
    digest = hashlib.sha256()
    for domain in corpus.domains:
        digest.update(domain.encode() + corpus.train[domain].numpy().tobytes())
    return digest.hexdigest()[:16]


def _moments(model: Transformer, state: TrainState) -> dict[str, Tensor]:
    named = {}
    for name, parameter in model.named_parameters():
        for kind in MOMENTS:
            named[f"{kind}.{name}"] = state.optimizer.state[parameter][kind].cpu().contiguous()
    return named


def _restore(model: Transformer, state: TrainState, tensors: dict[str, Tensor], save: Path) -> None:
    for name, parameter in model.named_parameters():
        for kind in MOMENTS:
            tensor = tensors.pop(f"{kind}.{name}", None)
            shape = () if kind == "step" else tuple(parameter.shape)
            if tensor is None or tuple(tensor.shape) != shape:
                raise ResumeError(
                    f"{save / 'optimizer.safetensors'} has no {kind} of shape {shape} for {name}; "
                    "delete this save to start again"
                )
            state.optimizer.state[parameter][kind] = tensor
