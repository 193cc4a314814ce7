"""Speculative decoding: the MTP module drafts the token after next, the main model verifies it.

Why it is faster: a decode step reads all weights whether it computes one token or two. So the main
model is given the next token *and* a draft of the one after it; if the draft is what it would have
said, one step made two tokens. Why it is identical: the draft only decides how much is computed at
once. What is kept is what the main model says at each position, given the tokens before it.

Greedy: a draft is accepted where it equals the main model's best token. Sampled: a draft d, drawn
from the module's q, is accepted with probability min(1, p(d) / q(d)), else the token is drawn from
max(p - q, 0), normalised; the result has exactly the distribution p (Leviathan et al. 2022).

A batch advances in step: two tokens only where every row accepts, one otherwise. That loses speed,
never correctness. Rejected tokens leave both caches at once.

Legend: B batch, T tokens, V vocabulary, x_n the last token that was decided.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dsv3_mini.generate import as_prompt, check_sampling, choose
from dsv3_mini.model import Transformer


@dataclass
class Acceptance:
    """What happened to the drafts."""

    steps: int = 0
    """Forward passes of the main model after the prompt."""
    drafted: int = 0
    """Drafts that were verified, over all rows that had not ended."""
    accepted: int = 0
    fates: list[str] = field(default_factory=list)
    """Of each new token of the first row: 'plain', 'accepted' (a draft) or 'rejected' (the main
    model's token in place of a refused draft)."""

    @property
    def rate(self) -> float:
        """Share of drafts that were accepted: the report has 85 to 90 % (5.4.3)."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_step(self) -> float:
        """New tokens a main-model step made, from 1 to 2; the first comes from the prompt."""
        return (len(self.fates) - 1) / self.steps if self.steps else 0.0


@torch.no_grad()
def generate(
    model: Transformer, prompt: Tensor | Sequence[int], max_new_tokens: int,
    temperature: float = 0.0, seed: int | None = None, stop_token: int | None = None,
) -> tuple[Tensor, Acceptance]:  # fmt: skip
    """As ``dsv3_mini.generate.generate``, with the same output, and how the drafts fared.

    Greedy output is token for token the same (up to ties in the last digit of the logits); sampled
    output has the same distribution, not the same draws. Raises ValueError, also without MTP.
    """
    if not model.config.num_nextn_predict_layers:
        raise ValueError(
            "num_nextn_predict_layers is 0: this model has no MTP module to draft with"
        )
    device = model.lm_head.weight.device
    tokens_BT = as_prompt(prompt, device)
    check_sampling(model, max_new_tokens, temperature, seed, stop_token)
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    batch, length = tokens_BT.shape
    end = length + max_new_tokens
    cache, stats = model.new_cache(batch, end - 1, mtp=True), Acceptance()
    done_B = torch.zeros(batch, dtype=torch.bool, device=device)

    def decide(token_B: Tensor, fate: str) -> None:
        nonlocal tokens_BT, done_B
        if stop_token is not None:
            token_B = torch.where(done_B, stop_token, token_B)
            done_B = done_B | (token_B == stop_token)
        tokens_BT = torch.cat((tokens_BT, token_B[:, None]), dim=1)
        stats.fates.append(fate)

    out = model(tokens_BT, cache)
    states_BTD = out.hidden
    decide(choose(out.logits[:, -1], temperature, generator), "plain")
    while tokens_BT.shape[1] < end and not bool(done_B.all()):
        if tokens_BT.shape[1] == end - 1:  # no room for a draft
            out = model(tokens_BT[:, -1:], cache)
            stats.steps += 1
            decide(choose(out.logits[:, -1], temperature, generator), "plain")
            break
        following_BT = tokens_BT[:, -states_BTD.shape[1] :]
        q_BV = model.draft(states_BTD, following_BT, cache)[:, -1]
        draft_B = choose(q_BV, temperature, generator)
        out = model(torch.stack((tokens_BT[:, -1], draft_B), dim=1), cache)
        stats.steps += 1
        next_B, kept_B = verify(out.logits[:, 0], q_BV, draft_B, temperature, generator)
        alive_B = ~done_B
        alive, accepted = int(alive_B.sum()), int((kept_B & alive_B).sum())
        stats.drafted += alive
        stats.accepted += accepted
        decide(next_B, "accepted" if bool(kept_B[0]) else "rejected")
        states_BTD = out.hidden
        if accepted == alive and not bool(done_B.all()):
            decide(choose(out.logits[:, 1], temperature, generator), "plain")
        else:
            cache.truncate(cache.length - 1)
            states_BTD = states_BTD[:, :1]
    return tokens_BT, stats


def verify(
    p_BV: Tensor, q_BV: Tensor, draft_B: Tensor, temperature: float,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The token of each row, (B,), and whether it is the accepted draft, (B,) bool.

    ``p`` and ``q`` are the logits of the main model and of the module for the same position.
    """
    if temperature == 0:
        best_B = p_BV.argmax(dim=-1)
        return best_B, best_B == draft_B
    p_BV, q_BV = ((x.float() / temperature).softmax(dim=-1) for x in (p_BV, q_BV))
    p_B, q_B = (x.gather(-1, draft_B[:, None])[:, 0] for x in (p_BV, q_BV))
    chance_B = torch.rand(p_B.shape, generator=generator, device=p_B.device)
    kept_B = chance_B * q_B < p_B
    rest_BV = (p_BV - q_BV).clamp(min=0)
    # Where p equals q nothing is left over, but then the draft was kept.
    rest_BV = torch.where(rest_BV.sum(-1, keepdim=True) > 0, rest_BV, p_BV)
    other_B = torch.multinomial(rest_BV, 1, generator=generator)[:, 0]
    return torch.where(kept_B, draft_B, other_B), kept_B
