"""Mistakes 1 to 10: attention, RoPE and the cache."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

ATTENTION = ("tests/test_attention.py",)
CACHE = ("tests/test_cache.py",)
LAYERS = ("tests/test_layers.py",)
MLA = ("tests/test_mla.py",)
ROPE = ("tests/test_rope.py",)
SPECULATIVE = "tests/test_speculative.py"
GREEDY = (f"{SPECULATIVE}::test_greedy_is_token_for_token_the_same",)


def turned(x: str) -> str:
    """Code that rotates as many of the leading dimensions of ``x`` as there are angles for."""
    return (
        f"torch.cat((apply_rope({x}[..., : 2 * cos_TR.shape[1]], "
        f"cos_TR[:, : {x}.shape[-1] // 2], sin_TR[:, : {x}.shape[-1] // 2]), "
        f"{x}[..., 2 * cos_TR.shape[1] :]), -1)"
    )


MUTANTS = [
    # --------------------------------------------------------------------- 1 what is cached
    Mutant(
        1, "MLA's cache holds every head's keys and values", "model.py",
        'kind = KVCache if expanded or config.attention == "gqa" else LatentCache',
        "kind = KVCache",
        CACHE,
    ),
    Mutant(
        1, "as much is reserved for a latent as for all heads", "cache.py",
        "width = config.kv_lora_rank + config.qk_rope_head_dim",
        "width = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)",
        CACHE,
    ),
    # --------------------------------------------------------------------- 2 the rotary key
    Mutant(
        2, "no RoPE at all: every angle is zero", "rope.py",
        "angle_TR = position[:, None] * theta",
        "angle_TR = 0 * position[:, None] * theta",
        ROPE,
    ),
    Mutant(
        2, "the shared key is not rotated", "mla.py",
        "k_rope_BTR = apply_rope(k_rope_BTR, cos_TR, sin_TR)",
        "k_rope_BTR = k_rope_BTR.clone()",
        MLA,
    ),
    Mutant(
        2, "the rotary key is taken from the KV latent", "mla.py",
        "k_rope_BTR = apply_rope(k_rope_BTR, cos_TR, sin_TR)",
        "k_rope_BTR = apply_rope(c_kv_BTC.repeat(1, 1, 16)[..., : widths[1]], cos_TR, sin_TR)",
        MLA,
    ),
    Mutant(
        2, "one rotary key per head is projected", "mla.py",
        "latent = config.kv_lora_rank + config.qk_rope_head_dim",
        "latent = config.kv_lora_rank + heads * config.qk_rope_head_dim",
        ("tests/test_mla.py::test_shapes_of_v3",),
    ),
    Mutant(
        2, "each head has another rotary key", "mla.py",
        "k_rope_BHSR = k_rope_B1SR.expand(-1, k_nope_BHSN.shape[1], -1, -1)",
        "every = [k_rope_B1SR.roll(2 * head, -1) for head in range(k_nope_BHSN.shape[1])]\n"
        "        k_rope_BHSR = torch.cat(every, dim=1)",
        ("tests/test_mla.py::test_one_rotary_key_for_all_heads_and_none_in_values",),
    ),
    # --------------------------------------------------------------------- 3 RoPE where it is not
    Mutant(
        3, "RoPE on the KV latent", "mla.py",
        "        return torch.cat((self.kv_a_layernorm(c_kv_BTC), k_rope_BTR), dim=-1)",
        "        c_kv_BTC = self.kv_a_layernorm(c_kv_BTC)\n"
        f"        c_kv_BTC = {turned('c_kv_BTC')}\n"
        "        return torch.cat((c_kv_BTC, k_rope_BTR), dim=-1)",
        MLA,
    ),
    Mutant(
        3, "RoPE on the content part of the queries", "mla.py",
        "        return q_nope_BHTN, apply_rope(q_rope_BHTR, cos_TR, sin_TR)",
        f"        q_nope_BHTN = {turned('q_nope_BHTN')}\n"
        "        return q_nope_BHTN, apply_rope(q_rope_BHTR, cos_TR, sin_TR)",
        MLA,
    ),
    Mutant(
        3, "RoPE on the values of MLA", "mla.py",
        "            k_BHSK, v_BHSV = self.expand(latent_BSK)\n",
        "            k_BHSK, v_BHSV = self.expand(latent_BSK)\n"
        "            if v_BHSV.shape[2] == cos_TR.shape[0]:\n"
        f"                v_BHSV = {turned('v_BHSV')}\n",
        MLA,
    ),
    Mutant(
        3, "RoPE on the values of the yardstick", "attention.py",
        "v_BGSV = v_BGTV\n",
        "v_BGSV = v_BGTV = apply_rope(v_BGTV, cos_TR, sin_TR)\n",
        ATTENTION,
    ),
    # --------------------------------------------------------------------- 4 norms on latents
    Mutant(
        4, "no norm on the query latent", "mla.py",
        "self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTD)))",
        "self.q_b_proj(self.q_a_proj(x_BTD))",
        MLA,
    ),
    Mutant(
        4, "no norm on the KV latent", "mla.py",
        "torch.cat((self.kv_a_layernorm(c_kv_BTC), k_rope_BTR), dim=-1)",
        "torch.cat((c_kv_BTC, k_rope_BTR), dim=-1)",
        MLA,
    ),
    Mutant(
        4, "the latent is cached before its norm and read as if after", "mla.py",
        "            (latent_BSK,) = cache.append(layer, latent_BSK)",
        "            c = self.config.kv_lora_rank\n"
        "            raw_BTC = self.kv_a_proj_with_mqa(x_BTD)[..., :c]\n"
        "            latent_BSK = torch.cat((raw_BTC, latent_BSK[..., c:]), dim=-1)\n"
        "            (latent_BSK,) = cache.append(layer, latent_BSK)",
        CACHE,
    ),
    # --------------------------------------------------------------------- 5 softmax scale
    Mutant(
        5, "1/sqrt(128), the width of the content part", "rope.py",
        "scale = 1 / math.sqrt(config.qk_head_dim)",
        'width = config.qk_nope_head_dim if config.attention == "mla" else config.v_head_dim\n'
        "    scale = 1 / math.sqrt(width)",
        ROPE,
    ),
    Mutant(
        5, "content and rotary scores are scaled separately", "mla.py",
        "            q_BHTK = torch.cat((q_nope_BHTN, q_rope_BHTR), dim=-1)\n",
        "            both = (q_nope_BHTN, q_rope_BHTR)\n"
        "            total = sum(q.shape[-1] for q in both)\n"
        "            parts = [q * (total / q.shape[-1]) ** 0.5 for q in both]\n"
        "            q_BHTK = torch.cat(parts, dim=-1)\n",
        MLA,
    ),
    Mutant(
        5, "decoding scales by the absorbed width, 576", "mla.py",
        "q_BHTK = q_BHTK * softmax_scale(self.config)",
        "q_BHTK = q_BHTK * q_BHTK.shape[-1] ** -0.5",
        MLA,
    ),
    # --------------------------------------------------------------------- 6 YaRN
    Mutant(
        6, "every frequency is divided: plain interpolation", "rope.py",
        "keep = 1.0 - yarn_ramp(width, theta, scaling, device)",
        "keep = torch.zeros_like(plain)",
        ROPE,
    ),
    Mutant(
        6, "beta_slow and beta_fast are taken for indices of pairs", "rope.py",
        "return width * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))",
        "return scaling.beta_fast + scaling.beta_slow - turns + 0 * length",
        ROPE,
    ),
    Mutant(
        6, "no mscale in the softmax scale", "rope.py",
        "if config.rope_scaling is not None and config.rope_scaling.mscale_all_dim:",
        "if False:",
        ROPE,
    ),
    Mutant(
        6, "mscale in the softmax scale is not squared", "rope.py",
        "config.rope_scaling.mscale_all_dim) ** 2",
        "config.rope_scaling.mscale_all_dim)",
        ROPE,
    ),
    # --------------------------------------------------------------------- 7 pairs
    Mutant(
        7, "pair i is dimensions i and i + R/2", "rope.py",
        "wide.unflatten(-1, (-1, 2))",
        "wide.unflatten(-1, (2, -1)).mT.contiguous()",
        ROPE,
    ),
    Mutant(
        7, "rotary rows are put in half-split order when weights are loaded", "checkpoint.py",
        "                    targets[name].copy_(tensor)\n",
        '                    if name.endswith("kv_a_proj_with_mqa.weight"):\n'
        "                        tensor[-4:] = tensor[[-4, -2, -3, -1]]\n"
        "                    targets[name].copy_(tensor)\n",
        ("tests/test_checkpoint.py::test_round_trip_is_exact",),
    ),
    Mutant(
        7, "a checkpoint with half-split pairs is taken as it is", "config.py",
        '{**_FIXED, "rope_interleave": True}.items()',
        "_FIXED.items()",
        ("tests/test_bad_input.py",),
    ),
    # --------------------------------------------------------------------- 8 causal mask
    Mutant(
        8, "the fused path drops the mask when a cache is there", "layers.py",
        "mask = None if square or new == 1 else causal_mask(new, seen, q_BHTD.device)",
        "mask = None",
        LAYERS,
    ),
    Mutant(
        8, "the fused path asks torch for a square mask", "layers.py",
        "square = new == seen",
        "square = True",
        LAYERS,
    ),
    Mutant(
        8, "a square mask meets the longer keys and crashes", "layers.py",
        "mask = None if square or new == 1 else causal_mask(new, seen, q_BHTD.device)",
        "mask = None if square or new == 1 else causal_mask(new, new, q_BHTD.device)",
        LAYERS,
        crash="RuntimeError",
    ),
    Mutant(
        8, "the mask of a rectangle starts at its left corner", "layers.py",
        ".tril(seen - new)",
        ".tril()",
        LAYERS,
    ),
    Mutant(
        8, "the absorbed path drops the mask when a cache is there", "mla.py",
        "        if new > 1:\n",
        "        if new == latent_BSK.shape[1]:\n",
        MLA,
    ),
    Mutant(
        8, "chunks start again at position 0", "model.py",
        "cos, sin = rope_table(self.config, start, tokens.shape[1], str(tokens.device))",
        "cos, sin = rope_table(self.config, 0, tokens.shape[1], str(tokens.device))",
        ("tests/test_mla.py::test_whole_models",),
    ),
    # --------------------------------------------------------------------- 9 size of the cache
    Mutant(
        9, "the cache is counted without the 64 rotary numbers", "accounting.py",
        "    return config.kv_lora_rank + config.qk_rope_head_dim\n",
        "    return config.kv_lora_rank\n",
        ("tests/test_accounting.py",),
    ),
    Mutant(
        9, "nbytes counts what is reserved, not what is held", "cache.py",
        "views = [store[..., : self.length, :] for store in self.stores]",
        "views = self.stores",
        CACHE,
    ),
    # --------------------------------------------------------------------- 10 rejected drafts
    Mutant(
        10, "a rejected draft stays in both caches", "speculative.py",
        "            cache.truncate(cache.length - 1)\n",
        "",
        GREEDY,
    ),
    Mutant(
        10, "truncate leaves the main model's cache as it was", "cache.py",
        "        self.length = length\n",
        "",
        CACHE,
    ),
    Mutant(
        10, "truncate leaves the prediction module's cache as it was", "cache.py",
        "cache.truncate(min(cache.length, max(length - depth, 0)))",
        "cache.truncate(cache.length)",
        CACHE,
    ),
    Mutant(
        10, "truncate keeps the state of a forgotten token", "cache.py",
        "                cache.carry = None\n",
        "                pass\n",
        CACHE,
    ),
    Mutant(
        10, "the state of a rejected draft goes into the next one", "speculative.py",
        "            states_BTD = states_BTD[:, :1]\n",
        "",
        (f"{SPECULATIVE}::test_drafts_are_what_the_module_says_about_the_whole_text",),
    ),
]  # fmt: skip
