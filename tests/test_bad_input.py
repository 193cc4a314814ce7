"""Wrong calls, one a row: each must be refused by name, and leave everything as it was.

A learner's mistake should be answered in the learner's words. So an error must be a ValueError (or
a subclass that the module names), raised by a ``raise`` of this package rather than somewhere
inside torch, and its message must say what was wrong and what was expected.
"""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import dsv3_mini
from dsv3_mini.balance import (
    batch_balance_loss,
    max_violation,
    sequence_balance_loss,
    update_bias,
)
from dsv3_mini.cache import Cache, CacheError
from dsv3_mini.checkpoint import INDEX, SINGLE, CheckpointError, load_pretrained, save_pretrained
from dsv3_mini.config import ConfigError, ModelConfig, RopeScaling
from dsv3_mini.generate import generate
from dsv3_mini.model import Transformer
from dsv3_mini.mtp import mtp_loss
from tests.reference.folders import listing

PACKAGE = Path(dsv3_mini.__file__).parent
SHORTEST_MESSAGE = 40

# The error's type, what is wrong, the call, and words that its message must contain.
Row = tuple[type[ValueError], str, Callable[[], object], tuple[str, ...]]

TINY = ModelConfig.tiny()  # 2 heads, 8 experts in 4 groups of which 2 are kept, top 3
TOKENS = torch.arange(8).view(2, 4)
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@functools.cache
def model(**changes: Any) -> Transformer:
    return Transformer(TINY.replace(**changes)).eval()


def changed(**changes: Any) -> Callable[[], object]:
    return lambda: TINY.replace(**changes)


def scaling(**changes: Any) -> Callable[[], object]:
    return lambda: RopeScaling(**changes)


def official(without: str | None = None, **changes: Any) -> Callable[[], object]:
    """Read tiny's official config with fields changed and one left out."""
    hf = {name: value for name, value in TINY.to_hf().items() if name != without}
    return lambda: ModelConfig.from_hf({**hf, **changes})


