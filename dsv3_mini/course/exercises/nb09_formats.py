"""Exercises of notebook 09, formats: which parameters are FP8, and what a file of them weighs."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatch
from math import prod
from typing import Any

from dsv3_mini.course.checking import Draw, Drawing, Exercise, Function, Wrong

# ------------------------------------------------------ 09.2 which parameters, 3.3.1 and the file

FORMATS = {
    "*.e_score_correction_bias": "F32",
    "*norm.weight": "BF16",
    "*embed_tokens.weight": "BF16",
    "lm_head.weight": "BF16",
    "*.head.weight": "BF16",
    "*.gate.weight": "BF16",
    "*.eh_proj.weight": "BF16",
    "*.kv_a_proj_with_mqa.weight": "E4M3",
    "*_proj.weight": "E4M3",
}


def file_case(draw: Draw) -> dict[str, Any]:
    def size() -> int:
        return 128 * draw.randint(1, 4) + draw.randint(1, 127)

    layer, mtp = f"model.layers.{draw.randint(3, 60)}", "model.layers.61"
    hidden, experts = size(), draw.randint(8, 64)
    matrices = ["self_attn.q_a_proj", "self_attn.q_b_proj", "self_attn.kv_a_proj_with_mqa",
                "self_attn.kv_b_proj", "self_attn.o_proj", "mlp.shared_experts.up_proj",
                f"mlp.experts.{draw.randint(0, 255)}.gate_proj", "mlp.shared_experts.gate_proj",
                f"mlp.experts.{draw.randint(0, 255)}.down_proj"]  # fmt: skip
    vectors = ["input_layernorm", "self_attn.q_a_layernorm", "post_attention_layernorm"]
    shapes: dict[str, tuple[int, ...]] = {f"{layer}.{m}.weight": (size(), size()) for m in matrices}
    shapes |= {f"{layer}.{vector}.weight": (hidden,) for vector in vectors}
    shapes |= {
        "model.embed_tokens.weight": (size(), hidden),
        "lm_head.weight": (size(), hidden),
        "model.norm.weight": (hidden,),
        f"model.layers.{draw.randint(0, 2)}.mlp.gate_proj.weight": (size(), hidden),
        f"{layer}.mlp.gate.weight": (experts, hidden),
        f"{layer}.mlp.gate.e_score_correction_bias": (experts,),
        f"{mtp}.eh_proj.weight": (hidden, 2 * hidden),
        f"{mtp}.embed_tokens.weight": (size(), hidden),
        f"{mtp}.enorm.weight": (hidden,),
        f"{mtp}.shared_head.norm.weight": (hidden,),
        f"{mtp}.shared_head.head.weight": (size(), hidden),
        f"{mtp}.self_attn.o_proj.weight": (size(), size()),
    }
    return {"shapes": shapes}


def of_every_name(function: Function, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """The bytes of each tensor; the function gets one name and shape at a time."""
    return {name: function(name, shape) for name, shape in shapes.items()}


def bytes_by_pattern(name: str, shape: tuple[int, ...]) -> int:
    """The format from a table of patterns, and blocks counted one after the other."""
    kind = next(kind for pattern, kind in FORMATS.items() if fnmatch(name, pattern))
    blocks = 0
    if kind == "E4M3":
        for _ in range(0, shape[0], 128):
            blocks += sum(1 for _ in range(0, shape[1], 128))
    return {"F32": 4, "BF16": 2, "E4M3": 1}[kind] * prod(shape) + 4 * blocks


def also(cast: Callable[[str], bool]) -> Function:
    """The answer of somebody who casts these, too."""
    return lambda name, shape: in_blocks()("x_proj.weight" if cast(name) else name, shape)


def not_cast(kept: Callable[[str], bool]) -> Function:
    """The answer of somebody who keeps these in BF16, too."""
    return lambda name, shape: (
        2 * prod(shape) if is_cast(name) and kept(name) else bytes_by_pattern(name, shape)
    )


def is_cast(name: str) -> bool:
    return "_proj" in name and "eh_proj" not in name


def in_blocks(
    scales: Callable[[int, int], float] = lambda rows, columns: (
        4 * -(-rows // 128) * -(-columns // 128)
    ),
) -> Function:
    """The answer of somebody for whom the scales of a matrix are so many bytes."""

    def answer(name: str, shape: tuple[int, ...]) -> int:
        if not is_cast(name):
            return bytes_by_pattern(name, shape)
        return prod(shape) + int(scales(*shape))

    return answer


def file_picture(answer: Function) -> Drawing:
    tensors = {
        "router's\nbias": ("mlp.gate.e_score_correction_bias", (256,)),
        "norm": ("input_layernorm.weight", (7168,)),
        "head": ("lm_head.weight", (129280, 7168)),
        "router": ("mlp.gate.weight", (256, 7168)),
        "eh_proj": ("layers.61.eh_proj.weight", (7168, 14336)),
        "kv_a_proj\n_with_mqa": ("self_attn.kv_a_proj_with_mqa.weight", (576, 7168)),
        "expert's\ngate_proj": ("mlp.experts.0.gate_proj.weight", (2048, 7168)),
    }
    names = {name: f"model.layers.61.{tensor}" for name, (tensor, _) in tensors.items()}
    names["head"] = "lm_head.weight"
    groups = {n: answer(names[n], shape) / prod(shape) for n, (_, shape) in tensors.items()}
    return Drawing("bars", {"groups": groups, "ylabel": "bytes a number, with scales"})


FILE = Exercise(
    identifier="09.2", title="Which parameters are FP8",
    difficulty=2, importance=4, minutes=15, lines=6,
    case=file_case, oracle=bytes_by_pattern, picture=file_picture, run=of_every_name,
    alt="bytes a number in V3's files. The router's bias has four. Norms, the head, the router and "
    "eh_proj have two. Projections of attention and experts have one; their scales add so little "
    "that it cannot be seen.",
    wrong=(
        Wrong(also(lambda name: "bias" not in name and "norm" not in name),
              "every matrix is cast: head, embedding, router and eh_proj, too. Which of them would "
              "pass an error on to everything after it?"),
        Wrong(also(lambda name: "eh_proj" in name),
              "eh_proj is taken for a projection as the others; V3's files keep it in BF16"),
        Wrong(also(lambda name: name.endswith("gate.weight")),
              "the router is cast; a small error there changes which experts are chosen"),
        Wrong(also(lambda name: "shared_head.head" in name),
              "the head of multi-token prediction is cast; it is a head by another name"),
        Wrong(not_cast(lambda name: "gate" in name),
              "gate_proj is taken for the router, whose name is gate"),
        Wrong(not_cast(lambda name: "self_attn" in name),
              "attention's projections stay BF16; what stays is the attention itself, which has no "
              "weights"),
        Wrong(not_cast(lambda name: "shared_experts" in name),
              "the shared expert stays BF16; it is cast as the routed ones are"),
        Wrong(lambda name, shape: 4 * prod(shape) if len(shape) == 1
              else bytes_by_pattern(name, shape),
              "norms are counted with four bytes a number; in V3's files only the router's bias "
              "has them"),
        Wrong(lambda name, shape: 2 * prod(shape) if "bias" in name
              else bytes_by_pattern(name, shape),
              "the router's bias is counted in BF16"),
        Wrong(in_blocks(lambda rows, columns: 0),
              "the scales are forgotten: without them codes mean nothing"),
        Wrong(in_blocks(lambda rows, columns: 4),
              "one scale for a matrix; a weight has one for each block", 24),
        Wrong(in_blocks(lambda rows, columns: 4 * (rows // 128) * (columns // 128)),
              "the blocks at the ragged edges have no scale", 24),
        Wrong(in_blocks(lambda rows, columns: 4 * -(-rows * columns // 128**2)),
              "blocks are counted as if numbers could be moved from one to the next; each edge has "
              "its own smaller ones", 24),
        Wrong(in_blocks(lambda rows, columns: 4 * rows * -(-columns // 128)),
              "a scale for each 1x128 tile, as activations have it; weights have square "
              "blocks", 24),
        Wrong(in_blocks(lambda rows, columns: 2 * -(-rows // 128) * -(-columns // 128)),
              "scales are counted with two bytes each; they are fp32"),
    ),
)  # fmt: skip

EXERCISES = (FILE,)
