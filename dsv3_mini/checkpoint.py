"""The official checkpoint's layout: ``config.json``, safetensors shards and their index.

Why the official one: a learner can point transformers, vLLM or SGLang at a folder written here,
and this package at a folder written there. Tensor names are the checkpoint's, so the only work is
stacking: it stores experts one by one, this package as one tensor a layer. MTP layers follow the
main ones (``model.layers.61`` in V3) with their own copies of embedding and head.

Every header is read and compared with the config before a single weight is loaded, and a folder is
written beside its target and then renamed, so neither side ever sees half a model. No pickle.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dsv3_mini.config import ModelConfig
from dsv3_mini.model import Transformer

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_COPIES = re.compile(r"model\.layers\.\d+\.(embed_tokens|shared_head\.head)\.weight")


class CheckpointError(ValueError):
    """A folder that cannot be read or written as a checkpoint; the message says what to do."""


def named_weights(model: Transformer, mtp: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its official name, experts one by one, MTP copies included.

    The tensors are views of the model's own memory. ``mtp=False`` leaves MTP layers out.
    """
    first_mtp = model.config.num_hidden_layers
    for name, tensor in model.state_dict(keep_vars=True).items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if not mtp and layer and int(layer[1]) >= first_mtp:
            continue
        prefix, _, last = name.rpartition(".")
        if prefix.endswith(".mlp.experts"):
            for expert in range(tensor.shape[0]):
                yield f"{prefix}.{expert}.{last}.weight", tensor[expert]
        else:
            yield name, tensor


def save_pretrained(
    model: Transformer, folder: str | os.PathLike[str], fp8: bool = False,
    max_shard_bytes: int = 4_000_000_000, overwrite: bool = False,
) -> None:  # fmt: skip
    """Write ``model`` as a folder in the official layout, in its own dtype.

    ``folder`` must be new or empty unless ``overwrite``, which replaces an earlier checkpoint once
    the new one is complete. Raises CheckpointError before anything is written.
    """
    if fp8:
        raise CheckpointError("fp8=True: writing FP8 blocks is not built yet; save in bf16 or fp32")
    folder = Path(folder)
    config = {**model.config.to_hf(), "torch_dtype": str(model.lm_head.weight.dtype)[6:]}
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
    beside = folder.with_name(f".{folder.name}.writing")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        _write_shards(model, beside, max_shard_bytes)
        (beside / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        replace_folder(beside, folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write {folder} ({error}); choose a folder that you may write to, with room"
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)  # an interrupt, too, leaves nothing behind


def replace_folder(new: Path, target: Path) -> None:
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


def _write_shards(model: Transformer, folder: Path, max_shard_bytes: int) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in named_weights(model):
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.detach()
        size += tensor.nbytes
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        single = len(shards) == 1
        file = SINGLE if single else f"model-{number:05d}-of-{len(shards):06d}.safetensors"
        # Copies: safetensors refuses tensors that share memory, as embedding and head do.
        save_file(
            {name: tensor.cpu().clone() for name, tensor in shard.items()},
            folder / file,
            metadata={"format": "pt"},
        )
        weight_map.update(dict.fromkeys(shard, file))
    if len(shards) > 1:
        total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def load_pretrained(
    folder: str | os.PathLike[str], dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu", mtp: bool = True,
) -> Transformer:  # fmt: skip
    """Read a folder in the official layout into a model of ``dtype`` on ``device``, in eval mode.

    Router biases stay fp32. ``mtp=False`` builds the model without its MTP layers and skips their
    tensors. Raises CheckpointError (or ConfigError) naming everything that does not fit.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; expected config.json and safetensors")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise CheckpointError(f"dtype is {dtype}; expected a floating-point dtype to compute in")
    config = ModelConfig.from_hf(folder)
    stored_layers = config.num_hidden_layers + config.num_nextn_predict_layers
    if not mtp:
        config = config.replace(num_nextn_predict_layers=0)
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
    expected = dict(named_weights(model))
    files = _headers(folder)
    skipped = tuple(f"model.layers.{n}." for n in range(config.num_hidden_layers, stored_layers))
    found = {n: h for n, h in files.items() if mtp or not n.startswith(skipped)}
    _compare(folder, expected, found)
    try:
        model = model.to_empty(device=device)
    except (RuntimeError, AssertionError) as error:
        raise CheckpointError(
            f"cannot make the model on {device!r} ({error}); expected a device that this machine "
            "has, with room for it"
        ) from None
    with torch.no_grad():
        targets = dict(named_weights(model))
        for file in sorted({header["file"] for header in found.values()}):
            with safe_open(folder / file, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 - not a dict
                    if name in targets and not _COPIES.fullmatch(name):
                        targets[name].copy_(shard.get_tensor(name))
        for name in filter(_COPIES.fullmatch, targets):
            with safe_open(folder / found[name]["file"], framework="pt") as shard:
                if not torch.equal(targets[name], shard.get_tensor(name).to(targets[name])):
                    raise CheckpointError(
                        f"{name} in {folder} differs from the main model's, which MTP shares; was "
                        "only the main model trained on? Load with mtp=False"
                    )
    return model.eval()


def _headers(folder: Path) -> dict[str, dict[str, Any]]:
    """Name to file, shape and dtype of every tensor in the folder, from the headers alone."""
    weight_map: dict[str, str] | None = None
    if (folder / INDEX).exists():
        try:
            weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            files = sorted(set(weight_map.values()))
        except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(
                f"{folder / INDEX} is damaged ({error!r}); expected a JSON object with 'weight_map'"
            ) from None
    else:
        files = [SINGLE]
    headers: dict[str, dict[str, Any]] = {}
    for file in files:
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{INDEX} names {file!r}; expected file names inside the folder")
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder} has no {file}; fetch or write the missing shard")
        try:
            with safe_open(folder / file, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 - not a dict
                    part = shard.get_slice(name)
                    shape, dtype = tuple(part.get_shape()), part.get_dtype()
                    headers[name] = {"file": file, "shape": shape, "dtype": dtype}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{folder / file} is truncated or damaged ({error}); fetch or write it again"
            ) from None
    if weight_map is not None:
        astray = [n for n, f in weight_map.items() if headers.get(n, {}).get("file") != f]
        if astray:
            raise CheckpointError(f"{INDEX} places {_some(astray)} in files that lack them")
    return headers


def _compare(folder: Path, expected: dict[str, Tensor], found: dict[str, dict[str, Any]]) -> None:
    problems = []
    if missing := [name for name in expected if name not in found]:
        hint = " (load with mtp=False)" if ".enorm." in "".join(missing) else ""
        problems.append(f"missing {_some(missing)}{hint}")
    if extra := [name for name in found if name not in expected]:
        hint = " (FP8 weights: not built yet)" if "_scale_inv" in "".join(extra) else ""
        problems.append(f"not expected by its config.json: {_some(extra)}{hint}")
    for name, header in found.items():
        if name not in expected:
            continue
        if header["shape"] != tuple(expected[name].shape):
            problems.append(
                f"{name} is {header['shape']}, its config.json makes it "
                f"{tuple(expected[name].shape)}"
            )
        if header["dtype"] not in ("F64", "F32", "BF16", "F16"):
            problems.append(f"{name} is {header['dtype']}, expected F32, BF16, F16 or F64")
    if problems:
        raise CheckpointError(
            f"{folder} does not hold the model of its config.json: " + "; ".join(problems[:8])
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{len(names)} tensors ({shown}, ...)" if len(names) > 3 else shown