CONFIG: list[Row] = [
    (ConfigError, name, call, words)
    for name, call, words in [
        ("integer is 0", changed(hidden_size=0), ("hidden_size is 0", "at least 1")),
        ("integer is negative", changed(n_group=-1), ("n_group is -1", "at least 1")),
        ("float for integer", changed(hidden_size=32.0), ("hidden_size is 32.0", "an integer")),
        ("bool for integer", changed(kv_lora_rank=True), ("kv_lora_rank is True", "an integer")),
        ("string for integer", changed(vocab_size="128"), ("vocab_size is '128'", "an integer")),
        ("None for integer", changed(v_head_dim=None), ("v_head_dim is None", "an integer")),
        ("float for optional", changed(q_lora_rank=1.5), ("q_lora_rank is 1.5", "an integer")),
        ("string for number", changed(rope_theta="1e4"), ("rope_theta is '1e4'", "a number")),
        ("None for number", changed(rms_norm_eps=None), ("rms_norm_eps is None", "a number")),
        ("bool for number", changed(rope_theta=True), ("rope_theta is True", "a number")),
        ("number is 0", changed(rms_norm_eps=0.0), ("rms_norm_eps is 0.0", "above 0")),
        ("rope_theta is 1", changed(rope_theta=1.0), ("rope_theta is 1.0", "above 1")),
        ("infinity", changed(routed_scaling_factor=math.inf), ("routed_scaling_factor is inf",)),
        ("not a number", changed(initializer_range=math.nan), ("initializer_range is nan",)),
        ("string for bool", changed(norm_topk_prob="yes"), ("norm_topk_prob is 'yes'", "True")),
        ("dict for RopeScaling", changed(rope_scaling=YARN), ("expected a RopeScaling",)),
        ("unknown attention", changed(attention="mha"), ("'mha'", "'mla' or 'gqa'")),
        ("heads not shared out", changed(num_key_value_heads=4), ("num_key_value_heads 4",)),
        ("odd rotary width", changed(qk_rope_head_dim=3), ("qk_rope_head_dim is 3", "even")),
        ("odd gqa head", changed(attention="gqa", v_head_dim=7), ("v_head_dim is 7", "even")),
        ("too many dense layers", changed(first_k_dense_replace=3), ("exceeds num_hidden_layers",)),
        ("unequal groups", changed(n_routed_experts=9), ("n_routed_experts 9", "n_group 4")),
        ("more groups kept than exist", changed(topk_group=5), ("topk_group 5", "n_group 4")),
        ("groups of one expert", changed(n_group=8), ("1 expert", "top two")),
        ("too many chosen", changed(num_experts_per_tok=5), ("num_experts_per_tok 5", "the 4")),
        ("misspelled field", changed(hiden_size=3), ("'hiden_size'", "did you mean hidden_size?")),
        ("unknown field", changed(dropout=0.1), ("'dropout'", "expected one of", "vocab_size")),
        ("YaRN shrinks", scaling(factor=0.5), ("factor is 0.5", "at least 1")),
        ("YaRN factor is a string", scaling(factor="40"), ("factor is '40'", "a number")),
        ("YaRN factor is infinite", scaling(factor=math.inf), ("factor is inf", "a number")),
        ("YaRN length is a float", scaling(original_max_position_embeddings=4096.0), ("4096.0",)),
        ("YaRN betas in wrong order", scaling(beta_fast=0.5), ("beta_fast 0.5", "rotations")),
        ("YaRN beta_slow is 0", scaling(beta_slow=0), ("beta_slow 0", "> 0")),
        ("YaRN mscale is negative", scaling(mscale=-1.0), ("mscale is -1.0", "at least 0")),
        ("YaRN mscale is no number", scaling(mscale_all_dim=math.nan), ("mscale_all_dim is nan",)),
        ("no dict and no path", lambda: ModelConfig.from_hf(3), ("source is 3", "a dict")),
        ("no such file", lambda: ModelConfig.from_hf("no/config.json"), ("no/config.json",)),
        ("no JSON", lambda: ModelConfig.from_hf(__file__), ("cannot read", "config.json")),
        ("field missing", official(without="n_group"), ("has no 'n_group'",)),
        (
            "field misspelled",
            official(without="v_head_dim", v_heads_dim=12),
            ("has no 'v_head_dim'", "'v_heads_dim': a misspelling?"),
        ),
        ("rope_theta missing", official(without="rope_theta"), ("no 'rope_theta'", "10000")),
        ("official float", official(hidden_size=32.0), ("hidden_size is 32.0", "an integer")),
        ("another activation", official(hidden_act="gelu"), ("hidden_act is 'gelu'", "'silu'")),
        ("another model", official(model_type="llama"), ("'llama'", "'deepseek_v3'")),
        ("softmax scores", official(scoring_func="softmax"), ("'softmax'", "'sigmoid'")),
        ("V2's routing", official(topk_method="greedy"), ("'greedy'", "'noaux_tc'")),
        ("tied embeddings", official(tie_word_embeddings=True), ("tie_word_embeddings is True",)),
        ("half-split rotary pairs", official(rope_interleave=False), ("rope_interleave is False",)),
        ("linear", official(rope_scaling={**YARN, "type": "linear"}), ("'linear'", "'yarn'")),
        ("scaling of no type", official(rope_scaling={"factor": 4.0}), ("type is None", "'yarn'")),
        ("scaling without factor", official(rope_scaling={"type": "yarn"}), ("lacks", "'factor'")),
        ("scaling misspelled", official(rope_scaling={**YARN, "beta_fest": 9}), ("'beta_fest'",)),
        ("scaling is a string", official(rope_scaling="yarn"), ("rope_scaling is 'yarn'",)),
        ("scaled by a string", official(rope_scaling={**YARN, "factor": "4"}), ("factor is '4'",)),
        ("official gqa", lambda: model(attention="gqa").config.to_hf(), ("attention='mla'",)),
    ]
]


def run(tokens: Any = TOKENS, cache: Any = None, mtp: bool = False) -> object:
    return model()(tokens, cache, mtp)


def new_cache(batch: Any = 2, max_len: Any = 8, mtp: bool = False, **changes: Any) -> Cache:
    return model(**changes).new_cache(batch, max_len, mtp)


def with_gradients() -> object:
    with torch.enable_grad():
        return run(cache=new_cache())


def mtp_after(spoil: Callable[[Cache], object]) -> Callable[[], object]:
    """Three tokens, something that leaves MTP behind, and then another with MTP."""

    def call() -> object:
        cache = new_cache(mtp=True)
        run(TOKENS[:, :3], cache, mtp=True)
        spoil(cache)
        return run(TOKENS[:, :1], cache, mtp=True)

    return call


