"""The official layout, both ways: names, shapes, shards, config.json, and writes cut short."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DeepseekV3Config

from dsv3_mini import shards
from dsv3_mini.checkpoint import (
    INDEX,
    SINGLE,
    CheckpointError,
    load_pretrained,
    named_weights,
    save_pretrained,
)
from dsv3_mini.config import ModelConfig
from dsv3_mini.model import Transformer
from tests.reference.configs import random_config, randomise
from tests.reference.folders import listing

# ModelConfig.tiny(): 2 layers, the first dense, and one MTP layer; typed out, not derived.
ATTENTION = {
    "self_attn.q_a_proj.weight": (24, 32),
    "self_attn.q_a_layernorm.weight": (24,),
    "self_attn.q_b_proj.weight": (24, 24),  # 2 heads of 8 + 4
    "self_attn.kv_a_proj_with_mqa.weight": (20, 32),  # 16 latent, then 4 rotary
    "self_attn.kv_a_layernorm.weight": (16,),
    "self_attn.kv_b_proj.weight": (40, 16),  # 2 heads of 8 key rows and 12 value rows
    "self_attn.o_proj.weight": (32, 24),
    "input_layernorm.weight": (32,),
    "post_attention_layernorm.weight": (32,),
}
DENSE = {
    "mlp.gate_proj.weight": (48, 32),
    "mlp.up_proj.weight": (48, 32),
    "mlp.down_proj.weight": (32, 48),
}
MOE = {
    "mlp.gate.weight": (8, 32),
    "mlp.gate.e_score_correction_bias": (8,),
    **{
        f"mlp.{part}.{name}_proj.weight": (32, 16) if name == "down" else (16, 32)
        for part in ("shared_experts", *(f"experts.{expert}" for expert in range(8)))
        for name in ("gate", "up", "down")
    },
}
MTP = {
    "enorm.weight": (32,),
    "hnorm.weight": (32,),
    "eh_proj.weight": (32, 64),
    "embed_tokens.weight": (128, 32),
    "shared_head.norm.weight": (32,),
    "shared_head.head.weight": (128, 32),
}
STORED: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (128, 32),
    **{f"model.layers.0.{name}": shape for name, shape in {**ATTENTION, **DENSE}.items()},
    **{f"model.layers.1.{name}": shape for name, shape in {**ATTENTION, **MOE}.items()},
    **{f"model.layers.2.{name}": shape for name, shape in {**ATTENTION, **MOE, **MTP}.items()},
    "model.norm.weight": (32,),
    "lm_head.weight": (128, 32),
}

# The config.json that DeepSeek-V3 is released with.
OFFICIAL: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 129280,
}

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
in_both_dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
in_one_file_and_in_many = pytest.mark.parametrize("shard_bytes", [10**9, 20_000], ids=["1", "n"])


def tiny(dtype: torch.dtype = torch.float32, seed: int = 0) -> Transformer:
    return randomise(Transformer(ModelConfig.tiny()), seed).to(dtype).eval()


def stored(folder: Path) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """Name to (file, shape, dtype) in every shard; a tensor stored twice is an error."""
    found: dict[str, tuple[str, tuple[int, ...], str]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 - not a dict
                part = shard.get_slice(name)
                assert name not in found, f"{name} is stored twice"
                found[name] = (path.name, tuple(part.get_shape()), part.get_dtype())
    return found


def assert_same(model: Transformer, other: Transformer) -> None:
    ours, others = model.state_dict(), other.state_dict()
    assert ours.keys() == others.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == others[name].dtype, name
        assert torch.equal(tensor, others[name]), name


@in_one_file_and_in_many
def test_names_and_shapes_are_the_official_ones(tmp_path: Path, shard_bytes: int) -> None:
    save_pretrained(tiny(), tmp_path, max_shard_bytes=shard_bytes)
    assert {name: shape for name, (_, shape, _) in stored(tmp_path).items()} == STORED


@in_both_dtypes
def test_all_is_stored_in_the_models_dtype_but_router_biases(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    save_pretrained(tiny(dtype), tmp_path)
    for name, (_, _, kind) in stored(tmp_path).items():
        biased = name.endswith("e_score_correction_bias")
        assert DTYPES[kind] == (torch.float32 if biased else dtype), name
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["torch_dtype"] == str(dtype).removeprefix("torch.")


@in_both_dtypes
@in_one_file_and_in_many
def test_round_trip_is_exact(tmp_path: Path, dtype: torch.dtype, shard_bytes: int) -> None:
    model = tiny(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_pretrained(model, tmp_path / "new" / "deep", max_shard_bytes=shard_bytes)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    back = load_pretrained(tmp_path / "new" / "deep", dtype=dtype)
    assert back.config == model.config
    assert not back.training
    assert all(parameter.requires_grad for parameter in back.parameters())
    assert_same(model, back)
    with torch.no_grad():
        tokens = torch.arange(12).view(2, 6)
        ours, loaded = model(tokens, mtp=True), back(tokens, mtp=True)
    assert torch.equal(ours.logits, loaded.logits)
    assert torch.equal(ours.mtp_logits[0], loaded.mtp_logits[0])


def test_router_biases_stay_exact_in_a_narrower_dtype(tmp_path: Path) -> None:
    model = tiny()
    save_pretrained(model, tmp_path)
    narrow = load_pretrained(tmp_path, dtype=torch.bfloat16)
    assert_same(narrow, tiny(torch.bfloat16))
    for ours, loaded in zip(model.gates, narrow.gates, strict=True):
        assert loaded.weight.dtype == torch.bfloat16
        bias = loaded.e_score_correction_bias
        assert bias.dtype == torch.float32
        assert not torch.equal(bias, bias.bfloat16().float()), "a bias that bf16 holds says nothing"
        assert torch.equal(bias, ours.e_score_correction_bias)


def test_shards_are_named_and_indexed_as_in_the_official_checkpoint(tmp_path: Path) -> None:
    limit = 20_000
    save_pretrained(tiny(), tmp_path, max_shard_bytes=limit)
    tensors = stored(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["weight_map"] == {name: file for name, (file, _, _) in tensors.items()}
    sizes = {name: 4 * torch.Size(shape).numel() for name, (_, shape, _) in tensors.items()}
    assert index["metadata"] == {"total_size": sum(sizes.values())}
    files = sorted({file for file, _, _ in tensors.values()})
    assert len(files) > 3
    # V3's first is model-00001-of-000163.safetensors: five digits, then six.
    assert files == [
        f"model-{number:05d}-of-{len(files):06d}.safetensors" for number in range(1, len(files) + 1)
    ]
    for file in files:
        assert sum(size for name, size in sizes.items() if tensors[name][0] == file) <= limit
    assert sorted(listing(tmp_path)) == sorted([*files, INDEX, "config.json"])


def test_one_shard_needs_no_index(tmp_path: Path) -> None:
    save_pretrained(tiny(), tmp_path)
    assert sorted(listing(tmp_path)) == ["config.json", SINGLE]


def test_a_tensor_larger_than_a_shard_gets_one_of_its_own(tmp_path: Path) -> None:
    save_pretrained(tiny(), tmp_path, max_shard_bytes=1)
    assert len({file for file, _, _ in stored(tmp_path).values()}) == len(STORED)
    assert_same(tiny(), load_pretrained(tmp_path))


@in_one_file_and_in_many
def test_mtp_can_be_left_out(tmp_path: Path, shard_bytes: int) -> None:
    model = tiny()
    save_pretrained(model, tmp_path, max_shard_bytes=shard_bytes)
    main = load_pretrained(tmp_path, mtp=False)
    assert main.config == model.config.replace(num_nextn_predict_layers=0)
    assert len(main.model.layers) == 2
    kept = {n: t for n, t in model.state_dict().items() if not n.startswith("model.layers.2.")}
    assert main.state_dict().keys() == kept.keys()
    assert all(torch.equal(kept[name], tensor) for name, tensor in main.state_dict().items())


def test_names_without_mtp_are_those_of_the_main_model() -> None:
    """Also the last norm, which comes after the MTP layers."""
    ours = tiny()
    main = [name for name, _ in named_weights(ours) if not name.startswith("model.layers.2.")]
    assert [name for name, _ in named_weights(ours, mtp=False)] == main
    assert main[-1] == "model.norm.weight"
    without = Transformer(ours.config.replace(num_nextn_predict_layers=0))
    assert [name for name, _ in named_weights(without, mtp=False)] == main


@pytest.mark.parametrize("depths", [1, 2])
def test_mtp_shares_embedding_and_head_after_loading(tmp_path: Path, depths: int) -> None:
    config = ModelConfig.tiny().replace(num_nextn_predict_layers=depths)
    save_pretrained(randomise(Transformer(config), 0), tmp_path)
    back = load_pretrained(tmp_path)
    for layer in back.model.layers[-depths:]:
        assert layer.embed_tokens is back.model.embed_tokens
        assert layer.shared_head.head is back.lm_head
    names = [name for name, _ in back.named_parameters()]
    assert not [name for name in names if "shared_head.head" in name]
    assert [name for name in names if name.endswith("embed_tokens.weight")] == [
        "model.embed_tokens.weight"
    ]


@pytest.mark.parametrize("copy", ["embed_tokens", "shared_head.head"])
def test_a_copy_of_another_model_never_replaces_the_main_one(tmp_path: Path, copy: str) -> None:
    """As in a checkpoint whose main model was trained further and whose MTP layer was not."""
    save_pretrained(tiny(), tmp_path)
    tensors = load_file(tmp_path / SINGLE)
    tensors[f"model.layers.2.{copy}.weight"] += 1
    save_file(tensors, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=rf"{copy}.*differs from the main.*mtp=False"):
        load_pretrained(tmp_path)
    main = load_pretrained(tmp_path, mtp=False)
    assert torch.equal(main.model.embed_tokens.weight, tiny().model.embed_tokens.weight)
    assert torch.equal(main.lm_head.weight, tiny().lm_head.weight)


def test_an_older_checkpoint_is_replaced_only_when_told_to(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_pretrained(tiny(), folder, max_shard_bytes=20_000)
    before = listing(tmp_path)
    with pytest.raises(CheckpointError, match=r"not empty.*overwrite=True"):
        save_pretrained(tiny(seed=1), folder)
    assert listing(tmp_path) == before
    save_pretrained(tiny(seed=1), folder, overwrite=True)
    assert sorted(listing(tmp_path)) == ["model", "model/config.json", f"model/{SINGLE}"]
    assert_same(tiny(seed=1), load_pretrained(folder))


@pytest.mark.parametrize("file", ["notes.txt", "config.json"])
def test_what_is_no_checkpoint_is_never_replaced(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_text("{}")
    with pytest.raises(CheckpointError, match="not empty"):
        save_pretrained(tiny(), tmp_path, overwrite=True)
    assert listing(tmp_path) == {file: b"{}"}


FAILURES = [OSError("no space left"), SafetensorError("cannot write"), KeyboardInterrupt()]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
@pytest.mark.parametrize("older", [False, True], ids=["new", "overwrite"])
def test_an_interrupted_write_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, older: bool, failure: BaseException
) -> None:
    folder = tmp_path / "model"
    if older:
        save_pretrained(tiny(), folder)
    before = listing(tmp_path)
    written: list[Path] = []

    def save(tensors: dict[str, Tensor], path: Path, **options: Any) -> None:
        if len(written) == 1:
            raise failure
        save_file(tensors, path, **options)
        written.append(path)

    monkeypatch.setattr(shards, "save_file", save)
    expected = KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else CheckpointError
    with pytest.raises(expected):
        save_pretrained(tiny(seed=1), folder, max_shard_bytes=20_000, overwrite=older)
    assert len(written) == 1, "the first shard was to succeed"
    assert listing(tmp_path) == before
    monkeypatch.undo()
    save_pretrained(tiny(seed=1), folder, overwrite=older)  # nothing is in the way
    assert_same(tiny(seed=1), load_pretrained(folder))


def test_a_rename_that_fails_puts_the_older_checkpoint_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    save_pretrained(tiny(), folder)
    before = listing(tmp_path)
    rename: Callable[[Path, Path], Path] = Path.rename

    def fail_for_the_new_one(path: Path, target: Path) -> Path:
        if path.name.endswith(".writing"):
            raise PermissionError("in use")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new_one)
    with pytest.raises(CheckpointError, match="in use"):
        save_pretrained(tiny(seed=1), folder, overwrite=True)
    assert listing(tmp_path) == before


def test_config_survives_the_official_spelling() -> None:
    for seed in range(200):
        config = random_config(seed)
        assert ModelConfig.from_hf(config.to_hf()) == config
        assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    for config in (ModelConfig.tiny(), ModelConfig.mini(), ModelConfig.gpu(), ModelConfig.v3()):
        assert ModelConfig.from_hf(config.to_hf()) == config


def test_official_config_is_v3(tmp_path: Path) -> None:
    """But for initializer_range: the report trained with 0.006, config.json says 0.02."""
    v3 = ModelConfig.v3().replace(initializer_range=0.02)
    assert ModelConfig.from_hf(OFFICIAL) == v3
    (tmp_path / "config.json").write_text(json.dumps(OFFICIAL))
    assert ModelConfig.from_hf(tmp_path) == v3
    assert ModelConfig.from_hf(str(tmp_path / "config.json")) == v3


def test_what_we_write_is_in_the_official_config() -> None:
    """Same keys, same values; what only a tokenizer, a server or FP8 weights need is left out."""
    written = ModelConfig.v3().replace(initializer_range=0.02).to_hf()
    left_out = {"bos_token_id", "eos_token_id", "ep_size", "quantization_config", "torch_dtype"}
    assert written == {key: OFFICIAL[key] for key in OFFICIAL.keys() - left_out}


@pytest.mark.parametrize("scaled", [True, False])
def test_config_rewritten_by_transformers(tmp_path: Path, scaled: bool) -> None:
    """It moves rope_scaling and rope_theta into ``rope_parameters`` and adds keys of its own."""
    source = OFFICIAL if scaled else {**OFFICIAL, "rope_scaling": None}
    DeepseekV3Config(**copy.deepcopy(source)).save_pretrained(tmp_path)  # it fills in its own
    rewritten = json.loads((tmp_path / "config.json").read_text())
    assert rewritten["rope_parameters"]["rope_type"] == ("yarn" if scaled else "default")
    assert "rope_theta" not in rewritten
    assert not re.search("rope_scaling", json.dumps(rewritten))
    assert ModelConfig.from_hf(tmp_path) == ModelConfig.from_hf(source)
