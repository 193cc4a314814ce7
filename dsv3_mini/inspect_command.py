"""The command ``python -m dsv3_mini.checkpoint inspect FOLDER``: what is in it, what does not fit.

Why: a folder of 163 files that was fetched overnight should be looked at before it is loaded. Only
headers are read.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from math import prod
from pathlib import Path

import torch

from dsv3_mini.checkpoint import FLOATS, mismatches, named_weights, on_meta, open_folder
from dsv3_mini.model import Transformer


def inspect(folder: str | os.PathLike[str]) -> tuple[list[str], list[str]]:
    """What a folder holds, in lines, and everything that does not fit its config."""
    folder, config, found = open_folder(folder, torch.float32)
    sizes = {**FLOATS, "F8_E4M3": 1}
    count = Counter(header.dtype for header in found.values())
    numbers: Counter[str] = Counter()
    for header in found.values():
        numbers[header.dtype] += prod(header.shape)
    depths = config.num_nextn_predict_layers
    lines = [
        f"{config.num_hidden_layers} layers of width {config.hidden_size} and {depths} for MTP; "
        f"{config.n_routed_experts} experts, {config.num_experts_per_tok} a token",
        f"{len(found):,} tensors in {len({header.file for header in found.values()})} files",
    ]
    for dtype in sorted(count):
        total = numbers[dtype] * sizes.get(dtype, 0)
        lines.append(f"{dtype:8s}{count[dtype]:>8,} tensors {numbers[dtype]:>17,} numbers "
                     f"{total:>17,} bytes")  # fmt: skip
    return lines, mismatches(dict(named_weights(on_meta(Transformer, config))), found)


def main(argv: list[str] | None = None) -> int:
    """The command ``python -m dsv3_mini.checkpoint``; see ``--help``."""
    parser = argparse.ArgumentParser(prog="python -m dsv3_mini.checkpoint")
    commands = parser.add_subparsers(required=True)
    about = "what a folder holds, and every mismatch with its config.json"
    commands.add_parser("inspect", help=about).add_argument("folder", type=Path)
    try:
        lines, problems = inspect(parser.parse_args(argv).folder)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(*lines, *problems, sep="\n")
    print(f"{len(problems)} kinds of mismatch" if problems else "everything fits its config.json")
    return 1 if problems else 0