MODEL: list[Row] = [
    (ValueError, name, call, words)
    for name, call, words in [
        ("a list of tokens", lambda: run([[1, 2]]), ("a list", "integer tensor (batch, seq)")),
        ("no batch dimension", lambda: run(TOKENS[0]), ("(4,)", "(batch, seq)", "tokens[None]")),
        ("three dimensions", lambda: run(TOKENS[None]), ("(1, 2, 4)", "(batch, seq)")),
        ("float tokens", lambda: run(TOKENS.float()), ("torch.float32", "integer")),
        ("bool tokens", lambda: run(TOKENS.bool()), ("torch.bool", "integer")),
        ("no tokens", lambda: run(TOKENS[:, :0]), ("empty", "(2, 0)", "at least one")),
        ("no sequences", lambda: run(TOKENS[:0]), ("empty", "(0, 4)", "at least one")),
        ("token too large", lambda: run(TOKENS + 124), ("token 131", "0 .. 127", "tokenizer")),
        ("token negative", lambda: run(TOKENS - 1), ("token -1", "0 .. 127", "tokenizer")),
        ("too many tokens", lambda: run(TOKENS.repeat(1, 33)), ("position 131", "embeddings 128")),
        (
            "MTP of a model without",
            lambda: model(num_nextn_predict_layers=0)(TOKENS, mtp=True),
            ("num_nextn_predict_layers is 0", "no MTP"),
        ),
        (
            "loads of no layer",
            lambda: model(first_k_dense_replace=2)(TOKENS).router_counts,
            ("no layer", "experts", "first_k_dense_replace"),
        ),
    ]
]

CACHE: list[Row] = [
    (CacheError, name, call, words)
    for name, call, words in [
        ("batch is 0", lambda: new_cache(0), ("batch 0", "two integers >= 1")),
        ("max_len is 0", lambda: new_cache(2, 0), ("max_len 0", "two integers >= 1")),
        ("max_len is a float", lambda: new_cache(2, 8.0), ("max_len 8.0", "integers")),
        ("batch is a string", lambda: new_cache("2"), ("batch '2'", "integers")),
        ("max_len is a string", lambda: new_cache(2, "8"), ("max_len '8'", "integers")),
        ("max_len is too long", lambda: new_cache(2, 129), ("max_len 129", "embeddings 128")),
        ("True for a cache", lambda: run(cache=True), ("cache is a bool", "new_cache")),
        ("cache too short", lambda: run(cache=new_cache(2, 3)), ("4 new", "max_len 3", "longer")),
        ("cache of another batch", lambda: run(cache=new_cache(1)), ("batch 2", "made for 1")),
        (
            "cache of more layers",
            lambda: run(cache=new_cache(num_hidden_layers=3)),
            ("3 layers", "the model 2", "new_cache"),
        ),
        (
            "cache of a wider latent",
            lambda: run(cache=new_cache(kv_lora_rank=20)),
            ("(2, 4, 20)", "(2, 4, 24)", "another model", "new_cache"),
        ),
        (
            "cache of other heads",
            lambda: run(cache=new_cache(attention="gqa", num_key_value_heads=1)),
            ("(2, 2, 4, 12)", "(2, 1, 4, 12)", "another model"),
        ),
        (
            "latent cache for the yardstick",
            lambda: model(attention="gqa")(TOKENS, new_cache()),
            ("(2, 2, 4, 12)", "(2, 4, 20)", "another model"),
        ),
        (
            "cache of more key heads",
            lambda: model(attention="gqa", num_key_value_heads=1)(
                TOKENS, new_cache(attention="gqa")
            ),
            ("(2, 1, 4, 12)", "(2, 2, 4, 12)", "another model"),
        ),
        ("cache with gradients", with_gradients, ("gradients", "torch.no_grad()")),
        (
            "cache of another dtype",
            lambda: run(cache=Transformer(TINY).double().new_cache(2, 8)),
            ("torch.float64", "torch.float32", "after moving"),
        ),
        ("truncate to more", lambda: new_cache().truncate(1), ("to 1", "0 to 0 tokens")),
        ("truncate to less than none", lambda: new_cache().truncate(-1), ("to -1", "0 to 0")),
        ("truncate to a float", lambda: new_cache().truncate(0.0), ("to 0.0", "0 to 0")),
        ("truncate to None", lambda: new_cache().truncate(None), ("to None", "0 to 0")),
        ("MTP without cache", lambda: run(cache=new_cache(), mtp=True), ("mtp=True", "new_cache")),
        ("MTP after truncate", mtp_after(lambda c: c.truncate(2)), ("depth 1", "truncate", "new")),
        (
            "MTP after a step without",
            mtp_after(lambda c: run(TOKENS[:, :1], c)),
            ("depth 1", "mtp=False", "every call"),
        ),
    ]
]


