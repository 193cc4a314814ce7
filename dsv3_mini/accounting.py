"""Closed forms: how many parameters, cache bytes and operations a configuration costs.

Why closed forms: 671B parameters cannot be counted by looking, and published totals disagree
because they count different things (with or without embedding, router biases, MTP). Each number
here has one formula, and a test compares every field with an instantiated model on the meta
device. Attributes count parameters unless they say otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from dsv3_mini.config import ModelConfig


@dataclass(frozen=True)
class Parameters:
    """Parameter counts by part. ``mtp`` holds the MTP layers' own weights (nothing shared)."""

    embedding: int
    attention: int
    dense_ffn: int
    routed_experts: int
    shared_experts: int
    routers: int
    router_biases: int
    norms: int
    head: int
    mtp: int
    idle_experts: int
    """Of ``routed_experts``, those that one token does not use."""

    @property
    def total(self) -> int:
        """The main model, router biases included, MTP excluded: 671,026,419,200 for V3."""
        return sum(getattr(self, field.name) for field in fields(self)[:9])

    @property
    def active(self) -> int:
        """What one token uses, without the embedding table: 36,625,618,432 for V3."""
        return self.active_with_embedding - self.embedding

    @property
    def active_with_embedding(self) -> int:
        """The same with the whole table, of which a token reads one row: 37,552,297,472."""
        return self.total - self.idle_experts


def attention_parameters(config: ModelConfig) -> int:
    """Weights of one attention layer, the norms on its latents included (eqs 1-11)."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    output = heads * config.v_head_dim * hidden
    if config.attention == "gqa":
        return output + hidden * config.v_head_dim * (heads + 2 * config.num_key_value_heads)
    queries = heads * config.qk_head_dim
    latent, expanded = config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim)
    q_rank = config.q_lora_rank
    query = queries * hidden if q_rank is None else q_rank * (hidden + queries + 1)
    key_value = hidden * (latent + config.qk_rope_head_dim) + latent * expanded + latent
    return query + key_value + output


def count_parameters(config: ModelConfig) -> Parameters:
    """Every part's parameters in closed form. Source: shapes of report 2.1 and 2.2."""
    hidden = config.hidden_size
    table = config.vocab_size * hidden
    dense_layers = config.first_k_dense_replace
    moe_layers = config.num_hidden_layers - dense_layers
    expert = 3 * config.moe_intermediate_size * hidden
    dense = 3 * config.intermediate_size * hidden
    router = config.n_routed_experts * hidden
    shared = config.n_shared_experts * expert
    attention = attention_parameters(config)
    routed = config.n_routed_experts * expert
    # An MTP layer: two block norms, enorm, hnorm, the head's norm, and eh_proj.
    moe = routed + shared + router + config.n_routed_experts
    # An MTP layer is never dense: its index lies past first_k_dense_replace, whatever that is.
    mtp_layer = attention + moe + 5 * hidden + 2 * hidden * hidden
    return Parameters(
        embedding=table,
        attention=config.num_hidden_layers * attention,
        dense_ffn=dense_layers * dense,
        routed_experts=moe_layers * routed,
        shared_experts=moe_layers * shared,
        routers=moe_layers * router,
        router_biases=moe_layers * config.n_routed_experts,
        norms=(2 * config.num_hidden_layers + 1) * hidden,
        head=table,
        mtp=config.num_nextn_predict_layers * mtp_layer,
        idle_experts=moe_layers * (config.n_routed_experts - config.num_experts_per_tok) * expert,
    )


def cache_numbers_per_token(config: ModelConfig, expanded: bool = False) -> int:
    """Numbers one token keeps in one layer: 576 for V3's MLA. Source: DeepSeek-V2 Table 1.

    ``expanded`` is MLA storing every head's keys and values, (192 + 128) x 128 in V3.
    """
    if config.attention == "gqa":
        return 2 * config.num_key_value_heads * config.v_head_dim
    if expanded:
        return config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    return config.kv_lora_rank + config.qk_rope_head_dim


def cache_bytes(
    config: ModelConfig, tokens: int, batch: int = 1, bytes_per_number: int = 2,
    expanded: bool = False,
) -> int:  # fmt: skip
    """Bytes of the whole model's cache: layers x batch x tokens x numbers x bytes.

    70,272 for one token of V3 in BF16 (Insights Table 1 prints 70.272 KB).
    """
    per_token = config.num_hidden_layers * cache_numbers_per_token(config, expanded)
    return per_token * tokens * batch * bytes_per_number


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one token's forward pass, by part (a multiply-add is two)."""

    projections: int
    """Attention's matrices: down, up and output."""
    attention: int
    """Scores and weighted values against the context; the only part that grows with it."""
    feed_forward: int
    """Dense layers, the chosen and shared experts, and the routers."""
    head: int

    @property
    def total(self) -> int:
        """All parts together."""
        return self.projections + self.attention + self.feed_forward + self.head


