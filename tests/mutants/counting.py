"""Mistake 26: totals that no model has."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

ACCOUNTING = ("tests/test_accounting.py",)
CONFIG = ("tests/test_config.py",)
MODEL = ("tests/test_model.py",)

MUTANTS = [
    Mutant(
        26, "the total is typed in: 664.5B", "accounting.py",
        "return sum(getattr(self, field.name) for field in fields(self)[:9])",
        "return 664_500_000_000",
        ACCOUNTING,
    ),
    Mutant(
        26, "every layer is counted as a mixture of experts", "accounting.py",
        "moe_layers = config.num_hidden_layers - dense_layers",
        "moe_layers = config.num_hidden_layers",
        ACCOUNTING,
    ),
    Mutant(
        26, "MTP is part of the main total", "accounting.py",
        "fields(self)[:9]",
        "fields(self)[:10]",
        ACCOUNTING,
    ),
    Mutant(
        26, "MTP's copies of embedding and head are counted", "accounting.py",
        "mtp=config.num_nextn_predict_layers * mtp_layer",
        "mtp=config.num_nextn_predict_layers * (mtp_layer + 2 * table)",
        ACCOUNTING,
    ),
    Mutant(
        26, "router biases are counted nowhere", "accounting.py",
        "router_biases=moe_layers * config.n_routed_experts",
        "router_biases=0",
        ACCOUNTING,
    ),
    Mutant(
        26, "MTP's router bias is forgotten", "accounting.py",
        "moe = routed + shared + router + config.n_routed_experts",
        "moe = routed + shared + router",
        ACCOUNTING,
    ),
    Mutant(
        26, "the norms on the latents are forgotten", "accounting.py",
        "+ latent * expanded + latent",
        "+ latent * expanded",
        ACCOUNTING,
    ),
    Mutant(
        26, "the embedding is counted as active", "accounting.py",
        "return self.active_with_embedding - self.embedding",
        "return self.active_with_embedding",
        ACCOUNTING,
    ),
    Mutant(
        26, "embedding and head are counted as one", "accounting.py",
        "head=table",
        "head=0",
        ACCOUNTING,
    ),
    Mutant(
        26, "the model's embedding and head are tied", "model.py",
        "        self.apply(self._initialise)\n",
        "        self.lm_head.weight = self.model.embed_tokens.weight\n"
        "        self.apply(self._initialise)\n",
        MODEL,
    ),
    Mutant(
        26, "config.json says that embedding and head are tied", "config.py",
        '"tie_word_embeddings": False',
        '"tie_word_embeddings": True',
        CONFIG,
    ),
    Mutant(
        26, "only the first layer is dense", "config.py",
        "first_k_dense_replace: int = 3",
        "first_k_dense_replace: int = 1",
        CONFIG,
    ),
    Mutant(
        26, "the MTP layer counts itself among the main ones", "model.py",
        "main = range(config.num_hidden_layers)",
        "main = range(config.num_hidden_layers + 1)",
        MODEL,
    ),
]  # fmt: skip