def sample(prompt: Any = (1, 2), tokens: Any = 3, **options: Any) -> Callable[[], object]:
    return lambda: generate(model(), prompt, tokens, **options)


GENERATION: list[Row] = [
    (ValueError, name, call, words)
    for name, call, words in [
        ("no new token", sample(tokens=0), ("max_new_tokens is 0", "integer >= 1")),
        ("half a token", sample(tokens=1.5), ("max_new_tokens is 1.5", "integer >= 1")),
        ("a string of tokens", sample(tokens="3"), ("max_new_tokens is '3'", "integer >= 1")),
        ("empty prompt", sample([]), ("(1, 0)", "at least one integer token")),
        ("text for a prompt", sample("hello"), ("prompt", "str", "integer tokens")),
        ("words for a prompt", sample(["a", "b"]), ("prompt", "str", "integer tokens")),
        ("None for a prompt", sample(None), ("prompt", "None", "integer tokens")),
        ("ragged prompt", sample([[1], [1, 2]]), ("prompt", "length 1", "integer tokens")),
        ("float prompt", sample([1.0]), ("torch.float32", "integer token")),
        ("bool prompt", sample([True]), ("torch.bool", "integer token")),
        ("prompt of three dimensions", sample([[[1]]]), ("(1, 1, 1)", "(batch, seq)")),
        ("prompt of another vocabulary", sample([128]), ("token 128", "tokenizer")),
        ("negative temperature", sample(temperature=-1), ("temperature is -1", "0 (greedy)")),
        ("no temperature", sample(temperature=math.nan), ("temperature is nan", "0 (greedy)")),
        ("endless temperature", sample(temperature=math.inf), ("temperature is inf", "0 (greedy)")),
        ("temperature in words", sample(temperature="hot"), ("temperature is 'hot'",)),
        ("float seed", sample(temperature=1.0, seed=0.5), ("seed is 0.5", "integer")),
        ("impossible stop token", sample(stop_token=128), ("stop_token is 128", "0 to 127")),
        ("text as stop token", sample(stop_token="."), ("stop_token is '.'", "0 to 127")),
    ]
]
GENERATION.append(
    (CacheError, "more than fits", sample(tokens=128), ("max_len 129", "embeddings 128"))
)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


