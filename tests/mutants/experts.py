"""Mistakes 11 to 18: the router, its bias, the losses, and models on which nothing can show."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

BALANCE = ("tests/test_balance.py",)
CONFIG = ("tests/test_config.py",)
COVER = ("tests/test_parity.py::test_the_configurations_cover",)
MOE = ("tests/test_moe.py",)
TRAIN = ("tests/test_train.py",)

STEP = "step = torch.sign(load.mean(dim=-1, keepdim=True) - load)"
SHARED = "out_BTD = out_BTD + self.shared_experts(x_BTD)"
P = "p_BE = (scores / scores.sum(dim=-1, keepdim=True)).mean(dim=1)"

MUTANTS = [
    # --------------------------------------------------------------------- 11 the bias leaks
    Mutant(
        11, "gates are biased scores", "moe.py",
        "weights_BTK = scores_BTE.gather(-1, indices_BTK)",
        "weights_BTK = (scores_BTE + self.e_score_correction_bias).gather(-1, indices_BTK)",
        MOE,
    ),
    Mutant(
        11, "gates are raw, but divided by the sum of biased scores", "moe.py",
        "(weights_BTK.sum(dim=-1, keepdim=True) + 1e-20)",
        "choice_BTE.gather(-1, indices_BTK).sum(dim=-1, keepdim=True)",
        MOE,
    ),
    # --------------------------------------------------------------------- 12 how the bias moves
    Mutant(
        12, "the bias is a trained parameter", "moe.py",
        'self.register_buffer("e_score_correction_bias", bias)',
        "self.e_score_correction_bias = nn.Parameter(bias)",
        ("tests/test_moe.py::test_the_bias_is_a_buffer",),
    ),
    Mutant(
        12, "a gradient reaches the bias through the gates", "moe.py",
        "weights_BTK = scores_BTE.gather(-1, indices_BTK)",
        "self.e_score_correction_bias.requires_grad_(torch.is_grad_enabled())\n"
        "        pull_E = self.e_score_correction_bias - self.e_score_correction_bias.detach()\n"
        "        weights_BTK = (scores_BTE + pull_E).gather(-1, indices_BTK)",
        ("tests/test_moe.py::test_no_gradient_reaches_the_bias_and_no_forward_moves_it",),
    ),
    Mutant(
        12, "the step has the wrong sign", "balance.py",
        STEP,
        "step = torch.sign(load - load.mean(dim=-1, keepdim=True))",
        BALANCE,
    ),
    Mutant(
        12, "the step is proportional to the error", "balance.py",
        STEP,
        "step = 1 - load / load.mean(dim=-1, keepdim=True)",
        BALANCE,
    ),
    Mutant(
        12, "the step is a tanh of the error", "balance.py",
        STEP,
        "step = torch.tanh(load.mean(dim=-1, keepdim=True) - load)",
        BALANCE,
    ),
    Mutant(
        12, "no step within a dead zone around the mean", "balance.py",
        STEP,
        "step = load.mean(dim=-1, keepdim=True) - load\n"
        "    step = torch.sign(step) * (step.abs() > 0.1 * load.mean(dim=-1, keepdim=True))",
        BALANCE,
    ),
    Mutant(
        12, "the mean is taken over all layers", "balance.py",
        STEP,
        "step = torch.sign(load.mean() - load)",
        BALANCE,
    ),
    Mutant(
        12, "a step for each micro-batch", "train.py",
        "for gate, load_E in zip(model.gates, counts_LE, strict=True):",
        "for gate, load_E in [p for one in counts for p in zip(model.gates, one, strict=True)]:",
        TRAIN,
    ),
    Mutant(
        12, "only the last micro-batch is counted", "train.py",
        "torch.stack(counts).sum(dim=0) if counts",
        "counts[-1] if counts",
        TRAIN,
    ),
    Mutant(
        12, "the bias moves during evaluation", "train.py",
        "        logits = model(tokens[:, :-1]).logits.flatten(0, 1)\n",
        "        output = model(tokens[:, :-1])\n"
        "        for gate, load_E in zip(model.gates, output.router_counts):\n"
        "            bias_E = gate.e_score_correction_bias\n"
        "            bias_E.copy_(update_bias(bias_E, load_E, 0.001))\n"
        "        logits = output.logits.flatten(0, 1)\n",
        TRAIN,
    ),
    Mutant(
        12, "every forward pass moves the bias", "moe.py",
        "return Routing(scores_BTE, indices_BTK, weights_BTK * config.routed_scaling_factor)",
        "weights_BTK = weights_BTK * config.routed_scaling_factor\n"
        "        routing = Routing(scores_BTE, indices_BTK, weights_BTK)\n"
        "        load_E = routing.counts().float()\n"
        "        self.e_score_correction_bias += 0.001 * torch.sign(load_E.mean() - load_E)\n"
        "        return routing",
        MOE,
    ),
    # --------------------------------------------------------------------- 13 gates
    Mutant(
        13, "softmax gates", "moe.py",
        "self.weight.to(wide)).sigmoid()",
        "self.weight.to(wide)).softmax(dim=-1)",
        MOE,
    ),
    Mutant(
        13, "gates are not normalised over the chosen", "moe.py",
        "if config.norm_topk_prob:",
        "if False:",
        MOE,
    ),
    Mutant(
        13, "gates are normalised over all experts", "moe.py",
        "(weights_BTK.sum(dim=-1, keepdim=True) + 1e-20)",
        "(scores_BTE.sum(dim=-1, keepdim=True) + 1e-20)",
        MOE,
    ),
    Mutant(
        13, "no routed scaling factor", "moe.py",
        "weights_BTK * config.routed_scaling_factor",
        "weights_BTK",
        MOE,
    ),
    # --------------------------------------------------------------------- 14 groups
    Mutant(
        14, "groups are scored by their maximum", "moe.py",
        "by_group.topk(min(2, by_group.shape[-1]), dim=-1).values.sum(dim=-1)",
        "by_group.amax(dim=-1)",
        MOE,
    ),
    Mutant(
        14, "groups are scored by the sum of all their experts", "moe.py",
        "by_group.topk(min(2, by_group.shape[-1]), dim=-1).values.sum(dim=-1)",
        "by_group.sum(dim=-1)",
        MOE,
    ),
    Mutant(
        14, "groups are scored without the bias", "moe.py",
        "drop_BTG1 = ~self.groups(choice_BTE)[..., None]",
        "drop_BTG1 = ~self.groups(scores_BTE)[..., None]",
        MOE,
    ),
    Mutant(
        14, "masked groups are filled with 0", "moe.py",
        'by_group.masked_fill(drop_BTG1, float("-inf"))',
        "by_group.masked_fill(drop_BTG1, 0.0)",
        MOE,
    ),
    Mutant(
        14, "no group is ever masked", "moe.py",
        "if config.topk_group < config.n_group:",
        "if False:",
        MOE,
    ),
    # --------------------------------------------------------------------- 15 shared expert
    Mutant(
        15, "no shared expert", "moe.py",
        "        if self.shared_experts is not None:\n",
        "        if False:\n",
        MOE,
    ),
    Mutant(
        15, "the shared expert is routed", "moe.py",
        SHARED,
        "wants_BT1 = (routing.indices_BTK == 0).any(dim=-1, keepdim=True)\n"
        "            out_BTD = out_BTD + self.shared_experts(x_BTD) * wants_BT1",
        MOE,
    ),
    Mutant(
        15, "the shared expert has a gate", "moe.py",
        SHARED,
        "gate_BT1 = routing.scores_BTE.amax(dim=-1, keepdim=True)\n"
        "            out_BTD = out_BTD + self.shared_experts(x_BTD) * gate_BT1",
        MOE,
    ),
    Mutant(
        15, "the shared expert is scaled by the routed factor", "moe.py",
        SHARED,
        "out_BTD = out_BTD + self.shared_experts(x_BTD) * self.gate.config.routed_scaling_factor",
        MOE,
    ),
    Mutant(
        15, "the shared expert skips the first token", "moe.py",
        SHARED,
        "out_BTD = out_BTD + F.pad(self.shared_experts(x_BTD[:, 1:]), (0, 0, 1, 0))",
        MOE,
    ),
    # --------------------------------------------------------------------- 16 the loss
    Mutant(
        16, "the loss is detached", "balance.py",
        P,
        P + ".detach()",
        BALANCE,
    ),
    Mutant(
        16, "averaged over the batch before the product", "balance.py",
        "return alpha * (f_BE * p_BE).sum(dim=-1).mean()",
        "return alpha * (f_BE.mean(dim=0) * p_BE.mean(dim=0)).sum()",
        BALANCE,
    ),
    Mutant(
        16, "P is made of top-k weights", "balance.py",
        P,
        "scores = scores * picked_BTE\n    " + P,
        BALANCE,
    ),
    Mutant(
        16, "P is made of affinities that are not normalised", "balance.py",
        P,
        "p_BE = scores.mean(dim=1)",
        BALANCE,
    ),
    Mutant(
        16, "without the factor N_r / K_r", "balance.py",
        "f_BE = picked_BTE.mean(dim=1) * (experts / chosen)",
        "f_BE = picked_BTE.mean(dim=1)",
        BALANCE,
    ),
    Mutant(
        16, "without the factor 1 / T", "balance.py",
        "f_BE = picked_BTE.mean(dim=1) * (experts / chosen)",
        "f_BE = picked_BTE.sum(dim=1) * (experts / chosen)",
        BALANCE,
    ),
    Mutant(
        16, "the biased choice is counted", "model.py",
        "best = routing.scores_BTE.topk(chosen, dim=-1).indices",
        "best = routing.indices_BTK[..., :chosen]",
        BALANCE,
    ),
    Mutant(
        16, "the loss is never added", "train.py",
        "((main + extra + config.alpha * balance) / len(batches)).backward()",
        "((main + extra) / len(batches)).backward()",
        TRAIN,
    ),
    # --------------------------------------------------------------------- 17 nothing can show
    Mutant(
        17, "the tests' preset has 8 experts, top 8", "config.py",
        "n_routed_experts=8, num_experts_per_tok=3,",
        "n_routed_experts=8, num_experts_per_tok=8, n_group=1, topk_group=1,",
        CONFIG,
    ),
    Mutant(
        17, "the notebooks' preset chooses everybody in the kept groups", "config.py",
        "n_routed_experts=16, num_experts_per_tok=4,",
        "n_routed_experts=16, num_experts_per_tok=8,",
        CONFIG,
    ),
    Mutant(
        17, "random models choose everybody in the kept groups", "tests/reference/configs.py",
        "num_experts_per_tok=rng.randint(1, topk_group * group_size - 1)",
        "num_experts_per_tok=topk_group * group_size",
        COVER,
    ),
    Mutant(
        17, "random models keep every group", "tests/reference/configs.py",
        "topk_group = rng.randint(1, max(n_group - 1, 1))",
        "topk_group = n_group",
        COVER,
    ),
    # --------------------------------------------------------------------- 18 no bias
    Mutant(
        18, "a router has a bias at hidden size 7168 only", "moe.py",
        'self.register_buffer("e_score_correction_bias", bias)',
        "wide = config.hidden_size == 7168\n"
        '        self.register_buffer("e_score_correction_bias", bias if wide else None)',
        ("tests/test_moe.py::test_the_bias_is_a_buffer",),
    ),
    Mutant(
        18, "a small model's bias is there and not added", "moe.py",
        "choice_BTE = scores_BTE + self.e_score_correction_bias",
        "choice_BTE = scores_BTE + self.e_score_correction_bias * (config.hidden_size == 7168)",
        MOE,
    ),
    Mutant(
        18, "the random models' biases are zero", "tests/reference/configs.py",
        "gate.e_score_correction_bias.normal_(-0.3, 0.5, generator=generator)",
        "gate.e_score_correction_bias.zero_()",
        ("tests/test_parity.py::test_routing_is_decisive_and_biased",),
    ),
    Mutant(
        18, "the oracles' models have a bias that is the same everywhere",
        "tests/reference/oracles.py",
        "drawn = drawn * 0.8 - 1.2",
        "drawn = drawn * 0 - 0.8",
        MOE,
    ),
]  # fmt: skip
