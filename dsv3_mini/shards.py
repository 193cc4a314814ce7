"""Folders of safetensors shards: their index, their headers, and writing one without a half state.

Why apart from ``checkpoint``: nothing here knows a model. A folder is a list of tensors with a
file, a shape and a dtype each, all known before a single weight is read; and a new folder is made
beside its target and then renamed. No pickle. An index can name files of its folder only; what is a
symbolic link there is followed, since the hub's cache is made of links.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class CheckpointError(ValueError):
    """A folder that cannot be read or written as a checkpoint; the message says what to do."""


@dataclass(frozen=True)
class Stored:
    """A tensor to be written: its size is known before it is made."""

    name: str
    nbytes: int
    make: Callable[[], Tensor]


@dataclass(frozen=True)
class Header:
    """What a shard says of a tensor; ``dtype`` as safetensors spells it, F8_E4M3 for example."""

    file: str
    shape: tuple[int, ...]
    dtype: str


def write_shards(tensors: Iterable[Stored], folder: Path, max_shard_bytes: int) -> None:
    """One file, or as many as needed and an index; one shard's tensors exist at a time."""
    shards: list[list[Stored]] = [[]]
    size = total = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
        total += tensor.nbytes
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        single = len(shards) == 1
        file = SINGLE if single else f"model-{number:05d}-of-{len(shards):06d}.safetensors"
        # Copies: safetensors refuses tensors that share memory, as embedding and head do.
        made = {stored.name: stored.make().cpu().clone() for stored in shard}
        save_file(made, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(made, file))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@contextmanager
def new_folders(target: Path) -> Iterator[None]:
    """Make the folders that lead to ``target``; if the block fails, delete those left empty."""
    missing = [folder for folder in target.parents if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        with suppress(OSError):
            for folder in missing:
                folder.rmdir()
        raise


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` to write into, which takes its place once the block is done.

    If the block fails, everything is as it was before.
    """
    beside = target.with_name(f".{target.name}.writing")
    with new_folders(beside):
        try:
            shutil.rmtree(beside, ignore_errors=True)  # left by a kill
            beside.mkdir()
            yield beside
            _replace(beside, target)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def _replace(new: Path, target: Path) -> None:
    """Rename ``new`` to ``target``; an older ``target`` is deleted once that has worked."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    try:
        new.rename(target)
    except BaseException:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def headers(folder: Path) -> dict[str, Header]:
    """Every tensor of the folder by name, from the headers alone. Raises CheckpointError."""
    weight_map: dict[str, str] | None = None
    if (folder / INDEX).exists():
        try:
            weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            files = sorted(set(weight_map.values()))
        except (OSError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{folder / INDEX} is damaged ({error!r}); expected a JSON object with 'weight_map'"
            ) from None
    else:
        files = [SINGLE]
    found: dict[str, Header] = {}
    for file in files:
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{INDEX} names {file!r}; expected file names inside the folder")
        if not os.path.isfile(folder / file):  # a Path's own raises where a name is too long
            raise CheckpointError(f"{folder} has no {file}; fetch or write the missing shard")
        try:
            with safe_open(folder / file, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 - not a dict
                    if not (name.isascii() and name.isprintable()):  # it may write to a terminal
                        raise CheckpointError(f"{folder / file} names a tensor {name!a}; "
                                              "expected printable ASCII")  # fmt: skip
                    part = shard.get_slice(name)
                    found[name] = Header(file, tuple(part.get_shape()), part.get_dtype())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{folder / file} is truncated or damaged ({error}); fetch or write it again"
            ) from None
    if weight_map is not None:
        astray = [n for n, f in weight_map.items() if n not in found or found[n].file != f]
        if astray:
            raise CheckpointError(f"{INDEX} places {some(astray)} in files that lack them")
    return found


def read(
    folder: Path, found: dict[str, Header], names: Iterable[str]
) -> Iterator[tuple[str, Tensor]]:
    """The named tensors on the CPU, file by file, one at a time."""
    wanted = set(names)
    for file in sorted({found[name].file for name in wanted}):
        with safe_open(folder / file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 - not a dict
                if name in wanted:
                    yield name, shard.get_tensor(name)


def some(names: Sequence[str]) -> str:
    """Up to three names, and how many there are in all."""
    shown = ", ".join(names[:3])
    return f"{len(names)} tensors ({shown}, ...)" if len(names) > 3 else shown
