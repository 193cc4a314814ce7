"""Sampling with a cache: the prompt in one pass, then one token at a time.

Why a cache makes this linear: each step computes the new token's latent only and reads the rest.
The loop is kept plain, because speculative decoding is proven equal to exactly this one.

Legend: B batch, T prompt tokens, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from dsv3_mini.model import Transformer


def as_prompt(prompt: Tensor | Sequence[int], device: torch.device) -> Tensor:
    """A list of ids, a (T,) or a (B, T) tensor as (B, T) int64. Raises ValueError."""
    try:
        tokens = torch.as_tensor(prompt, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"prompt is no tensor ({error}); expected integer tokens") from None
    if tokens.dim() == 1:
        tokens = tokens[None]
    integer = not (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool)
    if tokens.dim() != 2 or not tokens.numel() or not integer:
        raise ValueError(
            f"prompt has shape {tuple(tokens.shape)} and dtype {tokens.dtype}; expected at least "
            "one integer token, as a list, (seq,) or (batch, seq)"
        )
    return tokens.long()


def choose(logits_BV: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """The next token of each row, (B,): the best one at temperature 0, else a sample."""
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    probabilities = (logits_BV.float() / temperature).softmax(dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def check_sampling(
    model: Transformer, max_new_tokens: int, temperature: float, seed: int | None,
    stop_token: int | None,
) -> None:  # fmt: skip
    """Refuse what ``generate`` cannot do, before a token is made. Raises ValueError."""
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens!r}; expected an integer >= 1")
    if not isinstance(temperature, int | float) or not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature!r}; expected 0 (greedy) or more")
    if seed is not None and type(seed) is not int:
        raise ValueError(f"seed is {seed!r}; expected an integer, or None for other tokens a run")
    last = model.config.vocab_size - 1
    if stop_token is not None and (type(stop_token) is not int or not 0 <= stop_token <= last):
        raise ValueError(f"stop_token is {stop_token!r}; expected a token, 0 to {last}, or None")


@torch.no_grad()
def generate(
    model: Transformer, prompt: Tensor | Sequence[int], max_new_tokens: int,
    temperature: float = 0.0, seed: int | None = None, stop_token: int | None = None,
) -> Tensor:  # fmt: skip
    """Prompt and continuation, (B, T + n) int64, n <= max_new_tokens.

    Greedy at temperature 0, else sampled, repeatably if ``seed`` is given. A row that has produced
    ``stop_token`` is filled with it; generation ends when every row has. Raises ValueError.
    """
    device = model.lm_head.weight.device
    tokens = as_prompt(prompt, device)
    check_sampling(model, max_new_tokens, temperature, seed, stop_token)
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    cache = model.new_cache(tokens.shape[0], tokens.shape[1] + max_new_tokens - 1)
    done_B = torch.zeros(tokens.shape[0], dtype=torch.bool, device=device)
    new = tokens
    for _ in range(max_new_tokens):
        following_B = choose(model(new, cache).logits[:, -1], temperature, generator)
        if stop_token is not None:
            following_B = torch.where(done_B, stop_token, following_B)
            done_B |= following_B == stop_token
        new = following_B[:, None]
        tokens = torch.cat((tokens, new), dim=1)
        if bool(done_B.all()):
            break
    return tokens


if __name__ == "__main__":
    from dsv3_mini.generate_command import main

    sys.exit(main())