def chosen(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


LOSSES: list[Row] = [
    (ValueError, name, call, words)
    for name, call, words in [
        ("load of other experts", lambda: update_bias(ones(8), ones(7), 0.1), ("(7,)", "(8,)")),
        ("bias of one layer", lambda: update_bias(ones(8), ones(2, 8), 0.1), ("(2, 8)", "(8,)")),
        ("negative step", lambda: update_bias(ones(8), ones(8), -0.1), ("gamma is -0.1", ">= 0")),
        ("no step", lambda: update_bias(ones(8), ones(8), math.nan), ("gamma is nan", ">= 0")),
        ("load of nobody", lambda: max_violation(0 * ones(2, 8)), ("all zero", "at least one")),
        (
            "scores without batch",
            lambda: sequence_balance_loss(ones(4, 8), chosen(4, 3)),
            ("(4, 8)", "(4, 3)", "(batch, seq, experts)"),
        ),
        (
            "scores of other tokens",
            lambda: sequence_balance_loss(ones(1, 4, 8), chosen(1, 5, 3)),
            ("(1, 4, 8)", "(1, 5, 3)", "(batch, seq, chosen)"),
        ),
        (
            "more chosen than there are",
            lambda: sequence_balance_loss(ones(1, 4, 8), chosen(1, 4, 9)),
            ("(1, 4, 8)", "(1, 4, 9)"),
        ),
        (
            "gates for indices",
            lambda: sequence_balance_loss(ones(1, 4, 8), ones(1, 4, 3)),
            ("torch.float32 indices", "int64"),
        ),
        (
            "batch-wise scores of one token",
            lambda: batch_balance_loss(ones(8), chosen(3)),
            ("(8,)", "(3,)", "(batch, seq, experts)"),
        ),
        (
            "targets one column short",
            lambda: mtp_loss(model()(TOKENS, mtp=True).mtp_logits, TOKENS),
            ("depth 1", "(2, 3)", "(2, 2)", "T + 1 tokens"),
        ),
        (
            "targets of another batch",
            lambda: mtp_loss([ones(1, 2, 128)], TOKENS),
            ("depth 1", "(1, 2)", "(2, 2)", "(batch, T - 1)"),
        ),
        ("targets, no batch", lambda: mtp_loss([ones(1, 2, 8)], TOKENS[0]), ("(4,)", "(batch,")),
        ("float targets", lambda: mtp_loss([ones(2, 2, 8)], TOKENS.float()), ("float32", "int64")),
    ]
]

TRAINING: list[Row] = []  # errors of train, data and resume

ROWS = [*CONFIG, *MODEL, *CACHE, *GENERATION, *LOSSES, *TRAINING]


def assert_refused(
    call: Callable[[], object], kind: type[ValueError], words: tuple[str, ...]
) -> None:
    with pytest.raises(kind) as caught, torch.no_grad():
        call()
    message = str(caught.value)
    assert type(caught.value) is kind
    assert [word for word in words if word not in message] == [], message
    assert len(message) >= SHORTEST_MESSAGE, message
    innermost = traceback.extract_tb(caught.value.__traceback__)[-1]
    assert Path(innermost.filename).is_relative_to(PACKAGE), innermost
    assert (innermost.line or "").startswith("raise "), f"not raised on purpose: {innermost}"


@pytest.mark.parametrize(
    ("kind", "call", "words"),
    [pytest.param(kind, call, words, id=name) for kind, name, call, words in ROWS],
)
def test_a_wrong_call_is_refused(
    kind: type[ValueError], call: Callable[[], object], words: tuple[str, ...]
) -> None:
    assert_refused(call, kind, words)


def test_every_row_has_a_name_of_its_own() -> None:
    names = [*(row[1] for row in ROWS), *(row[0] for row in (*BAD_CONFIGS, *BAD_FOLDERS, *SAVES))]
    assert len(set(names)) == len(names) >= 60


@pytest.mark.parametrize(
    "bad",
    [TOKENS + 124, TOKENS[:1], TOKENS.repeat(1, 2), TOKENS.float()],
    ids=["another vocabulary", "another batch", "too many", "floats"],
)
@torch.no_grad()
def test_a_refused_call_leaves_the_cache_usable(bad: Tensor) -> None:
    cache = new_cache(mtp=True)
    model()(TOKENS, cache, mtp=True)
    before = [store.clone() for each in (cache, *cache.mtp) for store in each.stores]
    with pytest.raises(ValueError, match="tok"):
        model()(bad, cache, mtp=True)
    after = [store for each in (cache, *cache.mtp) for store in each.stores]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert (cache.length, cache.mtp[0].length) == (4, 3)
    continued = model()(TOKENS, cache, mtp=True)
    whole = model()(TOKENS.repeat(1, 2), mtp=True)
    torch.testing.assert_close(continued.logits, whole.logits[:, 4:])
    torch.testing.assert_close(continued.mtp_logits[0], whole.mtp_logits[0][:, 3:])


# ---------------------------------------------------------------------------------- checkpoints

SOME = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two good checkpoints to spoil copies of: ``one`` file, and ``many`` shards."""
    folder = tmp_path_factory.mktemp("written")
    save_pretrained(model(), folder / "one")
    save_pretrained(model(), folder / "many", max_shard_bytes=20_000)
    return folder


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    """Spoil the tensors of a checkpoint in one file."""

    def spoil(folder: Path) -> None:
        held = load_file(folder / SINGLE)
        change(held)
        save_file(held, folder / SINGLE)

    return spoil


def store(tensor: Tensor) -> Callable[[Path], object]:
    return tensors(lambda held: held.update({SOME: tensor}))


def index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Spoil the index of a checkpoint in many shards."""

    def spoil(folder: Path) -> None:
        held = json.loads((folder / INDEX).read_text())
        change(held)
        (folder / INDEX).write_text(json.dumps(held))

    return spoil


def place(name: str, file: object) -> Callable[[Path], object]:
    return index(lambda held: held["weight_map"].update({name: file}))


def config(**changes: Any) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        held = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**held, **changes}))

    return spoil


