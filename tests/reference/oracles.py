"""Slow, independent statements of the report's equations: float64 numpy and Python loops.

Nothing here calls the package's arithmetic. Weights are read from a module by their official
names, and cut into heads as the checkpoint's layout says. A function that takes ``x`` takes one
sequence, (tokens, width).
"""

from __future__ import annotations

import math
import random

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dsv3_mini import ModelConfig, Transformer
from dsv3_mini.config import RopeScaling
from dsv3_mini.moe import MoE
from tests.reference.configs import random_config

Array = npt.NDArray[np.float64]


# ---------------------------------------------------------------------------- models to test with


def small_config(seed: int, **changes: object) -> ModelConfig:
    """A random model, also of kinds that transformers lacks; YaRN where the seed is odd."""
    draw = random.Random(seed)
    config = random_config(seed).replace(
        n_shared_experts=draw.choice([0, 1, 2]), rms_norm_eps=draw.choice([1e-6, 1e-3])
    )
    yarn = config.rope_scaling or RopeScaling(factor=8, original_max_position_embeddings=64)
    return config.replace(**{"rope_scaling": yarn if seed % 2 else None, **changes})


def shake(module: nn.Module, seed: int = 0) -> None:
    """Weights that show mistakes: norms away from one, negative router biases, outputs near one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            drawn = torch.rand(tensor.shape, generator=generator)
            if name.endswith("e_score_correction_bias"):
                drawn = drawn * 0.8 - 1.2
            elif tensor.dim() == 1:
                drawn += 0.5
            else:
                drawn = torch.randn(tensor.shape, generator=generator)
                if not name.endswith("embed_tokens.weight"):
                    drawn /= math.sqrt(tensor.shape[-1])
            tensor.copy_(drawn)


def shaken(config: ModelConfig, seed: int = 0) -> Transformer:
    model = Transformer(config)
    shake(model, seed)
    return model.requires_grad_(False).eval()


def chunks(total: int, seed: int) -> list[int]:
    """Positive lengths that sum to ``total``, a third of them one."""
    draw = random.Random(seed)
    lengths: list[int] = []
    while sum(lengths) < total:
        lengths.append(min(draw.choice([1, draw.randint(1, 6)]), total - sum(lengths)))
    return lengths


def logit(probability: Tensor) -> Tensor:
    return torch.log(probability / (1 - probability))


# -------------------------------------------------------------------------------------- the parts


def numbers(tensor: Tensor) -> Array:
    return tensor.detach().to(torch.float64).numpy()


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def softmax(x: Array) -> Array:
    powers = np.exp(x - x.max())
    return powers / powers.sum()


def swiglu(x: Array, gate: Array, up: Array, down: Array) -> Array:
    inner = x @ gate.T
    return (inner * sigmoid(inner) * (x @ up.T)) @ down.T


def frequencies(config: ModelConfig) -> Array:
    """Angle per position of each pair; YaRN's two bounds are found by walking and bisecting."""
    width, scaling = config.rotary_dim, config.rope_scaling
    plain = np.array([config.rope_theta ** (-2 * pair / width) for pair in range(width // 2)])
    if scaling is None:
        return plain

    def pair_that_turns(times: float) -> float:
        low, high = -4.0 * width, 4.0 * width
        for _ in range(200):
            middle = (low + high) / 2
            turns = config.rope_theta ** (-2 * middle / width) / (2 * math.pi)
            if turns * scaling.original_max_position_embeddings > times:
                low = middle
            else:
                high = middle
        return low

    first = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    last = min(math.ceil(pair_that_turns(scaling.beta_slow)), width - 1)
    stretched = []
    for pair, angle in enumerate(plain):
        if pair <= first:
            stretched.append(angle)
        elif pair >= last:
            stretched.append(angle / scaling.factor)
        else:
            blend = (pair - first) / (last - first)
            stretched.append((1 - blend) * angle + blend * angle / scaling.factor)
    return np.array(stretched)


def rotate(x: Array, position: int, config: ModelConfig) -> Array:
    """Adjacent pairs as complex numbers, times e^(i m theta)."""
    pairs = x[..., 0::2] + 1j * x[..., 1::2]
    turned = pairs * np.exp(1j * position * frequencies(config))
    scaling = config.rope_scaling
    if scaling is not None:
        both = scaling.mscale and scaling.mscale_all_dim
        top = 1 + 0.1 * (scaling.mscale if both else 1.0) * math.log(scaling.factor)
        bottom = 1 + 0.1 * (scaling.mscale_all_dim if both else 0.0) * math.log(scaling.factor)
        turned = turned * top / bottom
    out = np.empty_like(x)
    out[..., 0::2], out[..., 1::2] = turned.real, turned.imag
    return out


def logit_scale(config: ModelConfig) -> float:
    scaling = config.rope_scaling
    temperature = 1.0
    if scaling is not None:
        temperature = (1 + 0.1 * scaling.mscale_all_dim * math.log(scaling.factor)) ** 2
    return temperature * config.qk_head_dim**-0.5


def mla(attention: nn.Module, config: ModelConfig, x: Array, start: int = 0) -> Array:
    """Equations 1 to 11, one head and one position at a time, with full keys and values."""
    weight = {name: numbers(tensor) for name, tensor in attention.state_dict().items()}
    n, r, v = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    c, heads, eps = config.kv_lora_rank, config.num_attention_heads, config.rms_norm_eps
    keys, values, queries = [], [], []
    for t, h in enumerate(x):
        down = weight["kv_a_proj_with_mqa.weight"] @ h
        c_kv = rms_norm(down[:c], weight["kv_a_layernorm.weight"], eps)  # 1
        k_rope = rotate(down[c:], start + t, config)  # 3
        if config.q_lora_rank is None:
            q = weight["q_proj.weight"] @ h
        else:
            c_q = weight["q_a_proj.weight"] @ h  # 6
            c_q = rms_norm(c_q, weight["q_a_layernorm.weight"], eps)
            q = weight["q_b_proj.weight"] @ c_q
        keys.append([])
        values.append([])
        queries.append([])
        for i in range(heads):
            up = weight["kv_b_proj.weight"][i * (n + v) : (i + 1) * (n + v)]
            keys[t].append(np.concatenate((up[:n] @ c_kv, k_rope)))  # 2, 4
            values[t].append(up[n:] @ c_kv)  # 5
            own = q[i * (n + r) : (i + 1) * (n + r)]  # 7
            q_rope = rotate(own[n:], start + t, config)  # 8
            queries[t].append(np.concatenate((own[:n], q_rope)))  # 9
    out = []
    for t in range(len(x)):
        o = []
        for i in range(heads):
            logits = [queries[t][i] @ keys[j][i] * logit_scale(config) for j in range(t + 1)]
            shares = softmax(np.array(logits))
            o.append(sum(share * values[j][i] for j, share in enumerate(shares)))  # 10
        out.append(weight["o_proj.weight"] @ np.concatenate(o))  # 11
    return np.array(out)


def grouped(attention: nn.Module, config: ModelConfig, x: Array) -> Array:
    """Multi-head, grouped or multi-query attention, one head and one position at a time."""
    weight = {name: numbers(tensor) for name, tensor in attention.state_dict().items()}
    v, heads = config.v_head_dim, config.num_attention_heads
    per_key = heads // config.num_key_value_heads
    out = []
    for t in range(len(x)):
        o = []
        for i in range(heads):
            own = slice(i * v, (i + 1) * v)
            kept = slice(i // per_key * v, (i // per_key + 1) * v)
            q = rotate(weight["q_proj.weight"][own] @ x[t], t, config)
            logits = [
                q @ rotate(weight["k_proj.weight"][kept] @ x[j], j, config) * logit_scale(config)
                for j in range(t + 1)
            ]
            shares = softmax(np.array(logits))
            o.append(
                sum(share * weight["v_proj.weight"][kept] @ x[j] for j, share in enumerate(shares))
            )
        out.append(weight["o_proj.weight"] @ np.concatenate(o))
    return np.array(out)


def route(scores: Array, bias: Array, config: ModelConfig) -> list[int]:
    """Who is chosen for one token, best first: equation 16 and the group limit, by sorting."""
    choice = [float(s + b) for s, b in zip(scores, bias, strict=True)]
    size = config.n_routed_experts // config.n_group
    experts_of = [list(range(g * size, (g + 1) * size)) for g in range(config.n_group)]
    if config.topk_group < config.n_group:
        strength = [sum(sorted((choice[e] for e in es), reverse=True)[:2]) for es in experts_of]
        best = sorted(range(config.n_group), key=lambda g: -strength[g])[: config.topk_group]
        allowed = [e for g in best for e in experts_of[g]]
    else:
        allowed = list(range(config.n_routed_experts))
    return sorted(allowed, key=lambda e: -choice[e])[: config.num_experts_per_tok]


def gates(scores: Array, chosen: list[int], config: ModelConfig) -> dict[int, float]:
    """How much each chosen expert counts: raw scores, normalised, times the routed factor."""
    total = sum(scores[e] for e in chosen) if config.norm_topk_prob else 1.0
    return {e: float(scores[e] / total * config.routed_scaling_factor) for e in chosen}


def moe(layer: MoE, config: ModelConfig, x: Array) -> Array:
    """Equation 12 without its residual, token by token."""
    weight = {name: numbers(tensor) for name, tensor in layer.state_dict().items()}
    experts = [weight[f"experts.{part}_proj"] for part in ("gate", "up", "down")]
    out = []
    for u in x:
        scores = sigmoid(weight["gate.weight"] @ u)
        chosen = route(scores, weight["gate.e_score_correction_bias"], config)
        total = np.zeros_like(u)
        if config.n_shared_experts:
            total += swiglu(
                u, *(weight[f"shared_experts.{p}_proj.weight"] for p in ("gate", "up", "down"))
            )
        for e, gate in gates(scores, chosen, config).items():
            total += gate * swiglu(u, *(part[e] for part in experts))
        out.append(total)
    return np.array(out)


# ----------------------------------------------------------------------------------- whole models


def layer(module: nn.Module, config: ModelConfig, x: Array) -> Array:
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""
    weight = {name: numbers(tensor) for name, tensor in module.state_dict().items()}
    attend = mla if config.attention == "mla" else grouped
    eps = config.rms_norm_eps
    x = x + attend(module.self_attn, config, rms_norm(x, weight["input_layernorm.weight"], eps))
    u = rms_norm(x, weight["post_attention_layernorm.weight"], eps)
    if "mlp.gate.weight" in weight:
        return x + moe(module.mlp, config, u)
    return x + swiglu(u, *(weight[f"mlp.{p}_proj.weight"] for p in ("gate", "up", "down")))


def hidden(model: Transformer, tokens: list[int]) -> Array:
    """The main model's state after its final norm, (tokens, width)."""
    config = model.config
    x = numbers(model.model.embed_tokens.weight)[tokens]
    for index in range(config.num_hidden_layers):
        x = layer(model.model.layers[index], config, x)
    return rms_norm(x, numbers(model.model.norm.weight), config.rms_norm_eps)


def mtp_logits(model: Transformer, tokens: list[int], state: Array) -> list[Array]:
    """Equations 21 to 23, depth by depth; the embedding first, as the released weights have it."""
    config = model.config
    table, head = numbers(model.model.embed_tokens.weight), numbers(model.lm_head.weight)
    logits = []
    for depth in range(1, config.num_nextn_predict_layers + 1):
        module = model.model.layers[config.num_hidden_layers + depth - 1]
        weight = {name: numbers(tensor) for name, tensor in module.state_dict().items()}
        rows = []
        for i in range(len(tokens) - depth):
            embedded = table[tokens[i + depth]]
            embedded = rms_norm(embedded, weight["enorm.weight"], config.rms_norm_eps)
            below = rms_norm(state[i], weight["hnorm.weight"], config.rms_norm_eps)
            rows.append(weight["eh_proj.weight"] @ np.concatenate((embedded, below)))
        x = layer(module, config, np.array(rows))
        state = rms_norm(x, weight["shared_head.norm.weight"], config.rms_norm_eps)
        logits.append(state @ head.T)
    return logits
