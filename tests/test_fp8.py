"""fp8: products of blocks, linear layers against slow loops, and conversion of a whole model."""

from __future__ import annotations

from collections.abc import Sequence
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
from dsv3_mini.course.fp8_formats import formats
from dsv3_mini.fp8 import E4M3, E5M2, KEPT, SQUARE, TENSOR, TILE, Block, Recipe, convert_to_fp8
from dsv3_mini.fp8_numbers import _scaled_mm
from tests.reference import fp8 as reference
from tests.reference import oracles

V3, BF16 = Recipe(), Recipe(torch.bfloat16, torch.bfloat16)

# ------------------------------------------------------------------------------ products of blocks


@pytest.mark.parametrize(("a_block", "b_block"), [
    (TILE, SQUARE), (TILE, TILE), (SQUARE, TILE), (TILE, TENSOR), ((1, None),) * 2, (TENSOR,) * 2,
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
    for every in (None, 128):
        ours = fp8.matmul(a, b.T, None, every, scale_a, scale_b.T)
        if every or a_block[1] or b_block[1]:
            np.testing.assert_array_equal(ours, wanted)
        exact = fp8.dequantize(a, scale_a, a_block) @ fp8.dequantize(b, scale_b, b_block).T
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(("changes", "message"), [
    ({"b": torch.ones(200, 3).T}, r"cannot multiply \(2, 200\) by \(3, 200\); expected \(M, K"),
    ({"a": torch.ones(200)}, r"cannot multiply \(200,\) by .* expected \(M, K\) and \(K, N"),
    *(({"accumulate_bits": n}, f"accumulate_bits is {n}; expected 2 to 24")
      for n in (1, 25, 14.0, True)),
    *(({"promote_every": n}, f"promote_every is {n}; expected 1 or") for n in (0, -1, 2.0)),
    *(({"promote_every": n, "accumulate_bits": 14, "scale_a": torch.ones(2, 2)},
       f"promote_every is {n}, but scales change every 128 .*a divisor of 128")
      for n in (None, 48, 256)),
    ({"promote_every": 40, "scale_b": torch.ones(2, 3)}, "promote_every is 40, but scales"),
    ({"scale_a": torch.ones(3, 2)}, r"scale_a has shape \(3, 2\); expected a scale for each"),
    ({"scale_a": torch.ones(2, 3)}, r"scale_a .* and 1 or 2 along K = 200"),
    ({"scale_b": torch.ones(2, 2)}, "scale_b has shape .* for each of 3 or for each 128"),
])  # fmt: skip
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
        assert (out.shape, out.dtype) == ((m, n), torch.float32)
    if torch.__version__ >= "2.14":
        pytest.skip("this torch's meta device looks at no scale: that it took these says little")
    with pytest.raises(RuntimeError, match="scale"):  # so the meta device does look
        _scaled_mm(a, b, torch.empty(m, k // 128 + 1, device="meta"), scale_b)


def test_which_products_a_hopper_card_makes_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The card is pretended, and the operands are no more than what is asked of them."""

    def choose(capability: tuple[int, int] = (9, 0), **changes: Any) -> str:
        monkeypatch.setattr(F, "scaled_mm", None, raising=False)  # older releases lack it
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        case: dict[str, Any] = {"a": (64, 256), "b": (256, 384), "scale_a": (64, 2),
                                "scale_b": (2, 3), "dtype": E4M3, "is_cuda": True}  # fmt: skip
        case.update(changes, device="cuda")
        a, b = (SimpleNamespace(**case, shape=case[name]) for name in "ab")
        scales = (case[name] and torch.ones(case[name]) for name in ("scale_a", "scale_b"))
        return fp8.backend(a, b, *scales)  # type: ignore[arg-type]

    assert choose() == choose(scale_b=(2, 384)) == choose(a=(1, 256), scale_a=(1, 2)) == "scaled_mm"
    cases: list[dict[str, Any]] = [
        {"capability": (8, 9)}, {"capability": (10, 0)}, {"dtype": E5M2}, {"is_cuda": False},
        {"scale_a": None}, {"scale_b": None}, {"scale_a": (64, 1)}, {"scale_a": (1, 2)},
        {"scale_b": (1, 1)}, {"scale_b": (1, 384)}, {"b": (256, 200), "scale_b": (2, 200)},
        {"a": (64, 200), "b": (200, 384), "scale_a": (64, 1), "scale_b": (1, 3)},
    ]  # fmt: skip
    assert [case for case in cases if choose(**case) != "emulated"] == []


# ------------------------------------------------------------------------------------ linear layers


def operands(tokens: int, inputs: int, outputs: int) -> list[Tensor]:
    """Input, weight and gradient of the output; rows and columns differ in size, so tiles count."""
    shapes = ((tokens, inputs), (outputs, inputs), (tokens, outputs))
    powers = [torch.randint(-4, 5, (r, 1)) + torch.randint(-4, 5, (1, c)) for r, c in shapes]
    return [torch.randn(power.shape) * 2.0**power for power in powers]


def run(operands: Sequence[Tensor], recipe: Recipe = V3) -> list[Tensor]:
    """y, dx and dW."""
    x, weight = (t.clone().requires_grad_() for t in operands[:2])
    y = fp8.linear(x, weight, recipe, "layer")
    return [y.detach(), *torch.autograd.grad(y, (x, weight), operands[2])]


@pytest.mark.parametrize("gradient", [E4M3, E5M2])
@pytest.mark.parametrize("sizes", [(5, 7, 3), (200, 140, 150), (260, 257, 5), (3, 5, 300)])
def test_all_three_products(sizes: tuple[int, int, int], gradient: torch.dtype) -> None:
    x, weight, g = operands(*sizes)
    kind = reference.E4M3 if gradient == E4M3 else reference.E5M2
    wanted = reference.linear(x.numpy(), weight.numpy(), g.numpy(), gradient_kind=kind)
    ours = run((x, weight, g), Recipe(gradient=gradient))
    for got, slow, exact in zip(ours, wanted, (x @ weight.T, g @ weight, g.T @ x), strict=True):
        largest = np.abs(slow).max()
        np.testing.assert_allclose(got, slow, rtol=1e-5, atol=1e-5 * largest)
        assert np.abs(exact.numpy() - slow).max() > 1e-3 * largest


def test_batches_are_rows() -> None:
    x, weight, g = operands(6, 140, 130)
    batch = run((x.view(2, 3, 140), weight, g.view(2, 3, 130)))
    for got, flat in zip(batch, run((x, weight, g)), strict=True):
        assert torch.equal(got.view_as(flat), flat)
    turned = x.view(2, 3, 140).transpose(0, 1)
    torch.testing.assert_close(fp8.linear(turned, weight), batch[0].transpose(0, 1))


def test_dtypes_stay() -> None:
    """bf16 activations come out as bf16, and the fp32 weight gets an fp32 gradient."""
    x, weight, g = operands(6, 140, 130)
    narrow = run((x.bfloat16(), weight, g.bfloat16()))
    wide = run((x.bfloat16().float(), weight, g.bfloat16().float()))
    assert [t.dtype for t in narrow] == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert all(torch.equal(t, w.to(t.dtype)) for t, w in zip(narrow, wide, strict=True))


def test_casts_without_scales() -> None:
    drawn = [t * 64**n for n, t in enumerate(operands(6, 300, 130))]  # some are past the end
    kinds = (reference.E4M3, reference.E4M3, reference.E5M2)
    plain = [kind.decode_all(kind.encode(t)) for t, kind in zip(drawn, kinds, strict=True)]
    narrow = [t.bfloat16().float() for t in drawn]
    for recipe, rounded in ((BF16, narrow), (Recipe(gradient=E5M2, scaled=False), plain)):
        x, weight, g = map(torch.as_tensor, rounded)
        wanted = (x @ weight.T, g @ weight, g.T @ x)
        for got, exact in zip(run(drawn, recipe), wanted, strict=True):
            torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))


@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize("blocks", [(TILE, SQUARE, TILE), (TENSOR, TENSOR, (1, None))])
def test_every_setting_reaches_every_product(blocks: list[Block], align: bool) -> None:
    x_block, w_block, g_block = blocks
    x, weight, g = operands(150, 140, 130)
    sums: Any = {"accumulate_bits": 8, "promote_every": 64, "align": align}
    recipe = Recipe(E5M2, E4M3, x_block, w_block, g_block, power_of_two=True, **sums)
    x_cast = fp8.quantize(x, x_block, E5M2, True)
    w, w_scale = fp8.quantize(weight, w_block, E5M2, True)
    again, again_scale = fp8.quantize(fp8.dequantize(*x_cast, x_block).T, x_block, E5M2, True)
    g_cast, along = (fp8.quantize(t, g_block, E4M3, True) for t in (g, g.T))
    pairs = ((x_cast, w.T, w_scale.T), (g_cast, w, w_scale), (along, again.T, again_scale.T))
    for got, ((a, scale_a), b, scale_b) in zip(run((x, weight, g), recipe), pairs, strict=True):
        assert torch.equal(got, fp8.matmul(a, b, scale_a=scale_a, scale_b=scale_b, **sums))


def test_no_tokens_make_no_output_and_no_gradient() -> None:
    x, weight = torch.ones(0, 130, requires_grad=True), torch.ones(5, 130, requires_grad=True)
    y = fp8.linear(x, weight)
    assert y.shape == (0, 5)
    dx, dw = torch.autograd.grad(y.sum(), (x, weight))
    assert dx.shape == (0, 130)
    assert torch.equal(dw, torch.zeros(5, 130))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("operand", ["input", "weight", "gradient of the output"])
def test_bad_numbers_name_layer_and_operand(operand: str, bad: float) -> None:
    tensors = operands(5, 140, 130)
    tensors[("input", "weight", "gradient of the output").index(operand)][3, 2] = bad
    with pytest.raises(ValueError, match=f"^layer: {operand} has infinite or NaN"):
        run(tensors)


def test_a_weight_that_cannot_be_cast_is_found_in_a_whole_model() -> None:
    """Linear layers and experts say which of them it was."""
    for weight, name in (
        ("experts.gate_proj", "experts"),
        ("shared_experts.up_proj.weight", "shared_experts.up_proj"),
    ):
        model = oracles.shaken(ModelConfig.tiny())
        convert_to_fp8(model)
        model.get_parameter(f"model.layers.1.mlp.{weight}").data.fill_(torch.inf)
        wanted = f"^model.layers.1.mlp.{name}: weight has infinite or NaN"
        with pytest.raises(ValueError, match=wanted):
            model(torch.tensor([[1, 2, 3]]))


# ------------------------------------------------------------------------------------- whole models

ATTENTION = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
SWIGLU = ("gate_proj", "up_proj", "down_proj")
CAST = [f"model.layers.{i}.self_attn.{name}" for i in range(3) for name in ATTENTION]
CAST += [f"model.layers.0.mlp.{name}" for name in SWIGLU]
CAST += [f"model.layers.{i}.mlp.shared_experts.{name}" for i in (1, 2) for name in SWIGLU]
CAST += [f"model.layers.{i}.mlp.experts" for i in (1, 2)]
PARTS = (*ATTENTION, *SWIGLU, "experts", *KEPT)
REST = ["lm_head", "model.layers.1.mlp.gate", "model.layers.2.eh_proj", "model.layers.2.mlp.gate"]


def tiny() -> Transformer:
    return oracles.shaken(ModelConfig.tiny()).requires_grad_()


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        result = model(torch.arange(20).view(2, 10) * 5, mtp=True)
    return torch.cat([result.logits, result.mtp_logits[0]], dim=1)


@pytest.mark.parametrize("keep", [KEPT, ()])
def test_what_is_converted(keep: tuple[str, ...]) -> None:
    model, plain = tiny(), tiny()
    wanted = CAST if keep else CAST + REST
    assert sorted(convert_to_fp8(model, keep=keep)) == sorted(wanted)
    mtp = model.model.get_submodule("layers.2")
    assert model.lm_head is mtp.get_submodule("shared_head.head")
    assert model.model.embed_tokens is mtp.get_submodule("embed_tokens")
    for (name, module), (_, old) in zip(model.named_modules(), plain.named_modules(), strict=True):
        cast = type(module) is fp8.Fp8Linear or "linear" in vars(module)
        assert cast == (name in wanted), name
        assert type(module) in (type(old), fp8.Fp8Linear)
    for row, (name, _) in zip(formats(model), plain.named_parameters(), strict=True):
        cast = name.removesuffix(".weight") in wanted or name.rpartition(".")[0] in wanted
        told = ("E4M3 1x128", "E4M3 128x128", "E4M3 1x128") if cast else ("float32",) * 3
        assert row == (name, "float32", *told)


@pytest.mark.parametrize("name", [*PARTS, "all"])
def test_every_converted_part_moves_the_output_and_little(name: str) -> None:
    model, exact = tiny(), outputs(tiny())
    keep = set(KEPT if name == "all" else PARTS) - {name}
    names = {each.rpartition(".")[2] for each in convert_to_fp8(model, keep=keep)}
    assert names == ({*PARTS} - {*KEPT} if name == "all" else {name})
    assert (
        (0.005 if name == "all" else 1e-4) < (outputs(model) - exact).norm() / exact.norm() < 0.15
    )


def test_parameters_stay(tmp_path: Path) -> None:
    model, plain = tiny(), tiny()
    memory = list(model.parameters())
    convert_to_fp8(model, keep=())
    save_pretrained(model, tmp_path / "model")
    assert all(p is old for p, old in zip(model.parameters(), memory, strict=True))
    for after in (model, load_pretrained(tmp_path / "model")):
        pairs = zip(after.state_dict().items(), plain.state_dict().items(), strict=True)
        assert all(name == old and torch.equal(x, y) for (name, x), (old, y) in pairs)


def test_the_last_recipe_counts() -> None:
    once, twice = tiny(), tiny()
    convert_to_fp8(twice, Recipe(E5M2, E5M2, TENSOR, TENSOR, TENSOR))
    assert {row.input for row in formats(twice)} == {"E5M2 allxall", "float32"}
    for model in (once, twice):
        convert_to_fp8(model, Recipe(torch.bfloat16, E5M2, gradient_block=(1, None)))
    assert torch.equal(outputs(once), outputs(twice))
    assert formats(once) == formats(twice)
    told = ("float32", "bfloat16", "bfloat16", "E5M2 1xall")
    assert {row[1:] for row in formats(twice)} == {told, ("float32",) * 4}


@pytest.mark.parametrize(("biases", "keep", "message"), [
    ([False], ("1", "2"), "nothing to keep is called 1, 2; names are the last parts"),
    ([False], ("0",), "no linear layer to convert"),
    ([], KEPT, "no linear layer to convert"),
    ([False, True], KEPT, "^1 has a bias"),
])  # fmt: skip
def test_a_refusal_changes_nothing(biases: list[bool], keep: tuple[str, ...], message: str) -> None:
    model = nn.Sequential(*(nn.Linear(4, 4, bias=bias) for bias in biases))
    with pytest.raises(ValueError, match=message):
        convert_to_fp8(model, keep=keep)
    assert not any(isinstance(layer, fp8.Fp8Linear) for layer in model)


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
