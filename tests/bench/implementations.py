"""What is compared, and through which calls: three ways to run one set of weights, and a Llama.

``dsv3_mini`` writes a random model as a folder in the official layout, transformers reads it. Its
model is then run twice, on the paths it chooses by itself and on its eager ones. The Llama has the
same hidden size, layers and heads, and a feed-forward as wide as the experts that one token wakes:
about as many weights at work per token, none asleep, and an ordinary KV cache.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DeepseekV3ForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from dsv3_mini.accounting import count_parameters
from dsv3_mini.checkpoint import load_pretrained, save_pretrained
from dsv3_mini.config import ModelConfig
from dsv3_mini.model import Transformer
from dsv3_mini.train import TrainConfig, new_state, train_step
from tests.reference.theirs import remembering

OURS, DEFAULT, EAGER, LLAMA = "dsv3_mini", "transformers", "transformers eager", "Llama"
PATHS = {DEFAULT: ("sdpa", "grouped_mm"), EAGER: ("eager", "eager")}
"""Attention and experts; the first are what transformers chooses where nothing is said."""
TOLERANCE = 1e-4


class Ours:
    """This package's model."""

    def __init__(self, model: Transformer) -> None:
        self.name, self.model = OURS, model
        self.train_config = TrainConfig(learning_rate=1e-4)
        self.state = new_state(model, self.train_config)
        self.open(1)

    def open(self, max_len: int) -> None:
        """A new, empty cache."""
        self.cache = self.model.new_cache(1, max_len)

    def choose(self) -> None:
        """Nothing: which path is cheaper, the model decides itself."""

    def extend(self, tokens: Tensor) -> Tensor:
        """Logits of new tokens (1, T) that follow the cache: a chunk of a prompt, or one."""
        return self.model(tokens, self.cache).logits

    def prefill(self, tokens: Tensor) -> Tensor:
        """Logits of a whole prompt, with a new cache."""
        self.open(tokens.shape[1])
        return self.extend(tokens)

    def put_back(self, context: int) -> None:
        """Forget what was decoded after ``context`` tokens."""
        self.cache.truncate(context)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the live tensors for the tokens held."""
        return self.cache.nbytes

    def train(self, tokens: Tensor) -> None:
        """One step on (B, T + 1): also moves the router biases and adds the balance loss."""
        train_step(self.model, self.state, self.train_config, [tokens])

    def forget_gradients(self) -> None:
        """As between two steps."""
        self.state.optimizer.zero_grad(set_to_none=True)


class Theirs:
    """A model of transformers, on one of its paths; ``on_path`` shares weights and optimizer."""

    def __init__(self, name: str, model: Any) -> None:
        self.name, self.model = name, model.eval()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        self.open(1)

    def on_path(self, name: str) -> Theirs:
        """The same model under the paths of ``name``, with a cache of its own."""
        other = copy.copy(self)
        other.name = name
        other.open(1)
        return other

    def open(self, max_len: int) -> None:
        """A new, empty cache; it grows as it must."""
        self.cache = DynamicCache(config=self.model.config)

    def choose(self) -> None:
        """Switch the shared model to this entrant's paths."""
        if self.name in PATHS:
            attention, experts = PATHS[self.name]
            self.model.set_attn_implementation(attention)
            self.model.set_experts_implementation(experts)

    def extend(self, tokens: Tensor) -> Tensor:
        """Logits of new tokens (1, T) that follow the cache."""
        return self.model(tokens, **remembering(self.cache), use_cache=True).logits

    def prefill(self, tokens: Tensor) -> Tensor:
        """Logits of a whole prompt, with a new cache."""
        self.open(tokens.shape[1])
        return self.extend(tokens)

    def copy_cache(self, ours: Ours) -> None:
        """Hold what ours holds. Both store the latents, so only the layout differs."""
        self.open(1)
        (store,) = ours.cache.stores
        for layer, latents_BSK in enumerate(store[:, :, : ours.cache.length]):
            self.cache.update(*their_latents(latents_BSK, ours.model.config), layer)

    def put_back(self, context: int) -> None:
        """Forget what was decoded after ``context`` tokens."""
        self.cache.crop(context - self.cache.get_seq_length())

    @property
    def cache_bytes(self) -> int:
        """Bytes of the tensors that the cache holds."""
        return cache_bytes(self.cache)

    def train(self, tokens: Tensor) -> None:
        """One step on (B, T + 1), written as one writes it: no balance loss, no biases moved."""
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.model(tokens[:, :-1], use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def forget_gradients(self) -> None:
        """As between two steps."""
        self.optimizer.zero_grad(set_to_none=True)


Implementation = Ours | Theirs


def their_latents(latents_BSK: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Our cached numbers as transformers caches them: (B, 1, S, C) and (B, 1, S, R).

    Its rotated pairs lie apart: first all that come first in a pair, then all that come second.
    """
    widths = [config.kv_lora_rank, config.qk_rope_head_dim]
    c_kv_BSC, k_rope_BSR = latents_BSK.split(widths, dim=-1)
    apart_BSR = torch.cat((k_rope_BSR[..., 0::2], k_rope_BSR[..., 1::2]), dim=-1)
    return c_kv_BSC[:, None], apart_BSR[:, None]


def cache_bytes(cache: Any) -> int:
    """Bytes of all tensors in a DynamicCache."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def llama_config(config: ModelConfig) -> LlamaConfig:
    """A Llama of like size: every token's feed-forward as wide as its experts together."""
    used = config.num_experts_per_tok + config.n_shared_experts
    return LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size,
        intermediate_size=used * config.moe_intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_attention_heads,
        max_position_embeddings=config.max_position_embeddings,
    )  # fmt: skip


def active_parameters(config: ModelConfig) -> dict[str, int]:
    """Weights that work on one token, without the embedding table: ours and the Llama's."""
    with torch.device("meta"):
        llama = LlamaForCausalLM(llama_config(config))
    table = config.vocab_size * config.hidden_size
    return {
        OURS: count_parameters(config).active,
        LLAMA: sum(p.numel() for p in llama.parameters()) - table,
    }


def write_model(config: ModelConfig, folder: Path) -> None:
    """A random model of ``config`` in the official layout, for all to read."""
    torch.manual_seed(0)
    save_pretrained(Transformer(config), folder)


def load(folder: Path, name: str) -> Implementation:
    """One implementation, with the weights of the checkpoint in ``folder`` (Llama: random)."""
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if name == OURS:
        return Ours(load_pretrained(folder))
    if name == LLAMA:
        return Theirs(LLAMA, LlamaForCausalLM(llama_config(ModelConfig.from_hf(folder))))
    model = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    chosen = model.config._attn_implementation, model.config._experts_implementation
    if chosen != PATHS[DEFAULT]:
        raise RuntimeError(f"transformers chose {chosen}; PATHS says {PATHS[DEFAULT]}: update it")
    return Theirs(name, model)


def load_all(folder: Path) -> dict[str, Implementation]:
    """All four by name, ours first; both of transformers' DeepSeek-V3 share one model."""
    theirs = load(folder, DEFAULT)
    assert isinstance(theirs, Theirs)
    team = [load(folder, OURS), theirs, theirs.on_path(EAGER), load(folder, LLAMA)]
    return {implementation.name: implementation for implementation in team}


def assert_same(ours: Tensor, theirs: Tensor, what: str) -> float:
    """The largest difference, which must be below 1e-4. Raises AssertionError."""
    largest = (ours - theirs).abs().max().item()
    assert ours.shape == theirs.shape, f"{what}: {tuple(ours.shape)} and {tuple(theirs.shape)}"
    assert largest < TOLERANCE, f"{what}: differs from ours by {largest:.1e}, not the same model"
    return largest
