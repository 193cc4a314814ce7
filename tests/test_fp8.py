"""fp8: products of blocks, linear layers against slow loops, and conversion of a whole model."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_mini import ModelConfig, Transformer, fp8
from dsv3_mini.checkpoint import load_pretrained, save_pretrained
from dsv3_mini.fp8 import E4M3, E5M2, KEPT, SQUARE, TENSOR, TILE, Block, Recipe, convert_to_fp8
from dsv3_mini.fp8_numbers import _scaled_mm
from tests.reference import fp8 as reference
from tests.reference import oracles

V3 = Recipe()
ROWS: Block = (1, None)

# ------------------------------------------------------------------------------ products of blocks


@pytest.mark.parametrize(("a_block", "b_block"), [
    (TILE, SQUARE), (TILE, TILE), (SQUARE, TILE), (TILE, TENSOR), (ROWS, ROWS), (TENSOR, TENSOR),
])  # fmt: skip
def test_scales_are_applied_where_they_belong(a_block: Block, b_block: Block) -> None:
    """A slow loop over K; codes are whole numbers, so that only the scales' order can round."""
    a, b = (torch.randint(-15, 16, shape).float() for shape in ((130, 300), (140, 300)))
    scale_a, scale_b = (torch.rand_like(fp8.quantize(x, block)[1]) for x, block in
                        ((a, a_block), (b, b_block)))  # fmt: skip
    wanted = np.zeros((130, 140), dtype=np.float32)
    for k in range(0, 300, 128):
        part = (a[:, k : k + 128] @ b[:, k : k + 128].T).numpy()
        for m, n in product(range(130), range(140)):
            one = scale_a[m // (a_block[0] or 130), k // (a_block[1] or 300)].numpy()
            other = scale_b[n // (b_block[0] or 140), k // (b_block[1] or 300)].numpy()
            wanted[m, n] += part[m, n] * one * other
    a, b = a.to(E4M3), b.to(E4M3)
    every_128 = fp8.matmul(a, b.T, None, 128, scale_a, scale_b.T)
    np.testing.assert_array_equal(every_128, wanted)
    alone = fp8.matmul(a, b.T, scale_a=scale_a, scale_b=scale_b.T)
    if a_block[1] or b_block[1]:
        assert torch.equal(alone, every_128)
    wide = [fp8.dequantize(a, scale_a, a_block), fp8.dequantize(b, scale_b, b_block)]
    exact = wide[0].double() @ wide[1].double().T
    torch.testing.assert_close(alone.double(), exact, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"b": torch.ones(200, 3).T}, r"cannot multiply \(2, 200\) by \(3, 200\); expected \(M, K"),
        ({"a": torch.ones(200)}, r"cannot multiply \(200,\)"),
        ({"b": torch.ones(1, 200, 3)}, r"cannot multiply .* expected \(M, K\) and \(K, N\)"),
        *(({"accumulate_bits": n}, f"accumulate_bits is {n}; expected 2 to 24")
          for n in (1, 25, 14.0, True)),
        *(({"promote_every": n}, f"promote_every is {n}; expected 1 or") for n in (0, -1, 2.0)),
        *(({"promote_every": n, "accumulate_bits": 14, "scale_a": torch.ones(2, 2)},
           f"promote_every is {n}, but scales change every 128 .*a divisor of 128")
          for n in (None, 48, 256)),
        ({"promote_every": 40, "scale_b": torch.ones(2, 3)}, "promote_every is 40, but scales"),
        ({"scale_a": torch.ones(3, 2)}, r"scale_a has shape \(3, 2\); expected a scale for each"),
        ({"scale_a": torch.ones(2, 3)}, r"scale_a .* and 1 or 2 along K = 200"),
        ({"scale_a": torch.ones(2)}, r"scale_a has shape \(2,\)"),
        ({"scale_b": torch.ones(2, 2)}, "scale_b has shape .* for each of 3 or for each 128"),
    ],
)  # fmt: skip
def test_wrong_arguments_of_matmul(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fp8.matmul(**{"a": torch.ones(2, 200), "b": torch.ones(200, 3), **changes})


@pytest.mark.skipif(not hasattr(F, "scaled_mm"), reason="this torch has no block-scaled product")
@pytest.mark.parametrize("square", [True, False])
@pytest.mark.parametrize("m", [128, 7, 1])
@pytest.mark.parametrize(("k", "n"), [(128, 128), (512, 256), (640, 384), (1024, 128)])
def test_torch_accepts_what_a_card_would_get(m: int, k: int, n: int, square: bool) -> None:
    """The meta device checks shapes and strides; K / 128 is and is not a multiple of 4."""
    a, b = (torch.empty(s, dtype=E4M3, device="meta") for s in ((m, k), (k, n)))
    scale_a = torch.empty(m, k // 128, device="meta")
    scale_b = torch.empty(k // 128, n // 128 if square else n, device="meta")
    for scales in ((scale_a, scale_b), (scale_a, scale_b.T.contiguous().T)):
        out = _scaled_mm(a, b, *scales)
        assert out.shape == (m, n)
        assert out.dtype == torch.float32
    with pytest.raises(RuntimeError, match="scale"):  # so the meta device does look
        _scaled_mm(a, b, torch.empty(m, k // 128 + 1, device="meta"), scale_b)


def test_which_products_a_hopper_card_makes_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The card is pretended, and the operands are no more than what is asked of them."""

    def choose(capability: tuple[int, int] = (9, 0), **changes: Any) -> str:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        case = {"a": (64, 256), "b": (256, 384), "scale_a": (64, 2), "scale_b": (2, 3)}
        case |= {"dtype": E4M3, "cuda": True, **changes}
        asked = {"dtype": case["dtype"], "is_cuda": case["cuda"], "device": "cuda"}
        operands: list[Any] = [SimpleNamespace(shape=case[x], **asked) for x in "ab"]
        return fp8.backend(*operands, *(case[s] and torch.ones(case[s])
                                        for s in ("scale_a", "scale_b")))  # fmt: skip

    assert choose() == choose(scale_b=(2, 384)) == choose(a=(1, 256), scale_a=(1, 2)) == "scaled_mm"
    for no in ({"capability": (8, 9)}, {"capability": (10, 0)}, {"dtype": E5M2}, {"cuda": False},
               {"scale_a": None}, {"scale_b": None}, {"scale_a": (64, 1)}, {"scale_a": (1, 2)},
               {"scale_b": (1, 1)}, {"scale_b": (1, 384)}, {"scale_b": (2, 1)},
               {"b": (256, 200), "scale_b": (2, 2)}, {"a": (64, 200), "b": (200, 384)}):  # fmt: skip
        assert choose(**no) == "emulated", no
    codes, scale = fp8.quantize(torch.ones(128, 256))
    assert fp8.backend(codes, codes.T, scale, scale.T) == "emulated"  # on a CPU


# ------------------------------------------------------------------------------------ linear layers


def operands(tokens: int, inputs: int, outputs: int) -> list[Tensor]:
    """Input, weight and gradient of the output; rows and columns differ in size, so tiles count."""
    shapes = ((tokens, inputs), (outputs, inputs), (tokens, outputs))
    sizes = [(2.0 ** torch.randint(-4, 5, (r, 1)), 2.0 ** torch.randint(-4, 5, (1, c)))
             for r, c in shapes]  # fmt: skip
    return [torch.randn(s) * one * two for s, (one, two) in zip(shapes, sizes, strict=True)]


def run(x: Tensor, weight: Tensor, g: Tensor, recipe: Recipe = V3) -> list[Tensor]:
    """y, dx and dW."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = fp8.linear(x, weight, recipe, "layer")
    return [y.detach(), *torch.autograd.grad(y, (x, weight), g)]


@pytest.mark.parametrize("gradient", [E4M3, E5M2])
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (5, 7, 3), (200, 140, 150), (129, 257, 5), (3, 5, 300), (260, 9, 17)]
)
def test_all_three_products(sizes: tuple[int, int, int], gradient: torch.dtype) -> None:
    kind = reference.E4M3 if gradient == E4M3 else reference.E5M2
    x, weight, g = operands(*sizes)
    wanted = reference.linear(x.numpy(), weight.numpy(), g.numpy(), gradient_kind=kind)
    ours = run(x, weight, g, Recipe(gradient=gradient))
    for got, slow, exact in zip(ours, wanted, (x @ weight.T, g @ weight, g.T @ x), strict=True):
        assert got.dtype == torch.float32
        largest = np.abs(slow).max()
        np.testing.assert_allclose(got, slow, rtol=1e-5, atol=2e-6 * largest)
        assert sizes == (1, 1, 1) or np.abs(exact.numpy() - slow).max() > 1e-3 * largest


def test_batches_are_rows() -> None:
    x, weight, g = operands(6, 140, 130)
    batch = run(x.view(2, 3, 140), weight, g.view(2, 3, 130))
    for got, flat in zip(batch, run(x, weight, g), strict=True):
        assert torch.equal(got.view_as(flat), flat)
    turned = x.view(2, 3, 140).transpose(0, 1)
    assert torch.equal(fp8.linear(turned, weight), batch[0].transpose(0, 1))


def test_dtypes_stay() -> None:
    """bf16 activations come out as bf16, and the fp32 weight gets an fp32 gradient."""
    x, weight, g = operands(6, 140, 130)
    narrow = run(x.bfloat16(), weight, g.bfloat16())
    wide = run(x.bfloat16().float(), weight, g.bfloat16().float())
    for got, dtype, same in zip(
        narrow, (torch.bfloat16,) * 2 + (torch.float32,), wide, strict=True
    ):
        assert got.dtype == dtype
        assert torch.equal(got, same.to(dtype))


def test_bfloat16_rounds_without_scales() -> None:
    ours = run(*operands(6, 300, 130), Recipe(torch.bfloat16, torch.bfloat16))
    torch.manual_seed(0)  # the same again
    x, weight, g = (t.bfloat16().float() for t in operands(6, 300, 130))
    for got, wanted in zip(ours, (x @ weight.T, g @ weight, g.T @ x), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize("blocks", [(TILE, SQUARE, TILE), (TENSOR, TENSOR, ROWS)])
def test_every_setting_reaches_every_product(blocks: tuple[Block, ...], align: bool) -> None:
    x_block, w_block, g_block = blocks
    x, weight, g = operands(150, 140, 130)
    ours = run(x, weight, g, Recipe(E5M2, E4M3, *blocks, True, 8, 64, align))
    x_cast, x_scale = fp8.quantize(x, x_block, E5M2, True)
    w_cast, w_scale = fp8.quantize(weight, w_block, E5M2, True)
    g_cast, g_scale = fp8.quantize(g, g_block, E4M3, True)
    again, again_scale = fp8.quantize(
        fp8.dequantize(x_cast, x_scale, x_block).T, x_block, E5M2, True
    )
    along, along_scale = fp8.quantize(g.T, g_block, E4M3, True)
    wanted = [
        fp8.matmul(x_cast, w_cast.T, 8, 64, x_scale, w_scale.T, align),
        fp8.matmul(g_cast, w_cast, 8, 64, g_scale, w_scale, align),
        fp8.matmul(along, again.T, 8, 64, along_scale, again_scale.T, align),
    ]
    for got, slow in zip(ours, wanted, strict=True):
        assert torch.equal(got, slow)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("which", range(3))
def test_bad_numbers_name_layer_and_operand(which: int, bad: float) -> None:
    tensors = operands(5, 140, 130)
    tensors[which][3, 2] = bad
    operand = ("input", "weight", "gradient of the output")[which]
    with pytest.raises(ValueError, match=f"^layer: {operand} has infinite or NaN"):
        run(*tensors)


# ------------------------------------------------------------------------------------- whole models

ATTENTION = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
SWIGLU = ("gate_proj", "up_proj", "down_proj")
CAST = [f"model.layers.{i}.self_attn.{name}" for i in range(3) for name in ATTENTION]
CAST += [f"model.layers.0.mlp.{name}" for name in SWIGLU]
CAST += [f"model.layers.{i}.mlp.shared_experts.{name}" for i in (1, 2) for name in SWIGLU]
CAST += [f"model.layers.{i}.mlp.experts" for i in (1, 2)]
REST = ["lm_head", "model.layers.1.mlp.gate", "model.layers.2.eh_proj", "model.layers.2.mlp.gate"]


def tiny() -> Transformer:
    return oracles.shaken(ModelConfig.tiny()).requires_grad_()


def outputs(model: nn.Module) -> Tensor:
    """Logits of the main model and of MTP, for 20 tokens."""
    with torch.no_grad():
        result = model(torch.arange(20).view(2, 10) * 5, mtp=True)
    return torch.cat([result.logits, result.mtp_logits[0]], dim=1)


@pytest.mark.parametrize("keep", [KEPT, ()])
def test_what_is_converted(keep: tuple[str, ...]) -> None:
    model, plain = tiny(), tiny()
    wanted = CAST if keep else CAST + REST
    assert sorted(convert_to_fp8(model, keep=keep)) == sorted(wanted)
    assert model.lm_head is model.model.layers[-1].shared_head.head
    assert model.model.embed_tokens is model.model.layers[-1].embed_tokens
    for (name, module), (_, old) in zip(model.named_modules(), plain.named_modules(), strict=True):
        cast = type(module) is fp8.Fp8Linear or "linear" in vars(module)
        assert cast == (name in wanted), name
        assert type(module) in (type(old), fp8.Fp8Linear)
    for row, (name, _) in zip(fp8.formats(model), plain.named_parameters(), strict=True):
        cast = name.removesuffix(".weight") in wanted or name.rpartition(".")[0] in wanted
        told = ("E4M3 1x128", "E4M3 128x128", "E4M3 1x128") if cast else ("float32",) * 3
        assert row == (name, "float32", *told)


@pytest.mark.parametrize("name", [*ATTENTION, *SWIGLU, "experts", *KEPT, "all"])
def test_every_converted_part_moves_the_output_and_little(name: str) -> None:
    model, exact = tiny(), outputs(tiny())
    keep = {*ATTENTION, *SWIGLU, "experts", *KEPT} - {name} if name != "all" else KEPT
    names = {each.rpartition(".")[2] for each in convert_to_fp8(model, keep=keep)}
    assert names == ({name} if name != "all" else {*ATTENTION, *SWIGLU, "experts"})
    lowest = 0.005 if name == "all" else 1e-4
    assert lowest < (outputs(model) - exact).norm() / exact.norm() < 0.15


def test_parameters_stay(tmp_path: Path) -> None:
    model, plain = tiny(), tiny()
    memory = [p.data_ptr() for p in model.parameters()]
    convert_to_fp8(model, keep=())
    save_pretrained(model, tmp_path / "model")
    assert memory == [p.data_ptr() for p in model.parameters()]
    for after in (model, load_pretrained(tmp_path / "model")):
        pairs = zip(after.state_dict().items(), plain.state_dict().items(), strict=True)
        assert all(name == old and torch.equal(x, y) for (name, x), (old, y) in pairs)


def test_the_last_recipe_counts() -> None:
    once, twice = tiny(), tiny()
    convert_to_fp8(twice, Recipe(E5M2, E5M2, TENSOR, TENSOR, TENSOR))
    assert {row.input for row in fp8.formats(twice)} == {"E5M2 allxall", "float32"}
    for model in (once, twice):
        convert_to_fp8(model, Recipe(torch.bfloat16, E5M2, gradient_block=ROWS))
    assert torch.equal(outputs(once), outputs(twice))
    assert fp8.formats(once) == fp8.formats(twice)
    experts = [row for row in fp8.formats(twice) if row.name.endswith("experts.up_proj")]
    assert experts[0][1:] == ("float32", "bfloat16", "bfloat16", "E5M2 1xall")


@pytest.mark.parametrize(
    ("layers", "keep", "message"),
    [
        ([nn.Linear(4, 4, bias=False)], ("1", "2"), "nothing to keep is called 1, 2"),
        ([nn.Linear(4, 4, bias=False)], ("0",), "no linear layer to convert"),
        ([nn.ReLU()], KEPT, "no linear layer to convert"),
        ([nn.Linear(4, 4, bias=False), nn.Linear(4, 4)], KEPT, "^1 has a bias"),
    ],
)
def test_what_cannot_be_converted_stays(
    layers: list[nn.Module], keep: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        convert_to_fp8(nn.Sequential(*layers), keep=keep)
    assert not any(isinstance(layer, fp8.Fp8Linear) for layer in layers)


def test_training() -> None:
    """Gradients reach every parameter, and a few steps lower the loss."""
    model, tokens = Transformer(ModelConfig.tiny()), torch.randint(0, 128, (2, 16))
    convert_to_fp8(model)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(12):
        result = model(tokens, mtp=True)
        loss = F.cross_entropy(result.logits[:, :-1].mT, tokens[:, 1:])
        loss = loss + F.cross_entropy(result.mtp_logits[0][:, :-1].mT, tokens[:, 2:])
        optimiser.zero_grad()
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert 0 < parameter.grad.norm() < float("inf"), name
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