def shard(folder: Path, number: int = 2) -> Path:
    return sorted(folder.glob("*.safetensors"))[number - 1]


def cut(length: int) -> Callable[[Path], object]:
    """Keep the first ``length`` bytes of the second shard (a negative one counts from the end)."""
    return lambda folder: shard(folder).write_bytes(shard(folder).read_bytes()[:length])


def a_file_instead(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("model")


def a_folder_instead(name: str) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return spoil


def drop_mtp(held: dict[str, Tensor]) -> None:
    for name in [name for name in held if name.startswith("model.layers.2.")]:
        del held[name]


Damage = tuple[str, str, Callable[[Path], object], tuple[str, ...]]

BAD_CONFIGS: list[Damage] = [
    ("no config", "one", lambda f: (f / "config.json").unlink(), ("config.json", "No such file")),
    ("config is a folder", "one", a_folder_instead("config.json"), ("config.json", "directory")),
    ("config is no JSON", "one", lambda f: (f / "config.json").write_text("{"), ("cannot read",)),
    ("config is no text", "one", lambda f: (f / "config.json").write_bytes(b"\xff"), ("utf-8",)),
    ("config is a list", "one", lambda f: (f / "config.json").write_text("[]"), ("a list",)),
    ("config of no model", "one", config(n_group=3), ("n_routed_experts 8", "n_group 3")),
]

BAD_FOLDERS: list[Damage] = [
    ("no folder", "one", shutil.rmtree, ("one is not a folder", "config.json")),
    ("file for folder", "one", a_file_instead, ("one is not a folder", "config.json")),
    ("config of more experts", "one", config(n_routed_experts=16), ("48 tensors", "(8, 32)")),
    ("config of countless experts", "one", config(n_routed_experts=60_000), ("120000 experts",)),
    ("config of fewer layers", "one", config(num_hidden_layers=1), ("not expected", "layers.2.")),
    ("no weights", "one", lambda f: (f / SINGLE).unlink(), (f"has no {SINGLE}", "missing shard")),
    ("missing shard", "many", lambda f: shard(f).unlink(), ("has no model-00002-of-", "fetch")),
    ("shard is a folder", "many", lambda f: a_folder_instead(shard(f).name)(f), ("has no model",)),
    *(
        (f"shard cut to {length} bytes", "many", cut(length), ("model-00002-of-", "truncated"))
        for length in (0, 5, 8, 100, -1)
    ),
    ("shard of noise", "many", lambda f: shard(f).write_bytes(b"\xff" * 99), ("00002", "damaged")),
    ("missing tensor", "one", tensors(lambda held: held.pop(SOME)), ("missing", SOME)),
    ("extra tensor", "one", tensors(lambda held: held.update(x=ones(1))), ("not expected", "x")),
    ("wrong shape", "one", store(ones(16, 31)), (SOME, "(16, 32)")),
    ("transposed", "one", store(ones(32, 16)), (SOME, "(16, 32)")),
    ("wrong dtype", "one", store(chosen(16, 32)), (SOME, "I64", "BF16")),
    ("no MTP layer", "one", tensors(drop_mtp), ("missing 44 tensors", "mtp=False")),
    ("index is no JSON", "many", lambda f: (f / INDEX).write_text("?"), (INDEX, "damaged")),
    ("index is a folder", "many", a_folder_instead(INDEX), (INDEX, "damaged")),
    (
        "index without map",
        "many",
        index(lambda held: held.pop("weight_map")),
        (INDEX, "weight_map"),
    ),
    ("index is a list", "many", index(lambda held: held.update(weight_map=[])), (INDEX, "damaged")),
    ("index with a number", "many", place(SOME, 2), (INDEX, "damaged")),
    ("index leads outside", "many", place(SOME, "../x"), ("'../x'", "inside the folder")),
    ("index leads to root", "many", place(SOME, "/etc/passwd"), ("'/etc/passwd'", "inside")),
    ("index leads to parent", "many", place(SOME, ".."), ("..", "missing shard")),
    (
        "index names the wrong file",
        "many",
        lambda f: place("lm_head.weight", shard(f).name)(f),
        ("lm_head.weight", "in files that lack them"),
    ),
    (
        "index names an unknown tensor",
        "many",
        lambda f: place("model.x", shard(f).name)(f),
        ("model.x", "in files that lack them"),
    ),
]


@pytest.mark.parametrize(
    ("kind", "which", "spoil", "words"),
    [
        pytest.param(kind, *row[1:], id=row[0])
        for kind, rows in ((ConfigError, BAD_CONFIGS), (CheckpointError, BAD_FOLDERS))
        for row in rows
    ],
)
def test_a_spoiled_checkpoint_is_refused(
    written: Path,
    tmp_path: Path,
    kind: type[ValueError],
    which: str,
    spoil: Callable[[Path], object],
    words: tuple[str, ...],
) -> None:
    folder = tmp_path / which
    shutil.copytree(written / which, folder)
    assert load_pretrained(folder).config == TINY, "it was good before"
    spoil(folder)
    before = listing(tmp_path)
    assert_refused(lambda: load_pretrained(folder), kind, words)
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": torch.int8}, ("dtype is torch.int8", "floating-point")),
        ({"dtype": torch.float8_e4m3fn}, ("dtype is torch.float8_e4m3fn", "floating-point")),
        ({"dtype": "bfloat16"}, ("dtype is bfloat16", "floating-point")),
        ({"device": "gpu"}, ("'gpu'", "expected a device")),
    ],
    ids=str,
)
def test_a_good_checkpoint_is_not_loaded_into_nonsense(
    written: Path, options: dict[str, Any], words: tuple[str, ...]
) -> None:
    assert_refused(lambda: load_pretrained(written / "one", **options), CheckpointError, words)


