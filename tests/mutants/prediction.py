"""Mistakes 19 to 22: multi-token prediction and speculation."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

MTP = ("tests/test_mtp.py",)
TRAIN = ("tests/test_train.py",)
SPECULATIVE = "tests/test_speculative.py"
GREEDY = (f"{SPECULATIVE}::test_greedy_is_token_for_token_the_same",)
VERIFY = (f"{SPECULATIVE}::test_verify_has_exactly_the_main_models_distribution",)

PARTS = "(self.enorm(self.embed_tokens(tokens_BT)), self.hnorm(hidden_BTD))"
BEST = "return best_B, best_B == draft_B"

MUTANTS = [
    # --------------------------------------------------------------------- 19 the chain
    Mutant(
        19, "parallel heads: every depth reads the main model's state", "model.py",
        "            logits, state, routing = layer(\n",
        "            logits, _, routing = layer(\n",
        MTP,
    ),
    Mutant(
        19, "no token embedding", "mtp.py",
        "self.enorm(self.embed_tokens(tokens_BT))",
        "torch.zeros_like(hidden_BTD)",
        MTP,
    ),
    Mutant(
        19, "an embedding of its own", "mtp.py",
        "self.embed_tokens = embed_tokens",
        "self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)",
        MTP,
    ),
    Mutant(
        19, "a head of its own", "mtp.py",
        "self.head = head",
        "self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)",
        MTP,
    ),
    Mutant(
        19, "its loss does not reach the main model", "model.py",
        "mtp_logits, more = self._predict_further(hidden, tokens, cache, absorb, fused)",
        "mtp_logits, more = self._predict_further(hidden.detach(), tokens, cache, absorb, fused)",
        MTP,
    ),
    # --------------------------------------------------------------------- 20 targets
    Mutant(
        20, "the token that is shown is asked for", "mtp.py",
        "target_BT = tokens_BT[:, depth + 1 :]",
        "target_BT = tokens_BT[:, depth:-1]",
        MTP,
    ),
    Mutant(
        20, "the token that is asked for is shown", "model.py",
        "state, tokens[:, tokens.shape[1] - known :], cos, sin, inner, absorb, fused",
        "state, tokens.roll(-1, 1)[:, -known:], cos, sin, inner, absorb, fused",
        MTP,
    ),
    Mutant(
        20, "targets are one column short of the logits", "mtp.py",
        "target_BT = tokens_BT[:, depth + 1 :]",
        "target_BT = tokens_BT[:, depth + 1 : -1]",
        MTP,
    ),
    Mutant(
        20, "targets are one column short, and the logits cut to fit", "mtp.py",
        "        target_BT = tokens_BT[:, depth + 1 :]\n",
        "        target_BT = tokens_BT[:, depth + 1 : -1]\n"
        "        logits_BTV = logits_BTV[:, :-1]\n",
        MTP,
    ),
    Mutant(
        20, "the main model is asked for the token it reads", "train.py",
        "main = F.cross_entropy(output.logits.flatten(0, 1), tokens[:, 1:].flatten())",
        "main = F.cross_entropy(output.logits.flatten(0, 1), tokens[:, :-1].flatten())",
        TRAIN,
    ),
    # --------------------------------------------------------------------- 21 order
    Mutant(
        21, "the state comes before the embedding", "mtp.py",
        PARTS,
        "(self.hnorm(hidden_BTD), self.enorm(self.embed_tokens(tokens_BT)))",
        MTP,
    ),
    Mutant(
        21, "each part goes through the other's norm", "mtp.py",
        PARTS,
        "(self.hnorm(self.embed_tokens(tokens_BT)), self.enorm(hidden_BTD))",
        MTP,
    ),
    # --------------------------------------------------------------------- 22 speculation
    Mutant(
        22, "drafts are accepted at random", "speculative.py",
        BEST,
        "kept_B = torch.rand(draft_B.shape) < 0.8\n"
        "        return torch.where(kept_B, draft_B, best_B), kept_B",
        GREEDY,
    ),
    Mutant(
        22, "drafts are accepted where the module is confident", "speculative.py",
        BEST,
        "kept_B = q_BV.softmax(dim=-1).amax(dim=-1) > 0.5\n"
        "        return torch.where(kept_B, draft_B, best_B), kept_B",
        (f"{SPECULATIVE}::test_a_module_that_is_sure_and_wrong_is_not_believed",),
    ),
    Mutant(
        22, "drafts are compared with the position after theirs", "speculative.py",
        "verify(out.logits[:, 0], q_BV",
        "verify(out.logits[:, 1], q_BV",
        GREEDY,
    ),
    Mutant(
        22, "after an accepted draft the wrong position speaks", "speculative.py",
        'decide(choose(out.logits[:, 1], temperature, generator), "plain")',
        'decide(choose(out.logits[:, 0], temperature, generator), "plain")',
        GREEDY,
    ),
    Mutant(
        22, "one accepted row is enough for all rows", "speculative.py",
        "if accepted == alive and not bool(done_B.all()):",
        "if accepted and not bool(done_B.all()):",
        GREEDY,
    ),
    Mutant(
        22, "a sampled draft is accepted with probability p", "speculative.py",
        "kept_B = chance_B * q_B < p_B",
        "kept_B = chance_B < p_B",
        VERIFY,
    ),
    Mutant(
        22, "in place of a refused draft comes a sample of p", "speculative.py",
        "rest_BV = (p_BV - q_BV).clamp(min=0)",
        "rest_BV = p_BV",
        VERIFY,
    ),
]  # fmt: skip
