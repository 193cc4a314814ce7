"""The same weights in this package and in transformers give the same numbers, on random models.

transformers' DeepseekV3ForCausalLM was written by other people from the same checkpoint, so an
agreement on sixty random configurations says more than any test that knows our code. Models cross
over as files in the official layout, in both directions, which tests that layout as well.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV3ForCausalLM, DynamicCache
from transformers.modeling_layers import MtpModel
from transformers.utils import logging

from dsv3_mini.checkpoint import load_pretrained, save_pretrained
from dsv3_mini.config import ModelConfig
from dsv3_mini.model import ModelOutput, Transformer
from dsv3_mini.rope import yarn_ramp
from tests.reference.configs import random_config, randomise
from tests.reference.theirs import remembering

SEEDS = range(60)
TOKENS = 18
CHUNKS = [1, 1, 1, 1, 4, 1, 1, 1, 5, 1, 1]  # token by token, and several tokens at an offset
LARGEST_DIFFERENCE = 1e-4
SMALLEST_SPREAD = 0.1  # of the logits, so that the number above means something

each_seed = pytest.mark.parametrize("seed", SEEDS)


@dataclass(frozen=True)
class Pair:
    """One random model on both sides, what both say about the same tokens, and its MTP layers."""

    config: ModelConfig
    tokens: Tensor
    ours: Transformer
    output: ModelOutput
    theirs: DeepseekV3ForCausalLM
    logits: Tensor
    hidden: Tensor
    mtp: MtpModel


@functools.cache
@torch.no_grad()
def pair(seed: int) -> Pair:
    """Made by us, written by us, read by transformers, each of its two loaders doing its part."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = random_config(seed)
    ours = randomise(Transformer(config), seed).eval()
    tokens = torch.randint(
        config.vocab_size, (2, TOKENS), generator=torch.Generator().manual_seed(seed)
    )
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(ours, folder)
        theirs = DeepseekV3ForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        )
        # The MTP loader looks for V3's layer 61; in a small model MTP layers have other numbers.
        first, depths = config.num_hidden_layers, config.num_nextn_predict_layers
        theirs._keys_to_ignore_on_load_unexpected = [
            rf"model\.layers\.{layer}\..*" for layer in range(first, first + depths)
        ]
        mtp = MtpModel.from_pretrained(theirs).eval()
    said = theirs(tokens, output_hidden_states=True)
    output = ours(tokens, mtp=True)
    return Pair(config, tokens, ours, output, theirs, said.logits, said.hidden_states[-1], mtp)


def difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


@each_seed
def test_logits_agree(seed: int) -> None:
    both = pair(seed)
    assert both.logits.std() > SMALLEST_SPREAD
    assert difference(both.output.logits, both.logits) < LARGEST_DIFFERENCE
    assert difference(both.output.hidden, both.hidden) < LARGEST_DIFFERENCE


@each_seed
@torch.no_grad()
def test_what_transformers_writes_we_read(seed: int, tmp_path: Path) -> None:
    """It writes ``rope_parameters`` for ``rope_scaling``, and no MTP layer."""
    both = pair(seed)
    both.theirs.save_pretrained(tmp_path)
    back = load_pretrained(tmp_path, mtp=False)
    assert back.config == both.config.replace(num_nextn_predict_layers=0)
    assert difference(back(both.tokens).logits, both.logits) < LARGEST_DIFFERENCE


@each_seed
@torch.no_grad()
def test_cached_decoding_agrees(seed: int) -> None:
    both = pair(seed)
    our_cache = both.ours.new_cache(len(both.tokens), TOKENS)
    their_cache = DynamicCache(config=both.theirs.config)
    ours, theirs = [], []
    for chunk in both.tokens.split(CHUNKS, dim=1):
        ours.append(both.ours(chunk, our_cache).logits)
        theirs.append(both.theirs(chunk, **remembering(their_cache)).logits)
        assert our_cache.length == their_cache.get_seq_length()
        assert difference(ours[-1], theirs[-1]) < LARGEST_DIFFERENCE
    assert difference(torch.cat(ours, dim=1), both.logits) < LARGEST_DIFFERENCE


def their_mtp_logits(both: Pair) -> list[Tensor]:
    """transformers' layers, chained by hand: its own loop drafts, and has no teacher forcing."""
    state, logits = both.hidden, []
    for depth in range(both.config.num_nextn_predict_layers):
        state, following = state[:, :-1], both.tokens[:, depth + 1 :]
        positions = torch.arange(state.shape[1])[None]
        state = both.mtp.forward_layer(depth, state, positions, None, input_ids=following)
        logits.append(both.theirs.lm_head(state))
    return logits


@each_seed
@torch.no_grad()
def test_multi_token_prediction_agrees(seed: int) -> None:
    both = pair(seed)
    theirs = their_mtp_logits(both)
    assert len(both.output.mtp_logits) == len(theirs) == both.config.num_nextn_predict_layers
    for depth, (our, their) in enumerate(zip(both.output.mtp_logits, theirs, strict=True), 1):
        assert our.shape == (2, TOKENS - depth, both.config.vocab_size)
        assert their.std() > SMALLEST_SPREAD
        assert difference(our, their) < LARGEST_DIFFERENCE