def read_only(folder: Path) -> Path:
    if os.geteuid() == 0:
        pytest.skip("root may write to a read-only folder")
    folder.chmod(0o500)
    return folder / "model"


def beside(name: str, content: str = "{}") -> Callable[[Path], Path]:
    """Put a file into the folder and give the folder itself as target."""

    def prepare(folder: Path) -> Path:
        (folder / name).write_text(content)
        return folder

    return prepare


def below_a_file(folder: Path) -> Path:
    return beside("file")(folder) / "file" / "model"


SAVES: list[tuple[str, Callable[[Path], Path], dict[str, Any], tuple[str, ...]]] = [
    ("target is a file", lambda f: beside("file")(f) / "file", {}, ("is a file", "new folder")),
    ("parent is a file", below_a_file, {}, ("cannot write", "may write")),
    ("parent is read-only", read_only, {}, ("cannot write", "Permission denied", "may write")),
    ("target is not empty", beside("notes.txt"), {}, ("is not empty", "overwrite=True")),
    ("target is a checkpoint", beside(SINGLE), {}, ("is not empty", "overwrite=True")),
    ("target is something else", beside("config.json"), {"overwrite": True}, ("is not empty",)),
    ("target has no name", lambda f: Path("/"), {}, ("has no name", "new folder")),
    ("shards of no bytes", lambda f: f / "model", {"max_shard_bytes": 0}, ("is 0", "integer >= 1")),
    ("shard in words", lambda f: f / "model", {"max_shard_bytes": "4GB"}, ("'4GB'", "integer")),
]


@pytest.mark.parametrize(
    ("prepare", "options", "words"), [pytest.param(*row[1:], id=row[0]) for row in SAVES]
)
def test_a_wrong_target_is_refused_and_nothing_written(
    tmp_path: Path,
    prepare: Callable[[Path], Path],
    options: dict[str, Any],
    words: tuple[str, ...],
) -> None:
    target = prepare(tmp_path)
    before = listing(tmp_path)
    assert_refused(lambda: save_pretrained(model(), target, **options), CheckpointError, words)
    assert listing(tmp_path) == before


def test_the_yardstick_is_not_saved(tmp_path: Path) -> None:
    yardstick = model(attention="gqa")
    assert_refused(
        lambda: save_pretrained(yardstick, tmp_path / "x"), ConfigError, ("attention='mla'",)
    )
    assert listing(tmp_path) == {}
