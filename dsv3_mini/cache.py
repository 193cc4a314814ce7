"""What decoding remembers: one latent per token (MLA), or keys and values (everything else).

Why: without a cache, token 1,000 would recompute the keys and values of 999 earlier ones. With
one, decoding is bound by how many bytes a step must read, so the size of this object *is* the
speed of decoding. MLA stores the normalised latent c^KV and the rotated key k^R (report eqs 1
and 3, boxed there): kv_lora_rank + qk_rope_head_dim numbers a token and layer, whatever the head
count. A KVCache stores full keys and values a head.

Memory is reserved once; ``nbytes`` counts what live tensors hold for the tokens seen so far.
Layers append in turn, then the model calls ``advance``; so a cache is never half-written when a
bad call is refused, and ``truncate`` rolls rejected draft tokens back by moving one integer.

Legend: L layers, B batch, S reserved length, T new tokens, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv3_mini.config import ModelConfig


class CacheError(ValueError):
    """A cache that does not fit the call; raised before anything is written."""


class Cache:
    """Preallocated tensors, one per stored kind, that all layers of a model share.

    ``shapes`` has one shape per kind: layers first, then batch, then [heads], max_len, width.
    ``length`` is the number of tokens held, equal in every layer. ``mtp`` holds one cache per
    multi-token prediction depth. Raises CacheError.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, ...]], batch: int, max_len: int,
        dtype: torch.dtype, device: torch.device | str,
    ) -> None:  # fmt: skip
        if any(type(size) is not int or size < 1 for size in (batch, max_len)):
            raise CacheError(f"batch {batch!r}, max_len {max_len!r}; expected two integers >= 1")
        self.stores = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.batch = batch
        self.max_len = max_len
        self.length = 0
        self.mtp: list[Cache] = []
        # The last hidden state at the depth below, which the next call's first token pairs with.
        self.carry: Tensor | None = None

    def append(self, layer: int, *new: Tensor) -> tuple[Tensor, ...]:
        """Write T tokens of one layer after ``length``; return views of all length + T tokens."""
        tokens, made = new[0].shape[-2], [tuple(value.shape) for value in new]
        end = self.length + tokens
        room = [(*store.shape[1:-2], tokens, store.shape[-1]) for store in self.stores]
        if room != made:
            raise CacheError(
                f"the model stores {made} in a layer, the cache has room for {room}: it is another "
                "model's; make it with this model's new_cache(...)"
            )
        views = []
        for store, value in zip(self.stores, new, strict=True):
            if value.dtype != store.dtype:
                raise CacheError(
                    f"cache holds {store.dtype}, the model computes {value.dtype}; make the cache "
                    "with model.new_cache(...) after moving the model to its dtype"
                )
            if value.requires_grad:
                raise CacheError("a cache cannot carry gradients; decode under torch.no_grad()")
            held = store[layer]
            held[..., self.length : end, :] = value
            views.append(held[..., :end, :])
        return tuple(views)

    def advance(self, tokens: int) -> None:
        """Count ``tokens`` as seen, once every layer has appended them."""
        self.check(self.batch, tokens)
        self.length += tokens

    def check(self, batch: int, tokens: int) -> None:
        """Raise CacheError unless ``tokens`` more of ``batch`` sequences fit."""
        if batch != self.batch:
            raise CacheError(
                f"tokens have batch {batch}, the cache was made for {self.batch}; "
                "make one with model.new_cache(batch, max_len)"
            )
        if self.length + tokens > self.max_len:
            raise CacheError(
                f"{self.length} cached and {tokens} new tokens exceed the cache's max_len "
                f"{self.max_len}; make a longer one or truncate it"
            )

    def truncate(self, length: int) -> None:
        """Forget everything after the first ``length`` tokens, in every layer and MTP depth."""
        if type(length) is not int or not 0 <= length <= self.length:
            raise CacheError(f"cannot truncate to {length!r}; expected 0 to {self.length} tokens")
        if length < self.length:
            for cache in (self, *self.mtp):  # a depth that holds no token yet may have one, too
                cache.carry = None
        self.length = length
        for depth, cache in enumerate(self.mtp, start=1):
            cache.truncate(min(cache.length, max(length - depth, 0)))

    @property
    def nbytes(self) -> int:
        """Bytes that the tokens seen so far occupy, read off the live tensors (MTP excluded)."""
        views = [store[..., : self.length, :] for store in self.stores]
        return sum(view.numel() * view.element_size() for view in views)

    @property
    def reserved_nbytes(self) -> int:
        """Bytes reserved for ``max_len`` tokens."""
        return sum(store.numel() * store.element_size() for store in self.stores)


class LatentCache(Cache):
    """MLA's cache: c_kv and k_rope side by side, (L, B, S, kv_lora_rank + qk_rope_head_dim)."""

    def __init__(
        self, config: ModelConfig, layers: int, batch: int, max_len: int,
        dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        width = config.kv_lora_rank + config.qk_rope_head_dim
        super().__init__([(layers, batch, max_len, width)], batch, max_len, dtype, device)


class KVCache(Cache):
    """Keys (L, B, H, S, qk_head_dim) and values (L, B, H, S, v_head_dim).

    For the yardstick H is num_key_value_heads. For MLA it is what many implementations store by
    mistake: every head's expanded key and value, 71.1 times the latent at V3's sizes.
    """

    def __init__(
        self, config: ModelConfig, layers: int, batch: int, max_len: int,
        dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        grouped = config.attention == "gqa"
        heads = config.num_key_value_heads if grouped else config.num_attention_heads
        widths = (config.qk_head_dim, config.v_head_dim)
        shapes = [(layers, batch, heads, max_len, width) for width in widths]
        super().__init__(shapes, batch, max_len, dtype, device)
