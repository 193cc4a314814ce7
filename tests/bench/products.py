"""How far from the limit: the matrix products of one run, replayed with nothing between them.

Whatever is fused or launched less, these products remain: the same kernels on the same tensors, in
the same order, so that weights and cache come from the memory they came from. Our time over theirs
is what everything else costs: norms, rotations, routing, Python, and the launch of each small one.
Of a training step the products of the backward pass are replayed, too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.bench.timing import Entrant

PRODUCTS = "our products alone"
KERNELS = (
    "mm", "bmm", "mv", "addmv", "addmm", "baddbmm", "_grouped_mm",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
)  # fmt: skip
VIEWS = (
    "view", "_unsafe_view", "expand", "t", "transpose", "permute", "select", "slice", "split",
    "split_with_sizes", "unsqueeze", "squeeze", "unbind", "detach", "alias", "as_strided",
    "view_as_complex", "view_as_real", "_reshape_alias", "lift_fresh", "promote_types",
)  # fmt: skip


class Recorder(TorchDispatchMode):
    """Notes every product, with its operands, and counts whatever else is launched."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[Callable[[], object]] = []
        self.others = 0

    def __torch_dispatch__(
        self, func: Any, types: object, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run it, and keep it if it multiplies matrices."""
        name = func.overloadpacket.__name__
        if name in KERNELS:
            self.products.append(partial(func, *args, **(kwargs or {})))
        elif name not in VIEWS:
            self.others += 1
        return func(*args, **(kwargs or {}))


def record(run: Callable[[], object]) -> Recorder:
    """What one ``run`` launches. It keeps the operands, so they stay as large as they were."""
    with Recorder() as recorder:
        run()
    if not recorder.products:
        raise RuntimeError("no product was recorded; add the kernel's name to KERNELS")
    return recorder


def products_alone(ours: Entrant) -> tuple[Entrant, dict[str, int]]:
    """Who races against ``ours`` with its products; and how many launches of each kind it takes."""
    recorder = record(ours.run)
    launches = {"products": len(recorder.products), "others": recorder.others}
    return Entrant(partial(replay, recorder), times=ours.times), launches


@torch.no_grad()
def replay(recorder: Recorder) -> None:
    """The products and nothing else."""
    for product in recorder.products:
        product()
