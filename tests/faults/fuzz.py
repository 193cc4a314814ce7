"""Damaged checkpoints by the thousand: each loads or is refused by name, soon, in little memory.

A case is a pure function of its seed and number, so that a failure can be looked at alone.
"""

from __future__ import annotations

import copy
import json
import random
import resource
import shutil
import signal
import struct
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dsv3_mini.checkpoint import load_layer, load_pretrained, load_tensors, save_pretrained
from dsv3_mini.config import ConfigError, ModelConfig
from dsv3_mini.inspect_command import inspect
from dsv3_mini.model import Transformer
from dsv3_mini.shards import INDEX, SINGLE, CheckpointError, headers

SECONDS = 2.0  # of processor time, for one input
MEGABYTES = 500  # that the peak may grow by
DEEP = "[" * 100_000 + "]" * 100_000
VALUES: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 3, 7, 64, 129, 2**31, 2**62, 2**63, 10**30, 10**400),
    *(0.5, -0.5, 1e-300, 1e308, float("inf"), float("-inf"), float("nan")),
    *("", "x", "8", "yarn", "F32", "F8_E4M3", "F8_E8M0", "F4", "I64", "BOOL", "C64"),
    *("..", "../x", "/etc/passwd", "a/b", "..\\x", "C:x", "\0", "\ud800", "ä", "a" * 5000),
    *([], {}, [1], [-1, 5], [2**63, 1], [0, 2**62], {"a": 1}, [[]], [None], "@deep@"),
]
DTYPES = [
    *("F64", "F32", "BF16", "F16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "C64"),
    *("I64", "I32", "I16", "I8", "U32", "U16", "U8", "BOOL"),
]


@dataclass
class Count:
    """How many inputs ended how, and what went wrong in those that should have ended otherwise."""

    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    slowest: float = 0.0
    megabytes: float = 0.0


def mutate_json(value: Any, chance: random.Random) -> str:
    """The text of ``value`` after one to three changes anywhere in it."""
    root = [copy.deepcopy(value)]
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        holder, key = chance.choice(list(_places(root)))
        kind = chance.random()
        if kind < 0.6:
            holder[key] = copy.deepcopy(chance.choice(VALUES))
        elif kind < 0.75 and holder is not root:
            del holder[key]
        elif kind < 0.9 and isinstance(holder, dict):
            name = chance.choice((key.upper(), key[:-1], key + "x", "../" + key, "/" + key, "\x1b"))
            holder[name] = holder.pop(key)
        else:
            other, from_ = chance.choice(list(_places(root)))
            holder[key] = copy.deepcopy(other[from_])
    text = json.dumps(root[0]).replace('"@deep@"', DEEP)
    if chance.random() < 0.1 and isinstance(value, dict) and value and text.startswith("{"):
        twice = {chance.choice(list(value)): chance.choice(VALUES[:40])}
        text = json.dumps(twice)[:-1] + ", " + text[1:]  # the same key twice
    return text


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key in value if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


def mutate_bytes(data: bytes, chance: random.Random, near: int = 10**9) -> bytes:
    """Flipped, cut, doubled or added bytes, most of them among the first ``near``."""
    made = bytearray(data)
    place = chance.randrange(min(near, len(made)) if chance.random() < 0.8 else len(made))
    kind = chance.random()
    if kind < 0.6:
        for _ in range(chance.choice((1, 1, 2, 8))):
            made[min(place + chance.randrange(64), len(made) - 1)] = chance.randrange(256)
    elif kind < 0.8:
        del made[place:]
    elif kind < 0.9:
        made[place:place] = bytes(chance.randrange(256) for _ in range(chance.randrange(1, 20)))
    else:
        del made[place : place + chance.randrange(1, 20)]
    return bytes(made)


def mutate_shard(data: bytes, chance: random.Random) -> bytes:
    """A safetensors file with a wrong length, a wrong header or wrong bytes."""
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = data[8 : 8 + length], data[8 + length :]
    kind = chance.random()
    if kind < 0.1:
        far = (0, 1, 2, length - 1, length + 1, len(data), 2**31, 2**32, 2**62, 2**63, 2**64 - 1)
        return struct.pack("<Q", chance.choice(far)) + header + rest
    if kind < 0.3:
        return mutate_bytes(data, chance, near=8 + length)
    tensors = json.loads(header)
    if kind < 0.5:  # what a header says of a tensor, in numbers that nearly fit
        about = tensors[chance.choice([name for name in tensors if name != "__metadata__"])]
        begin, end = about["data_offsets"]
        by = chance.choice((-1, 1, 4, -4, 2**40, begin - end))
        about["data_offsets"] = chance.choice(([begin + by, end], [begin, end + by], [end, begin]))
        if about["shape"] and chance.random() < 0.5:
            sizes = [-size for size in about["shape"]], [*about["shape"], 1], about["shape"][::-1]
            about["shape"] = chance.choice((*sizes, [2**32] * 2, [2**62, 0]))
        if chance.random() < 0.5:  # another dtype, and else as it was
            about.update(data_offsets=[begin, end], dtype=chance.choice(DTYPES))
        text = json.dumps(tensors)
    else:
        text = mutate_json(tensors, chance)
    made = text.encode()
    return struct.pack("<Q", len(made)) + made + rest


class Bench:
    """A folder with good checkpoints, and one place where each is spoiled and tried in turn."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        config = ModelConfig.tiny().replace(vocab_size=16, n_routed_experts=4, n_group=2,
                                            topk_group=1, num_experts_per_tok=2)  # fmt: skip
        model = Transformer(config)
        self.place = folder / "spoiled"
        self.good = [folder / "one", folder / "many"]
        save_pretrained(model, self.good[0])
        save_pretrained(model, self.good[1], fp8=True, max_shard_bytes=20_000)

    def spoil(self, what: str, chance: random.Random) -> str:
        """Make a damaged folder in ``place``; gives the name of the file that is damaged."""
        source = chance.choice(self.good)
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(source, self.place)
        names = sorted(path.name for path in source.glob("*.safetensors"))
        name = "config.json" if what == "config" else chance.choice([*names, INDEX])
        if name == INDEX and source == self.good[0]:
            name = SINGLE
        data = (source / name).read_bytes()
        if name.endswith(".safetensors"):
            data = mutate_shard(data, chance)
        elif chance.random() < 0.2:
            data = mutate_bytes(data, chance)
        else:
            data = mutate_json(json.loads(data), chance).encode()
        (self.place / name).write_bytes(data)
        return name

    def attempts(self, what: str) -> dict[str, Callable[[], object]]:
        """What in the package reads a folder; all but the first of them begin with the first."""
        whole = partial(load_pretrained, self.place)
        first: dict[str, Callable[[], object]] = {
            "config": partial(ModelConfig.from_hf, self.place),
            "weights": partial(headers, self.place),
        }
        return {
            what: first[what],
            "load_pretrained": whole,
            "without MTP": partial(whole, mtp=False, device="meta"),
            "load_layer": partial(load_layer, self.place, 1),
            "load_tensors": lambda: list(load_tensors(self.place, ".*")),
            "inspect": partial(inspect, self.place),
        }


class TooSlowError(BaseException):
    """Not an Exception, so that no ``except`` in the package takes it for its own."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise TooSlowError in the block once it has used so much processor time."""

    def stop(number: int, frame: object) -> None:
        raise TooSlowError(f"more than {seconds} s of processor time")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def peak() -> float:
    """Megabytes that this process has had at most (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def fuzz(folder: Path, what: str, numbers: range, seed: int = 0) -> Count:
    """Try the cases ``numbers`` of ``what``, "config" or "weights"."""
    bench, count = Bench(folder), Count()
    for good in bench.good:
        shutil.copytree(good, bench.place)
        for attempt in bench.attempts(what).values():
            attempt()
        shutil.rmtree(bench.place)
    before = peak()
    for number in numbers:
        name = bench.spoil(what, random.Random(f"{seed}/{what}/{number}"))
        for way, attempt in bench.attempts(what).items():
            began, outcome = time.process_time(), "loaded"
            try:
                with at_most(SECONDS):
                    attempt()
            except (ConfigError, CheckpointError):
                outcome = "refused"
            except (Exception, TooSlowError):
                outcome = traceback.format_exc(limit=-3)
            if peak() - before > MEGABYTES:
                outcome = f"the peak grew to {peak():.0f} MB"
                before = peak()
            count.slowest = max(count.slowest, time.process_time() - began)
            count.megabytes = max(count.megabytes, peak() - before)
            if outcome in ("loaded", "refused"):
                count.outcomes[f"{way} {outcome}"] += 1
            else:
                count.failures.append(f"{what} {number} ({name}, {way}): {outcome}")
            if way == what and outcome == "refused":
                break
    return count
