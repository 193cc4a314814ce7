"""The official checkpoint's layout: ``config.json``, safetensors shards and their index.

Why the official one: a learner can point transformers, vLLM or SGLang at a folder written here,
and this package at a folder written there. Tensor names are the checkpoint's, so the only work is
stacking: it stores experts one by one, this package as one tensor a layer. MTP layers follow the
main ones (``model.layers.61`` in V3) with their own copies of embedding and head.

Published weights are FP8: the projections of attention and feed-forward are E4M3 codes, each with a
``weight_scale_inv`` that has a number for every 128x128 block and that codes are *multiplied* by,
whatever its name says. The rest is bf16, router biases fp32.

Every header is read and compared with the config before a single weight is loaded. Weights are then
read one at a time: memory holds the model, the scales, one tensor, and pages of the shard it is in.

``python -m dsv3_mini.checkpoint inspect FOLDER`` says what a folder holds and what does not fit.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from math import ceil, prod
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dsv3_mini.block import DecoderLayer
from dsv3_mini.config import ModelConfig
from dsv3_mini.fp8_numbers import SIDE, SQUARE, dequantize, quantize
from dsv3_mini.model import Transformer
from dsv3_mini.shards import (
    INDEX,
    SINGLE,
    CheckpointError,
    Header,
    Stored,
    headers,
    read,
    replacing,
    some,
    write_shards,
)

M = TypeVar("M", bound=nn.Module)
SCALE = "_scale_inv"
QUANTIZATION = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                "weight_block_size": [SIDE, SIDE]}  # fmt: skip
FLOATS = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
_IN_FP8 = re.compile(r".*\.(self_attn|mlp)\..*_proj(_with_mqa)?\.weight")
_COPIES = re.compile(r"model\.layers\.\d+\.(embed_tokens|shared_head\.head)\.weight")


def named_weights(model: nn.Module, mtp: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its official name, experts one by one, MTP copies included.

    The tensors are views of the model's own memory. ``mtp=False`` leaves MTP layers out of a
    ``Transformer``. A part of a model gives the names inside that part.
    """
    for name, tensor in model.state_dict(keep_vars=True).items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if not mtp and layer and int(layer[1]) >= model.config.num_hidden_layers:  # type: ignore
            continue
        prefix, _, last = name.rpartition(".")
        if prefix.endswith("mlp.experts"):
            for expert in range(tensor.shape[0]):
                yield f"{prefix}.{expert}.{last}.weight", tensor[expert]
        else:
            yield name, tensor


def save_pretrained(
    model: Transformer, folder: str | os.PathLike[str], fp8: bool = False,
    max_shard_bytes: int = 4_300_000_000, overwrite: bool = False,
) -> None:  # fmt: skip
    """Write ``model`` as a folder in the official layout, in its own dtype.

    ``fp8`` writes what DeepSeek publishes instead: FP8 blocks with their scales, the rest in bf16.
    ``folder`` must be new or empty unless ``overwrite``, which replaces an earlier checkpoint once
    the new one is complete. Raises CheckpointError before anything is written.
    """
    folder = Path(folder)
    dtype = torch.bfloat16 if fp8 else model.lm_head.weight.dtype
    config = {**model.config.to_hf(), "torch_dtype": str(dtype)[6:]}
    if fp8:
        config["quantization_config"] = QUANTIZATION
    if type(max_shard_bytes) is not int or max_shard_bytes < 1:
        raise CheckpointError(f"max_shard_bytes is {max_shard_bytes!r}; expected an integer >= 1")
    if not folder.name:
        raise CheckpointError(f"{folder} has no name; expected a new folder inside another one")
    if folder.is_dir() and any(folder.iterdir()):
        if not overwrite or not any((folder / file).exists() for file in (SINGLE, INDEX)):
            raise CheckpointError(
                f"{folder} is not empty; expected a new folder, or a checkpoint and overwrite=True"
            )
    elif folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; expected the name of a new folder")
    try:
        with replacing(folder) as beside:
            write_shards(_stored(model, fp8), beside, max_shard_bytes)
            (beside / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write {folder} ({error}); choose a folder that you may write to, with room"
        ) from error


