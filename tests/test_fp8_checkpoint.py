"""The published layout: FP8 blocks and their scales, V3's exact keys, and wrong folders."""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Callable
from math import ceil, prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsv3_mini import checkpoint
from dsv3_mini.accounting import checkpoint_bytes
from dsv3_mini.checkpoint import (
    CheckpointError,
    load_layer,
    load_pretrained,
    load_tensors,
    named_weights,
    save_pretrained,
)
from dsv3_mini.config import ModelConfig
from dsv3_mini.fp8 import quantize
from dsv3_mini.inspect_command import inspect, main
from dsv3_mini.model import Transformer
from dsv3_mini.shards import INDEX, SINGLE
from tests.reference import fp8 as reference
from tests.reference.configs import random_config, randomise

# Wide enough for more than one block and for ragged ones.
WIDE = ModelConfig.tiny().replace(
    hidden_size=160, intermediate_size=272, moe_intermediate_size=136, q_lora_rank=144
)
PROJECTIONS = (
    "q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj",
    "gate_proj", "up_proj", "down_proj",
)  # fmt: skip


def model(config: ModelConfig = WIDE, seed: int = 0) -> Transformer:
    return randomise(Transformer(config), seed).eval()


def is_cast(name: str) -> bool:
    return name.split(".")[-2] in PROJECTIONS


@pytest.mark.parametrize("shard_bytes", [10**9, 30_000], ids=["1", "n"])
@pytest.mark.parametrize("seed", range(4))
def test_round_trip_equals_the_reference_bit_for_bit(
    tmp_path: Path, seed: int, shard_bytes: int
) -> None:
    config = WIDE if seed == 0 else random_config(seed)
    if config.attention != "mla":
        pytest.skip("the yardstick has no official layout")
    ours = model(config, seed)
    save_pretrained(ours, tmp_path / "fp8", fp8=True, max_shard_bytes=shard_bytes)
    back = dict(named_weights(load_pretrained(tmp_path / "fp8")))
    for name, weight in named_weights(ours):
        if is_cast(name):
            expected = torch.from_numpy(
                reference.there_and_back(weight.detach().numpy(), (128, 128))
            )
        elif name.endswith("e_score_correction_bias"):
            expected = weight
        else:
            expected = weight.detach().bfloat16().float()
        assert torch.equal(back[name], expected), name
    assert config.num_nextn_predict_layers == 0 or any("enorm" in name for name in back)


def test_what_is_written_is_what_is_published(tmp_path: Path) -> None:
    ours = model()
    save_pretrained(ours, tmp_path / "fp8", fp8=True)
    stored = load_file(tmp_path / "fp8" / SINGLE)
    for name, weight in named_weights(ours):
        if is_cast(name):
            assert stored[name].dtype == torch.float8_e4m3fn
            scale = stored.pop(name + "_scale_inv")
            assert scale.dtype == torch.float32
            assert scale.shape == tuple(ceil(size / 128) for size in weight.shape)
        else:
            bias = name.endswith("e_score_correction_bias")
            assert stored[name].dtype == (torch.float32 if bias else torch.bfloat16), name
        assert stored.pop(name).shape == weight.shape
    assert not stored
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    assert config["quantization_config"] == {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }


def test_a_layer_and_single_experts_are_read_alone(tmp_path: Path) -> None:
    save_pretrained(model(), tmp_path / "fp8", fp8=True, max_shard_bytes=30_000)
    whole = load_pretrained(tmp_path / "fp8")
    layer = load_layer(tmp_path / "fp8", 1)
    expected = whole.model.layers[1].state_dict()
    assert layer.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[n]) for n, tensor in layer.state_dict().items())
    pattern = r"model\.layers\.1\.mlp\.experts\.(2|5)\..*"
    alone = dict(load_tensors(tmp_path / "fp8", pattern))
    assert len(alone) == 6
    for name, tensor in alone.items():
        assert torch.equal(tensor, dict(named_weights(whole))[name])
    every = load_tensors(tmp_path / "fp8", ".*", keep_fp8=True)
    index = json.loads((tmp_path / "fp8" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for _, tensor in every)
    codes = dict(load_tensors(tmp_path / "fp8", pattern, keep_fp8=True))
    assert Counter(t.dtype for t in codes.values()) == {torch.float8_e4m3fn: 6, torch.float32: 6}
    with pytest.raises(CheckpointError, match=r"no tensor in .* matches 'lm_hed'"):
        list(load_tensors(tmp_path / "fp8", "lm_hed"))
    with pytest.raises(CheckpointError, match="layer 2; expected 0 to 1"):
        load_layer(tmp_path / "fp8", 2)


def test_each_weight_is_cast_once_and_read_whatever_shard_has_its_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cast: list[str] = []

    def counted(x: Tensor, *args: Any, name: str) -> tuple[Tensor, Tensor]:
        cast.append(name)
        return quantize(x, *args, name=name)

    monkeypatch.setattr(checkpoint, "quantize", counted)
    save_pretrained(model(), tmp_path / "fp8", fp8=True, max_shard_bytes=1)
    assert cast == [name for name, _ in named_weights(model()) if is_cast(name)]
    files = json.loads((tmp_path / "fp8" / INDEX).read_text())["weight_map"]
    assert all(files[name] != files[name + "_scale_inv"] for name in cast)
    load_pretrained(tmp_path / "fp8")


def test_a_weight_without_its_scale_is_not_read(tmp_path: Path) -> None:
    save_pretrained(model(), tmp_path / "fp8", fp8=True)
    file = tmp_path / "fp8" / SINGLE
    save_file(change(load_file(file), S, None), file)
    with pytest.raises(CheckpointError, match=r"lacks .*up_proj.weight_scale_inv, the scales"):
        list(load_tensors(tmp_path / "fp8", W))


def change(tensors: dict[str, Tensor], name: str, value: Tensor | None) -> dict[str, Tensor]:
    others = {key: tensor for key, tensor in tensors.items() if key != name}
    return others if value is None else {**others, name: value}


W = "model.layers.0.mlp.up_proj.weight"
S = W + "_scale_inv"
BROKEN: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "no scale": (lambda t: change(t, S, None), r"missing .*up_proj.weight_scale_inv, the scales"),
    "scale of other blocks": (
        lambda t: change(t, S, torch.ones(2, 2)), r"scale_inv is \(2, 2\).* makes it \(3, 2\)"
    ),
    "scale in bf16": (
        lambda t: change(t, S, t[S].bfloat16()), r"scale_inv is BF16, expected F32"
    ),
    "scale without codes": (lambda t: change(t, W, t[W].float()), r"not expected .*scale_inv"),
    "codes in E5M2": (lambda t: change(t, W, t[W].float().to(torch.float8_e5m2)), "F8_E5M2"),
    "integers": (lambda t: change(t, W, t[W].float().to(torch.int8)), "I8, expected"),
    "a norm in FP8": (
        lambda t: change(t, "model.norm.weight", t["model.norm.weight"].to(torch.float8_e4m3fn)),
        r"model.norm.weight is F8_E4M3, expected F64 or",
    ),
    "one key more": (lambda t: change(t, "model.extra.weight", torch.ones(1)), "not expected"),
    "another shape": (lambda t: change(t, W, t[W][:3].clone()), r"up_proj.weight is \(3, 160\)"),
    "copies that differ": (
        lambda t: change(t, "model.layers.2.embed_tokens.weight", torch.zeros(128, 160)),
        "differs from the main model's",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_wrong_folders_are_refused_and_inspected(
    tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    breaks, message = BROKEN[case]
    save_pretrained(model(), tmp_path / "fp8", fp8=True)
    file = tmp_path / "fp8" / SINGLE
    save_file(breaks(load_file(file)), file)
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(tmp_path / "fp8")
    if case != "copies that differ":  # seen in weights, not in headers
        assert main(["inspect", str(tmp_path / "fp8")]) == 1
        assert "mismatch" in capsys.readouterr().out


def test_another_way_to_quantize_is_refused(tmp_path: Path) -> None:
    save_pretrained(model(), tmp_path / "fp8", fp8=True)
    path = tmp_path / "fp8" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["weight_block_size"] = [64, 64]
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"quantization_config .*\[64, 64\].* expected"):
        load_pretrained(tmp_path / "fp8")


def test_damaged_shards_are_refused(tmp_path: Path) -> None:
    save_pretrained(model(), tmp_path / "fp8", fp8=True, max_shard_bytes=100_000)
    shard = sorted((tmp_path / "fp8").glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        load_pretrained(tmp_path / "fp8")
    shard.unlink()
    with pytest.raises(CheckpointError, match="fetch or write the missing shard"):
        load_pretrained(tmp_path / "fp8")
    index = json.loads((tmp_path / "fp8" / INDEX).read_text())
    index["weight_map"][W] = "../outside.safetensors"
    (tmp_path / "fp8" / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="file names inside the folder"):
        load_pretrained(tmp_path / "fp8")


def test_inspect_counts_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_pretrained(model(), tmp_path / "fp8", fp8=True, max_shard_bytes=100_000)
    lines, problems = inspect(tmp_path / "fp8")
    assert not problems
    expected = checkpoint_bytes(WIDE)
    assert f"{expected.fp8:,} bytes" in "\n".join(lines)
    assert f"{expected.scales + expected.fp32:,} bytes" in "\n".join(lines)
    assert f"{expected.bf16:,} bytes" in "\n".join(lines)
    assert main(["inspect", str(tmp_path / "fp8")]) == 0
    assert "everything fits its config.json" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "nowhere")]) == 2
    assert "is not a folder" in capsys.readouterr().err