def forward_flops(config: ModelConfig, context: float) -> Flops:
    """Operations of one token that attends to ``context`` tokens, by the naive path, MTP off.

    A weight costs two operations a token; norms, biases and softmax are not counted.
    """
    parameters = count_parameters(config)
    norms = 0
    if config.attention == "mla":
        norms = config.num_hidden_layers * (config.kv_lora_rank + (config.q_lora_rank or 0))
    widths = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    used = parameters.routed_experts - parameters.idle_experts
    fed = parameters.dense_ffn + used + parameters.shared_experts + parameters.routers
    return Flops(
        projections=2 * (parameters.attention - norms),
        attention=round(2 * config.num_hidden_layers * widths * context),
        feed_forward=2 * fed,
        head=2 * parameters.head,
    )


def decode_flops(
    config: ModelConfig, context: int, absorb: bool = False, expanded: bool = False
) -> int:
    """Operations of one new token in one attention layer that sees ``context`` tokens, itself too.

    MLA's naive path makes every head's keys and values again for all of them, unless the cache
    holds them ``expanded``; the absorbed path computes with the latents. No norms, no softmax.
    """
    heads, weights = config.num_attention_heads, attention_parameters(config)
    per_token = heads * (config.qk_head_dim + config.v_head_dim)
    if config.attention == "mla":
        weights -= config.kv_lora_rank + (config.q_lora_rank or 0)
        expansion = config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
        if absorb:
            per_token = heads * (2 * config.kv_lora_rank + config.qk_rope_head_dim)
        elif not expanded:
            per_token += expansion
            weights -= expansion  # the new token is one of the context
    return 2 * (weights + context * per_token)


def training_flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Forward and backward of one token, averaged over a causal sequence: 3 x forward.

    The mean context is (seq_len + 1) / 2. About 250 GFLOPs for V3 at 4,096, which is the figure
    of Insights Table 2.
    """
    return 3 * forward_flops(config, (seq_len + 1) / 2).total


@dataclass(frozen=True)
class StoredBytes:
    """Bytes of a published checkpoint's tensors by format; file headers are not counted."""

    fp8: int
    """Attention projections, dense feed-forward and all experts, MTP's too."""
    scales: int
    """One fp32 number for each 128x128 block of those."""
    bf16: int
    """The rest; an MTP layer comes with copies of the embedding and the head."""
    fp32: int
    """Router biases."""

    @property
    def total(self) -> int:
        """All four: 688.57 GB for V3."""
        return self.fp8 + self.scales + self.bf16 + self.fp32


def checkpoint_bytes(config: ModelConfig) -> StoredBytes:
    """What the model takes on disk in the official FP8 layout, MTP included."""
    shapes = _fp8_shapes(config)
    codes = sum(count * rows * columns for count, rows, columns in shapes)
    blocks = sum(count * -(-rows // 128) * -(-columns // 128) for count, rows, columns in shapes)
    parameters, depths = count_parameters(config), config.num_nextn_predict_layers
    biases = parameters.router_biases + depths * config.n_routed_experts
    copies = 2 * depths * parameters.head
    rest = parameters.total + parameters.mtp + copies - biases - codes
    return StoredBytes(codes, 4 * blocks, 2 * rest, 4 * biases)


def _fp8_shapes(config: ModelConfig) -> list[tuple[int, int, int]]:
    """How many matrices of which shape a checkpoint keeps in FP8: (count, rows, columns)."""
    hidden, heads, value = config.hidden_size, config.num_attention_heads, config.v_head_dim
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    shapes = [(layers, hidden, heads * value)]
    if config.attention == "gqa":
        shapes += [(layers, heads * value, hidden)]
        shapes += [(2 * layers, config.num_key_value_heads * value, hidden)]
    else:
        queries, latent, rank = heads * config.qk_head_dim, config.kv_lora_rank, config.q_lora_rank
        shapes += [(layers, latent + config.qk_rope_head_dim, hidden)]
        shapes += [(layers, heads * (config.qk_nope_head_dim + value), latent)]
        shapes += [(layers, queries, rank or hidden)]
        shapes += [] if rank is None else [(layers, rank, hidden)]
    dense, inner = config.first_k_dense_replace, config.moe_intermediate_size
    widths = [(dense, config.intermediate_size)]
    widths += [((layers - dense) * config.n_routed_experts, inner)]
    widths += [(layers - dense, inner * config.n_shared_experts)]
    for count, width in widths:
        shapes += [(2 * count, width, hidden), (count, hidden, width)]
    return shapes
