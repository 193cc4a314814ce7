"""One frozen dataclass describes every model in this project, from a test's to the 671B one.

Why: a learner should be able to go from a two-layer toy to DeepSeek-V3 by changing numbers and
nothing else. So the field names are those of the official ``config.json``, the presets differ by
values only, and whatever cannot work is refused here, before a single tensor exists.

Presets: ``tiny`` (tests), ``mini`` (notebooks, two CPU cores), ``gpu`` (one 24 GB card), ``v3``.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class ConfigError(ValueError):
    """A configuration that cannot describe a model; the message says which field and why."""


def require(name: str, value: Any, low: float, above: bool = False, whole: bool = False) -> None:
    """Raise ConfigError unless ``value`` is finite and at least (or ``above``) ``low``."""
    huge = type(value) is int and abs(value) >= 2**63  # torch counts in 64 bits
    fits = type(value) is int or (isinstance(value, float) and not whole)
    if huge or not (fits and abs(value) < math.inf and (value > low if above else value >= low)):
        kind = f"{'an integer' if whole else 'a number'} {'above' if above else 'of at least'}"
        raise ConfigError(f"{name} is {value!r}; expected {kind} {low}{', below 2**63' * huge}")


@dataclass(frozen=True)
class RopeScaling:
    """YaRN's numbers, under the official names. Source: report 4.3 (s = 40, alpha 1, beta 32)."""

    factor: float = 40.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    def __post_init__(self) -> None:
        lowest = {"factor": 1, "original_max_position_embeddings": 1}
        for field in dataclasses.fields(self):
            name, value = f"rope_scaling.{field.name}", getattr(self, field.name)
            require(name, value, lowest.get(field.name, 0), whole=field.type == "int")
        if not self.beta_fast > self.beta_slow > 0:
            raise ConfigError(
                f"rope_scaling has beta_fast {self.beta_fast} and beta_slow {self.beta_slow}; "
                "expected beta_fast > beta_slow > 0: they count rotations, not indices"
            )


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a DeepSeek-V3 model; the defaults are V3's own (671B). Immutable.

    ``attention="gqa"`` swaps MLA for the yardstick (multi-head, grouped or multi-query by
    ``num_key_value_heads``), with heads of width ``v_head_dim``. Raises ConfigError.
    """

    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 61
    first_k_dense_replace: int = 3
    num_nextn_predict_layers: int = 1

    num_attention_heads: int = 128
    num_key_value_heads: int = 128
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    attention: str = "mla"

    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5

    max_position_embeddings: int = 163840
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = RopeScaling()
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.006

    def __post_init__(self) -> None:
        may_be_zero = {"first_k_dense_replace", "num_nextn_predict_layers", "n_shared_experts"}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" or (field.type == "int | None" and value is not None):
                lowest = 0 if field.name in may_be_zero else 1
                require(field.name, value, lowest, whole=True)
        for name in ("rms_norm_eps", "initializer_range", "routed_scaling_factor"):
            require(name, getattr(self, name), 0, above=True)
        require("rope_theta", self.rope_theta, 1, above=True)
        if type(self.norm_topk_prob) is not bool:
            raise ConfigError(f"norm_topk_prob is {self.norm_topk_prob!r}; expected True or False")
        if self.rope_scaling is not None and not isinstance(self.rope_scaling, RopeScaling):
            raise ConfigError(f"rope_scaling is {self.rope_scaling!r}; expected a RopeScaling")
        self._check_attention()
        self._check_experts()

    def _check_attention(self) -> None:
        if self.attention not in ("mla", "gqa"):
            raise ConfigError(f"attention is {self.attention!r}; expected 'mla' or 'gqa'")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}; each key head serves equally many"
            )
        name, rotated = (
            ("qk_rope_head_dim", self.qk_rope_head_dim)
            if self.attention == "mla"
            else ("v_head_dim", self.v_head_dim)
        )
        if rotated % 2:
            raise ConfigError(f"{name} is {rotated}; expected an even width: RoPE turns pairs")

    def _check_experts(self) -> None:
        if self.first_k_dense_replace > self.num_hidden_layers:
            raise ConfigError(
                f"first_k_dense_replace {self.first_k_dense_replace} exceeds num_hidden_layers "
                f"{self.num_hidden_layers}; at most every layer can be dense"
            )
        if self.n_routed_experts % self.n_group:
            raise ConfigError(
                f"n_routed_experts {self.n_routed_experts} does not divide into n_group "
                f"{self.n_group} equal groups; change one of them"
            )
        if self.topk_group > self.n_group:
            raise ConfigError(
                f"topk_group {self.topk_group} exceeds n_group {self.n_group}, the groups there are"
            )
        group_size = self.n_routed_experts // self.n_group
        if self.topk_group < self.n_group and group_size < 2:
            raise ConfigError(
                f"a group holds {group_size} expert; expected at least 2: groups are ranked "
                "by the sum of their top two (report 2.1.2): use fewer groups or more experts"
            )
        reachable = self.topk_group * group_size
        if self.num_experts_per_tok > reachable:
            raise ConfigError(
                f"num_experts_per_tok {self.num_experts_per_tok} exceeds the {reachable} experts "
                f"in topk_group {self.topk_group} groups of {group_size}; raise topk_group"
            )

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head: 128 + 64 = 192 in V3; the yardstick has v_head_dim."""
        if self.attention == "gqa":
            return self.v_head_dim
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def rotary_dim(self) -> int:
        """How many dimensions of a head RoPE turns: all of them in the yardstick."""
        return self.qk_rope_head_dim if self.attention == "mla" else self.v_head_dim

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed and everything checked again. Raises ConfigError."""
        known = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                close = difflib.get_close_matches(name, known, 1)
                hint = f"; did you mean {close[0]}?" if close else f"; expected one of {known}"
                raise ConfigError(f"unknown field {name!r}{hint}")
        return dataclasses.replace(self, **changes)

    @classmethod
    def tiny(cls) -> ModelConfig:
        """For tests: milliseconds a step, yet 4 groups of which 2 are kept, and top 3 of 8."""
        return cls.mini().replace(
            vocab_size=128, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
            num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, q_lora_rank=24,
            kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=12,
            n_routed_experts=8, num_experts_per_tok=3, max_position_embeddings=128,
        )  # fmt: skip

    @classmethod
    def mini(cls) -> ModelConfig:
        """For notebooks: trains on two CPU cores in about a minute; every V3 mechanism is on."""
        return cls(
            vocab_size=2048, hidden_size=128, intermediate_size=384, moe_intermediate_size=64,
            num_hidden_layers=4, first_k_dense_replace=1, num_attention_heads=4,
            num_key_value_heads=4, q_lora_rank=64, kv_lora_rank=32, qk_nope_head_dim=32,
            qk_rope_head_dim=16, v_head_dim=32, n_routed_experts=16, num_experts_per_tok=4,
            n_group=4, topk_group=2, max_position_embeddings=4096, rope_scaling=None,
            initializer_range=0.02,
        )  # fmt: skip

    @classmethod
    def gpu(cls) -> ModelConfig:
        """For one 24 GB card: about half a billion parameters. Not yet run on a GPU."""
        return cls.mini().replace(
            hidden_size=1024, intermediate_size=2816, moe_intermediate_size=384,
            num_hidden_layers=12, num_attention_heads=16, num_key_value_heads=16, q_lora_rank=384,
            kv_lora_rank=256, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64,
            n_routed_experts=32, n_group=8, topk_group=4,
        )  # fmt: skip

    @classmethod
    def v3(cls) -> ModelConfig:
        """DeepSeek-V3: 671B parameters, 37B active. ``initializer_range`` is the report's 0.006."""
        return cls()

    @classmethod
    def from_hf(cls, source: dict[str, Any] | str | os.PathLike[str]) -> ModelConfig:
        """Read the official ``config.json``: a dict, the file, or the folder that holds it.

        Accepts both spellings of YaRN (``rope_scaling``; ``rope_parameters`` of transformers 5).
        Raises ConfigError on a missing field, a likely misspelling, or a feature V3 does not have.
        """
        hf = dict(source) if isinstance(source, dict) else _read_json(source)
        rope: dict[str, Any] = {}
        for name in ("rope_scaling", "rope_parameters"):
            if not isinstance(part := hf.get(name) or {}, dict):
                raise ConfigError(f"{name} is {part!r}; expected an object with its numbers")
            rope.update(part)
        values: dict[str, Any] = {"rope_theta": rope.get("rope_theta", hf.get("rope_theta"))}
        known = [f.name for f in dataclasses.fields(cls) if f.name not in ("attention",)]
        for name in [name for name in known if name not in ("rope_theta", "rope_scaling")]:
            if name not in hf:
                close = difflib.get_close_matches(name, [k for k in hf if k not in known], 1)
                hint = f"it has {close[0]!r}: a misspelling?" if close else "official ones do"
                raise ConfigError(f"config.json has no {name!r}; {hint}")
            values[name] = hf[name]
        if values["rope_theta"] is None:
            raise ConfigError("config.json has no 'rope_theta' (expected 10000 for DeepSeek-V3)")
        for name, expected in {**_FIXED, "rope_interleave": True}.items():
            if hf.get(name, expected) != expected:
                raise ConfigError(f"{name} is {hf[name]!r}; only {expected!r} is DeepSeek-V3")
        values["rope_scaling"] = _rope_scaling(rope)
        return cls(**values)

    def to_hf(self) -> dict[str, Any]:
        """The official ``config.json`` as a dict; ``from_hf(to_hf())`` gives the same config.

        Raises ConfigError for the yardstick attention, which no DeepSeek checkpoint has.
        """
        if self.attention != "mla":
            raise ConfigError("only attention='mla' has an official layout; this is the yardstick")
        hf = dataclasses.asdict(self)
        del hf["attention"]
        if hf["rope_scaling"] is not None:
            hf["rope_scaling"] = {"type": "yarn", **hf["rope_scaling"]}
        return {"architectures": ["DeepseekV3ForCausalLM"], **_FIXED, **hf}


_FIXED = {
    "model_type": "deepseek_v3",
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "moe_layer_freq": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}


def _read_json(source: object) -> dict[str, Any]:
    if not isinstance(source, str | os.PathLike):
        raise ConfigError(f"source is {source!r}; expected a dict, or the path of a config.json")
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"cannot read {path} ({error}); expected an official config.json"
        ) from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} holds a {type(loaded).__name__}; expected a JSON object")
    return loaded


def _rope_scaling(rope: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type"))
    if kind == "default" or rope.keys() <= {"rope_theta"}:
        return None
    if kind != "yarn":
        raise ConfigError(f"rope scaling type is {kind!r}; DeepSeek-V3 has 'yarn' or none")
    names = [field.name for field in dataclasses.fields(RopeScaling)]
    missing = [n for n in ("factor", "original_max_position_embeddings") if n not in rope]
    if missing:
        raise ConfigError(f"rope_scaling lacks {missing}; YaRN needs both")
    if unknown := sorted(rope.keys() - {*names, "type", "rope_type", "rope_theta"}):
        raise ConfigError(f"rope_scaling has unknown {unknown}; expected some of {names}")
    return RopeScaling(**{name: rope[name] for name in names if name in rope})