def _stored(model: Transformer, fp8: bool) -> Iterator[Stored]:
    weights = {name: tensor.detach() for name, tensor in named_weights(model)}

    @lru_cache(maxsize=1)  # codes and scales of a weight are asked for one after the other
    def cast(name: str) -> tuple[Tensor, Tensor]:
        return quantize(weights[name], SQUARE, name=name)

    def part(name: str, which: int) -> Tensor:
        return cast(name)[which]

    for name, tensor in weights.items():
        if fp8 and _IN_FP8.fullmatch(name):
            yield Stored(name, tensor.numel(), partial(part, name, 0))
            yield Stored(name + SCALE, 4 * prod(_scales(tensor.shape)), partial(part, name, 1))
        elif fp8 and not name.endswith("e_score_correction_bias"):
            yield Stored(name, 2 * tensor.numel(), tensor.bfloat16)
        else:
            yield Stored(name, tensor.nbytes, tensor.detach)


def _scales(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(ceil(size / SIDE) for size in shape)


def load_pretrained(
    folder: str | os.PathLike[str], dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu", mtp: bool = True,
) -> Transformer:  # fmt: skip
    """Read a folder in the official layout into a model of ``dtype`` on ``device``, in eval mode.

    FP8 weights become code x scale. Router biases stay fp32. ``mtp=False`` builds the model without
    its MTP layers and skips their tensors. On the ``meta`` device everything is compared and
    nothing read. Raises CheckpointError (or ConfigError) naming everything that does not fit.
    """
    folder, config, found = open_folder(folder, dtype)
    stored_layers = config.num_hidden_layers + config.num_nextn_predict_layers
    if not mtp:
        config = config.replace(num_nextn_predict_layers=0)
    model = on_meta(Transformer, config).to(dtype)
    skipped = tuple(f"model.layers.{n}." for n in range(config.num_hidden_layers, stored_layers))
    found = {n: h for n, h in found.items() if mtp or not n.startswith(skipped)}
    return _filled(model, folder, found, "", device)


def load_layer(
    folder: str | os.PathLike[str], index: int, dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> DecoderLayer:  # fmt: skip
    """One layer of the main model alone, as ``load_pretrained`` would load it."""
    folder, config, found = open_folder(folder, dtype)
    if type(index) is not int or not 0 <= index < config.num_hidden_layers:
        raise CheckpointError(f"layer {index!r}; expected 0 to {config.num_hidden_layers - 1}")
    layer = on_meta(DecoderLayer, config, index).to(dtype)
    prefix = f"model.layers.{index}."
    found = {n: h for n, h in found.items() if n.startswith(prefix)}
    return _filled(layer, folder, found, prefix, device)


def load_tensors(
    folder: str | os.PathLike[str], pattern: str, keep_fp8: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """The tensors whose whole name matches ``pattern``, one at a time, as they are stored.

    FP8 weights come as code x scale in fp32; with ``keep_fp8`` as codes, and a scale where the
    pattern matches its name. Raises CheckpointError, also where nothing matches.
    """
    folder = Path(folder)
    found = headers(folder)
    names = [n for n in found if re.fullmatch(pattern, n) and (keep_fp8 or not n.endswith(SCALE))]
    if not names:
        raise CheckpointError(f"no tensor in {folder} matches {pattern!r}; names are like "
                              f"{some(list(found))}")  # fmt: skip
    yield from (read if keep_fp8 else _decoded)(folder, found, names)


def open_folder(
    folder: str | os.PathLike[str], dtype: torch.dtype
) -> tuple[Path, ModelConfig, dict[str, Header]]:
    """The folder, its config and its headers, if each can be right. Raises CheckpointError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; expected config.json and safetensors")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise CheckpointError(f"dtype is {dtype}; expected a floating-point dtype to compute in")
    config = ModelConfig.from_hf(folder)
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    quantization = raw.get("quantization_config")
    if quantization is not None and quantization != QUANTIZATION:
        raise CheckpointError(f"quantization_config is {quantization!r}; expected {QUANTIZATION!r}")
    found = headers(folder)
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    experts = config.n_routed_experts * (layers - config.first_k_dense_replace)
    # Also refused below, but naming every tensor that a wrong number asks for may take hours.
    if layers > max(200, len(found)) or experts > max(100_000, len(found)):
        raise CheckpointError(f"{folder} holds {len(found)} tensors, too few for the {layers} "
                              f"layers and {experts} experts of its config.json")  # fmt: skip
    return folder, config, found


def on_meta(kind: Callable[..., M], config: ModelConfig, *index: int) -> M:
    """A module without memory, for its names and shapes. Raises CheckpointError."""
    try:
        with torch.device("meta"):
            return kind(config, *index)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise CheckpointError("config.json asks for larger tensors than can exist") from error


def _filled(
    module: M, folder: Path, found: dict[str, Header], prefix: str, device: torch.device | str
) -> M:
    if problems := mismatches({prefix + n: t for n, t in named_weights(module)}, found):
        raise CheckpointError(f"{folder} does not hold the model of its config.json: "
                              + "; ".join(problems[:8]))  # fmt: skip
    try:
        module.to_empty(device=device)
    except (RuntimeError, AssertionError) as error:
        raise CheckpointError(
            f"cannot make the model on {device!r} ({error}); expected a device that this machine "
            "has, with room for it"
        ) from None
    targets = {prefix + name: tensor for name, tensor in named_weights(module)}
    if next(iter(targets.values())).is_meta:
        return module.eval()
    with torch.no_grad():
        # Copies last: they are compared with what the main model has got.
        for copies in (False, True):
            names = [name for name in targets if bool(_COPIES.fullmatch(name)) == copies]
            for name, tensor in _decoded(folder, found, names, device):
                if not copies:
                    targets[name].copy_(tensor)
                elif not torch.equal(targets[name], tensor.to(targets[name])):
                    raise CheckpointError(
                        f"{name} in {folder} differs from the main model's, which MTP shares; was "
                        "only the main model trained on? Load with mtp=False"
                    )
    return module.eval()


def _decoded(
    folder: Path, found: dict[str, Header], names: list[str], device: torch.device | str = "cpu"
) -> Iterator[tuple[str, Tensor]]:
    """The named tensors one at a time; those in FP8 as code x scale, computed on ``device``."""
    cast = [name + SCALE for name in names if found[name].dtype == "F8_E4M3"]
    if bare := [name for name in cast if name not in found]:
        raise CheckpointError(f"{folder} lacks {some(bare)}, the scales of FP8 weights")
    scales = dict(read(folder, found, cast))  # in one pass: a file is opened once, not per weight
    for name, tensor in read(folder, found, names):
        scale = scales.pop(name + SCALE, None)
        if scale is not None:
            try:
                tensor = dequantize(tensor.to(device), scale.to(device), SQUARE)
            except ValueError as error:
                raise CheckpointError(f"{name} in {folder} has no use: {error}") from None
        yield name, tensor


def mismatches(expected: dict[str, Tensor], found: dict[str, Header]) -> list[str]:
    """Everything in which a folder's headers differ from the tensors that a model has."""
    problems = []
    if missing := [name for name in expected if name not in found]:
        hint = " (load with mtp=False)" if ".enorm." in "".join(missing) else ""
        problems.append(f"missing {some(missing)}{hint}")
    cast = {name + SCALE for name, header in found.items() if header.dtype == "F8_E4M3"}
    if bare := sorted(cast - found.keys()):
        problems.append(f"missing {some(bare)}, the scales of FP8 weights")
    if extra := [name for name in found if name not in expected and name not in cast]:
        problems.append(f"not expected by its config.json: {some(extra)}")
    for name, header in found.items():
        of_scale = name in cast
        tensor = expected.get(name.removesuffix(SCALE) if of_scale else name)
        if tensor is None:
            continue
        shape = _scales(tensor.shape) if of_scale else tuple(tensor.shape)
        if header.shape != shape:
            problems.append(f"{name} is {header.shape}, its config.json makes it {shape}")
        allowed = [*FLOATS, *(["F8_E4M3"] if _IN_FP8.fullmatch(name) else [])]
        allowed = ["F32"] if of_scale else allowed
        if header.dtype not in allowed:
            problems.append(f"{name} is {header.dtype}, expected {' or '.join(allowed)}")
    return problems


if __name__ == "__main__":
    from dsv3_mini.inspect_command import main

    sys.exit(main())
