"""What only a card can show. None of this has been run on one yet; without one it is skipped.

Each test compares a fused path with the plain one that the CPU tests have proved right.
"""

from __future__ import annotations

import pytest
import torch

from dsv3_mini import ModelConfig, Transformer, fp8
from dsv3_mini.course.experts import small_moe
from dsv3_mini.data import load_corpus
from dsv3_mini.generate import generate
from dsv3_mini.train import TrainConfig, train
from tests.reference.configs import randomise

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")


def test_forward_and_greedy_decoding_equal_the_cpu() -> None:
    model = randomise(Transformer(ModelConfig.mini()), 0).eval()
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        expected, text = model(tokens, mtp=True), generate(model, tokens, 8)
        model.cuda()
        ours = model(tokens.cuda(), mtp=True)
    torch.testing.assert_close(ours.logits.cpu(), expected.logits, rtol=0, atol=1e-3)
    torch.testing.assert_close(ours.mtp_logits[0].cpu(), expected.mtp_logits[0], rtol=0, atol=1e-3)
    assert torch.equal(generate(model, tokens, 8).cpu(), text)


@pytest.mark.parametrize("counts", [[3, 0, 1, 5, 0, 0, 2, 1], [0] * 7 + [4], [16] * 8])
def test_grouped_experts_equal_those_in_turn(counts: list[int]) -> None:
    config = ModelConfig.tiny().replace(hidden_size=64, moe_intermediate_size=32)
    layer = randomise(Transformer(config), 0).model.layers[1]
    experts = layer.get_submodule("mlp.experts").to("cuda", torch.bfloat16)
    x = torch.randn(3, 64, device="cuda", dtype=torch.bfloat16)
    token = torch.randint(3, (sum(counts),), device="cuda")
    gates = torch.rand(sum(counts), 1, device="cuda", dtype=torch.bfloat16)
    wanted = torch.tensor(counts, device="cuda")
    with torch.no_grad():
        ours, others = (run(x, token, gates, wanted) for run in (experts.grouped, experts.in_turn))
    torch.testing.assert_close(ours, others, rtol=0.05, atol=0.05 * float(others.abs().max()))


@pytest.mark.parametrize("rows", [1, 7, 128])
def test_block_scaled_products_equal_the_emulated_ones(rows: int) -> None:
    x, w = torch.randn(rows, 384, device="cuda"), torch.randn(256, 384, device="cuda")
    (a, scale_a), (b, scale_b) = fp8.quantize(x), fp8.quantize(w, fp8.SQUARE)
    if fp8.backend(a, b.T, scale_a, scale_b.T) != "scaled_mm":
        pytest.skip("needs a Hopper card")
    ours = fp8.matmul(a, b.T, scale_a=scale_a, scale_b=scale_b.T)
    plain = fp8.dequantize(a, scale_a) @ fp8.dequantize(b, scale_b, fp8.SQUARE).T
    torch.testing.assert_close(ours, plain, rtol=0, atol=2e-3 * float(plain.abs().max()))


@pytest.mark.parametrize("cast", [False, True], ids=["fp32", "fp8"])
def test_training_lowers_the_loss(cast: bool) -> None:
    torch.manual_seed(0)
    model = Transformer(small_moe()).cuda()
    settings = TrainConfig(steps=20, batch_size=8, seq_len=64, learning_rate=5e-3, fp8=cast)
    losses = [record.loss for record in train(model, load_corpus(), settings)]
    assert losses[-1] < losses[0] - 0.3