@each_seed
@torch.no_grad()
def test_multi_token_prediction_with_a_cache_agrees(seed: int) -> None:
    """Ours in chunks against transformers' in one pass: the chain carries one state over."""
    both = pair(seed)
    cache = both.ours.new_cache(len(both.tokens), TOKENS, mtp=True)
    both.ours(both.tokens[:, :1] * 0, cache, mtp=True)
    cache.truncate(0)  # what was seen and forgotten leaves nothing behind
    steps = [both.ours(c, cache, mtp=True).mtp_logits for c in both.tokens.split(CHUNKS, dim=1)]
    for depth, their in enumerate(their_mtp_logits(both)):
        our = torch.cat([logits[depth] for logits in steps], dim=1)
        assert difference(our, their) < LARGEST_DIFFERENCE


@torch.no_grad()
def test_the_largest_difference_of_all_is_small() -> None:
    main = {seed: difference(pair(seed).output.logits, pair(seed).logits) for seed in SEEDS}
    worst = max(main, key=main.__getitem__)
    print(f"largest logit difference {main[worst]:.1e}, at seed {worst} of {len(SEEDS)}")
    assert main[worst] < LARGEST_DIFFERENCE


def blends(config: ModelConfig) -> bool:
    """Whether YaRN leaves one pair alone, divides another, and mixes a third."""
    scaling = config.rope_scaling
    if scaling is None or scaling.factor == 1:
        return False
    ramp = yarn_ramp(config.rotary_dim, config.rope_theta, scaling)
    return bool((ramp == 0).any() and (ramp == 1).any() and ((ramp > 0) & (ramp < 1)).any())


COVERED: dict[str, Callable[[ModelConfig], bool]] = {
    "one group": lambda c: c.n_group == 1,
    "several groups, some left out": lambda c: 1 <= c.topk_group < c.n_group,
    "several groups, more than one kept": lambda c: 1 < c.topk_group < c.n_group,
    "experts kept and not chosen": lambda c: (
        c.num_experts_per_tok < c.topk_group * c.n_routed_experts // c.n_group
    ),
    "more than one expert chosen": lambda c: c.num_experts_per_tok > 1,
    "one shared expert": lambda c: c.n_shared_experts == 1,
    "two shared experts": lambda c: c.n_shared_experts == 2,
    "values narrower than keys": lambda c: c.v_head_dim < c.qk_head_dim,
    "values wider than keys": lambda c: c.v_head_dim > c.qk_head_dim,
    "queries compressed": lambda c: c.q_lora_rank is not None,
    "queries not compressed": lambda c: c.q_lora_rank is None,
    "gates normalised": lambda c: c.norm_topk_prob,
    "gates not normalised": lambda c: not c.norm_topk_prob,
    "no dense layer": lambda c: c.first_k_dense_replace == 0,
    "some layers dense": lambda c: 0 < c.first_k_dense_replace < c.num_hidden_layers,
    "all layers dense": lambda c: c.first_k_dense_replace == c.num_hidden_layers,
    "one MTP layer": lambda c: c.num_nextn_predict_layers == 1,
    "two MTP layers": lambda c: c.num_nextn_predict_layers == 2,
    "one head": lambda c: c.num_attention_heads == 1,
    "several heads": lambda c: c.num_attention_heads > 1,
    "no YaRN": lambda c: c.rope_scaling is None,
    "YaRN with a blend": blends,
    "YaRN, mscale equal to mscale_all_dim": lambda c: (
        c.rope_scaling is not None and c.rope_scaling.mscale == c.rope_scaling.mscale_all_dim > 0
    ),
    "YaRN, mscale other than mscale_all_dim": lambda c: (
        c.rope_scaling is not None
        and 0 < c.rope_scaling.mscale != c.rope_scaling.mscale_all_dim > 0
    ),
    "YaRN, mscale_all_dim 0": lambda c: (
        c.rope_scaling is not None and c.rope_scaling.mscale_all_dim == 0
    ),
    "YaRN, mscale 0": lambda c: c.rope_scaling is not None and c.rope_scaling.mscale == 0,
}


@pytest.mark.parametrize("kind", COVERED)
def test_the_configurations_cover(kind: str) -> None:
    assert sum(COVERED[kind](random_config(seed)) for seed in SEEDS) >= 4


def test_the_configurations_vary() -> None:
    configs = [random_config(seed) for seed in SEEDS]
    assert len(set(configs)) == len(configs) >= 40
    scalings = [c.rope_scaling for c in configs if c.rope_scaling is not None]
    for name in ("factor", "beta_fast", "beta_slow", "original_max_position_embeddings"):
        assert len({getattr(scaling, name) for scaling in scalings}) >= 3, name
    assert len({c.routed_scaling_factor for c in configs}) >= 3
    moe = [c for c in configs if c.first_k_dense_replace < c.num_hidden_layers]
    assert len(moe) >= 40, "too few configurations have experts in the main model"


@torch.no_grad()
def test_routing_is_decisive_and_biased() -> None:
    """Scores use the sigmoid's range, most biases are negative, and biases change who is chosen."""
    routings = [routing for seed in SEEDS for routing in pair(seed).output.routing]
    biases = torch.cat([g.e_score_correction_bias for seed in SEEDS for g in pair(seed).ours.gates])
    assert torch.cat([routing.scores_BTE.flatten() for routing in routings]).std() > 0.2
    assert 0.6 < (biases < 0).float().mean() < 0.9
    changed = 0
    for routing in routings:
        best = routing.scores_BTE.topk(routing.indices_BTK.shape[-1]).indices
        changed += not torch.equal(best.sort().values, routing.indices_BTK.sort().values)
    assert changed > 0.9 * len(routings)
