"""V3's width on a card that is not there: devices, shapes and dtypes of every path, no numbers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dsv3_mini import ModelConfig, Transformer, model
from dsv3_mini.course.fake import fake
from dsv3_mini.environment import build_on
from dsv3_mini.moe import Experts
from dsv3_mini.rope import rope_table

# A dense and two MoE layers, and MTP; everything else as in V3.
FEW = ModelConfig.v3().replace(num_hidden_layers=3, first_k_dense_replace=1)


@pytest.fixture
def v3() -> Iterator[Transformer]:
    with fake():
        yield build_on("cuda", Transformer, FEW)


def tokens(count: int, batch: int = 2) -> Tensor:
    return torch.zeros(batch, count, dtype=torch.int64, device="cuda")


def test_forward_with_mtp(v3: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Experts, "in_turn")  # on a card experts are grouped: no wait for counts
    for fused in (True, False):
        out = v3(tokens(9), mtp=True, fused=fused)
        assert out.logits.shape == (2, 9, 129280)
        assert out.mtp_logits[0].shape == (2, 8, 129280)
        assert out.logits.device.type == out.mtp_logits[0].device.type == "cuda"
        assert out.logits.dtype == torch.bfloat16
        assert out.router_counts.shape == (3, 256)
    assert v3.lm_head.weight is v3.get_parameter("model.layers.3.shared_head.head.weight")
    assert v3.gates[0].e_score_correction_bias.dtype == torch.float32


@pytest.mark.parametrize("absorb", [None, True, False])
@pytest.mark.parametrize("expanded", [False, True])
def test_prefill_and_decode_with_a_cache(
    v3: Transformer, absorb: bool | None, expanded: bool
) -> None:
    if absorb and expanded:
        pytest.skip("an expanded cache holds no latents to absorb into")
    cache = v3.new_cache(2, 20, mtp=True, expanded=expanded)
    v3(tokens(9), cache, mtp=True, absorb=absorb)
    assert v3(tokens(1), cache, mtp=True, absorb=absorb).logits.shape == (2, 1, 129280)
    assert cache.length == 10
    numbers = 128 * (192 + 128) if expanded else 576
    assert cache.nbytes == 3 * 2 * 10 * numbers * 2
    assert {store.device.type for store in cache.stores} == {"cuda"}


def test_a_table_left_on_the_cpu_is_caught(
    v3: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_the_cpu(config: ModelConfig, start: int, length: int, _: str) -> tuple[Tensor, Tensor]:
        return rope_table(config, start, length, "cpu")

    monkeypatch.setattr(model, "rope_table", on_the_cpu)
    with pytest.raises(Exception, match="cpu"):
        v3(tokens(4))
