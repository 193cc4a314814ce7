"""Races of single layers: MoE against plain matrix products, MLA at V3's width against others."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV3Config, DynamicCache
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as reference

from dsv3_mini.config import ModelConfig
from dsv3_mini.measure import DecodeLayer, kinds
from dsv3_mini.mla import MultiHeadLatentAttention
from dsv3_mini.moe import MoE
from dsv3_mini.rope import rope_table
from tests.bench.implementations import (
    DEFAULT,
    EAGER,
    OURS,
    PATHS,
    assert_same,
    their_latents,
)
from tests.bench.official import OfficialDecode
from tests.bench.plan import MLA_RACE, MOE_SIZE, Plan, mla_size, moe_config, moe_name
from tests.bench.products import PRODUCTS, products_alone
from tests.bench.timing import Entrant, Race, run_race, say
from tests.reference.theirs import remembering

LIMIT, OFFICIAL = "matmul limit", "official einsums"


def their_config(config: ModelConfig) -> Any:
    """transformers' config of the same sizes, on the paths it chooses by itself."""
    theirs = DeepseekV3Config.from_dict(config.to_hf())
    theirs._attn_implementation, theirs._experts_implementation = PATHS[DEFAULT]
    return theirs


# ------------------------------------------------------------------------------------------ MoE


def make_moe(config: ModelConfig) -> MoE:
    """Our layer with random weights of standard deviation 0.02, as a fresh model has them."""
    torch.manual_seed(0)
    layer = MoE(config)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=config.initializer_range)
    return layer.requires_grad_(False)


def their_moe(ours: MoE, config: ModelConfig) -> Any:
    """transformers' layer with the same weights; it stores gate and up projection as one."""
    theirs = reference.DeepseekV3MoE(their_config(config)).requires_grad_(False)
    weights = ours.state_dict()
    both = [weights.pop(f"experts.{name}_proj") for name in ("gate", "up")]
    theirs.load_state_dict({**weights, "experts.gate_up_proj": torch.cat(both, dim=1)})
    return theirs


def matmul_limit(config: ModelConfig, x_ND: Tensor) -> Entrant:
    """The products of the same operations and nothing else: no router, no sorting, no SwiGLU.

    Many tokens: each of three products with one expert's weights, over a row for every choice.
    One token: its experts' weights side by side, since reading them is what takes the time.
    """
    chosen, inner = config.num_experts_per_tok, config.moe_intermediate_size
    if len(x_ND) == 1:
        inner, rows = inner * (chosen + config.n_shared_experts), [x_ND]
    else:
        rows = [x_ND.repeat(chosen, 1), *[x_ND] * config.n_shared_experts]
    gate_DF, up_DF = (torch.randn(x_ND.shape[1], inner) for _ in range(2))
    down_FD = torch.randn(inner, x_ND.shape[1])
    between = [torch.randn(len(part), inner) for part in rows]

    def run() -> None:
        for part, hidden in zip(rows, between, strict=True):
            part @ gate_DF, part @ up_DF, hidden @ down_FD

    return Entrant(run)


@torch.no_grad()
def moe_races(plan: Plan, threads: list[int]) -> list[Race]:
    """One MoE layer for every number of experts and tokens."""
    races = []
    for experts in plan.experts:
        config = moe_config(experts)
        ours = make_moe(config)
        theirs = their_moe(ours, config)
        for tokens in plan.moe_tokens:
            x = torch.randn(1, tokens, config.hidden_size)
            entrants = {OURS: Entrant(partial(ours, x))}
            for name in (DEFAULT, EAGER):
                on_path = partial(setattr, theirs.config, "_experts_implementation", PATHS[name][1])
                entrants[name] = Entrant(partial(theirs, x), on_path)
                on_path()
                assert_same(ours(x)[0], theirs(x), f"MoE layer of {experts} experts, {name}")
            entrants[LIMIT] = matmul_limit(config, x[0])
            entrants[PRODUCTS], launches = products_alone(entrants[OURS])
            for count in threads:
                torch.set_num_threads(count)
                race = Race(
                    moe_name(tokens), MOE_SIZE, experts, "experts", count, launches=launches
                )
                races.append(run_race(race, entrants, plan.pace))
    return races


# ------------------------------------------------------------------------------------------ MLA


class MLA:
    """One attention layer three times over the same weights and, at first, the same cache."""

    def __init__(self, config: ModelConfig, max_context: int) -> None:
        self.ours = DecodeLayer(kinds(config, 1)["MLA, absorbed"], max_context)
        self.config = self.ours.config
        layer, (store,) = self.ours.layer, self.ours.cache.stores
        assert isinstance(layer, MultiHeadLatentAttention)
        self.latents_BTK = store[0]
        self.official = OfficialDecode(layer, self.latents_BTK)
        with torch.device("meta"):
            self.theirs = reference.DeepseekV3Attention(their_config(self.config), 0)
        self.theirs.load_state_dict(layer.state_dict(), assign=True)  # shared, not copied
        self.their_cache = DynamicCache()

    def tables(self, context: int) -> tuple[Tensor, Tensor]:
        """cos and sin for the token after ``context``."""
        return rope_table(self.config, context, 1, "cpu")

    def their_step(self, context: int) -> Tensor:
        """transformers' layer: keys and values of all heads and tokens, from the latents."""
        cos, sin = (torch.cat((table, table), dim=-1)[None] for table in self.tables(context))
        return self.theirs(self.ours.x, (cos, sin), None, **remembering(self.their_cache))[0]

    def official_step(self, context: int) -> Tensor:
        """The einsums of ``official``."""
        return self.official.step(self.ours.x, torch.complex(*self.tables(context)), context)

    def put_back(self, context: int) -> None:
        """transformers' cache holds ``context`` tokens; the others are told where they are."""
        if self.their_cache.get_seq_length() > context:
            self.their_cache.crop(context - self.their_cache.get_seq_length())
        elif self.their_cache.get_seq_length() < context:
            self.their_cache = DynamicCache()
            held = their_latents(self.latents_BTK[:, :context], self.config)
            self.their_cache.update(*held, 0)


@torch.no_grad()
def mla_races(plan: Plan, threads: list[int]) -> list[Race]:
    """One layer's decode step; contexts must ascend. Few repeats: transformers takes seconds."""
    if not plan.mla_contexts:
        return []
    say(f"one MLA layer of hidden {plan.mla.hidden_size:,}: making weights and caches")
    torch.manual_seed(0)
    layer, races = MLA(plan.mla, max(plan.mla_contexts)), []
    for context in plan.mla_contexts:
        torch.set_num_threads(max(threads))
        layer.put_back(context)
        ours = layer.ours.step(context)
        assert_same(ours, layer.official_step(context), f"{OFFICIAL} at {context:,}")
        assert_same(ours, layer.their_step(context), f"transformers' layer at {context:,}")
        entrants = {
            OURS: Entrant(partial(layer.ours.step, context)),
            OFFICIAL: Entrant(partial(layer.official_step, context)),
            DEFAULT: Entrant(partial(layer.their_step, context), partial(layer.put_back, context)),
        }
        entrants[PRODUCTS], launches = products_alone(entrants[OURS])
        for count in threads:
            torch.set_num_threads(count)
            race = Race(MLA_RACE, mla_size(plan.mla), context, "tokens", count, launches=launches)
            # Not warmed: the comparison above has just run all three.
            races.append(run_race(race, entrants, plan.slow, warm=False))
    return races