def v3_headers() -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name to dtype and shape of the published 671B checkpoint, typed out from its shapes."""
    hidden, inner = 7168, 2048
    codes: dict[str, tuple[int, int]] = {}
    rest: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (129280, hidden), "lm_head.weight": (129280, hidden),
        "model.norm.weight": (hidden,),
    }  # fmt: skip
    biases = {}
    for layer in range(62):
        p = f"model.layers.{layer}."
        codes |= {
            p + "self_attn.q_a_proj": (1536, hidden), p + "self_attn.q_b_proj": (24576, 1536),
            p + "self_attn.kv_a_proj_with_mqa": (576, hidden),
            p + "self_attn.kv_b_proj": (32768, 512), p + "self_attn.o_proj": (hidden, 16384),
        }  # fmt: skip
        rest |= {
            p + "input_layernorm.weight": (hidden,),
            p + "post_attention_layernorm.weight": (hidden,),
            p + "self_attn.q_a_layernorm.weight": (1536,),
            p + "self_attn.kv_a_layernorm.weight": (512,),
        }  # fmt: skip
        parts = {"mlp.": 18432} if layer < 3 else {"mlp.shared_experts.": inner}
        if layer >= 3:
            parts |= {f"mlp.experts.{e}.": inner for e in range(256)}
            rest[p + "mlp.gate.weight"] = (256, hidden)
            biases[p + "mlp.gate.e_score_correction_bias"] = (256,)
        for part, width in parts.items():
            codes |= {
                p + part + "gate_proj": (width, hidden),
                p + part + "up_proj": (width, hidden),
            }
            codes[p + part + "down_proj"] = (hidden, width)
    p = "model.layers.61."
    rest |= {p + f"{name}.weight": (hidden,) for name in ("enorm", "hnorm", "shared_head.norm")}
    rest |= {
        p + f"{name}.weight": (129280, hidden) for name in ("embed_tokens", "shared_head.head")
    }
    rest[p + "eh_proj.weight"] = (hidden, 2 * hidden)
    scales = {name: (ceil(r / 128), ceil(c / 128)) for name, (r, c) in codes.items()}
    return (
        {f"{name}.weight": ("F8_E4M3", shape) for name, shape in codes.items()}
        | {f"{name}.weight_scale_inv": ("F32", shape) for name, shape in scales.items()}
        | {name: ("BF16", shape) for name, shape in rest.items()}
        | {name: ("F32", shape) for name, shape in biases.items()}
    )


def test_v3_itself_on_the_meta_device(tmp_path: Path) -> None:
    """Files with the headers of all 671B weights, and holes where the weights would be."""
    every, size = v3_headers(), {"F8_E4M3": 1, "BF16": 2, "F32": 4}
    assert len(every) == 91_991
    names = list(every)
    weight_map: dict[str, str] = {}
    for number in range(163):
        file, offset, header = f"model-{number + 1:05d}-of-000163.safetensors", 0, {}
        for name in names[number::163]:
            dtype, shape = every[name]
            end = offset + size[dtype] * prod(shape)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
            offset, weight_map[name] = end, file
        raw = json.dumps(header).encode()
        with (tmp_path / file).open("wb") as out:
            out.write(struct.pack("<Q", len(raw)) + raw)
            out.truncate(8 + len(raw) + offset)  # sparse: takes no room
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (tmp_path / "config.json").write_text(json.dumps(ModelConfig.v3().to_hf()))
    lines, problems = inspect(tmp_path)
    assert problems == []
    assert "91,991 tensors in 163 files" in lines[1]
    assert any("680,571,043,840 bytes" in line for line in lines)
    full = load_pretrained(tmp_path, dtype=torch.bfloat16, device="meta")
    assert sum(p.numel() for p in full.parameters()) == 682_636_472_320
    assert load_layer(tmp_path, 60, device="meta").mlp.experts.up_proj.shape == (256, 2048, 7168)
