"""A model on a card that is not there: shapes, dtypes and devices run, numbers do not.

Why: 671B parameters fit on no laptop, but a wrong shape or a tensor left on the CPU shows without a
single number. torch's fake tensors carry shape, dtype and device through every operation and refuse
to mix devices. What they cannot show: numbers, time, memory in use, and (without CUDA in torch) a
backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode


@contextmanager
def fake(model: nn.Module, device: str = "cuda") -> Iterator[nn.Module]:
    """Inside, the parameters and buffers of ``model`` (on the meta device) are fake on ``device``.

    Tensors made inside are fake as well: ``torch.zeros(1, 8, dtype=torch.int64, device="cuda")``.
    """
    made: dict[Tensor, Tensor] = {}

    def stand_in(tensor: Tensor) -> Tensor:
        if tensor not in made:  # what is shared stays shared
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            parameter = isinstance(tensor, nn.Parameter)
            made[tensor] = nn.Parameter(empty, tensor.requires_grad) if parameter else empty
        return made[tensor]

    with FakeTensorMode(), _Named():
        for module in model.modules():
            for store in (module._parameters, module._buffers):
                for name, tensor in store.items():
                    if tensor is not None:
                        store[name] = stand_in(tensor)  # type: ignore[assignment]
        yield model


class _Named(TorchFunctionMode):
    """``x[...]`` and ``~x`` by named operations: built without CUDA, torch's own want a card."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.__getitem__:
            return _take(*args)
        if func is Tensor.__setitem__:
            x, key, value = args
            return torch.ops.aten.copy_(_take(x, key), value)
        if func is Tensor.__invert__:
            return torch.bitwise_not(*args)
        return func(*args, **(kwargs or {}))


def _take(x: Tensor, key: Any) -> Tensor:
    keys = list(key) if isinstance(key, tuple) else [key]
    if Ellipsis in [k for k in keys if not isinstance(k, Tensor)]:
        at = next(i for i, k in enumerate(keys) if k is Ellipsis)
        rest = x.dim() - sum(k is not None and k is not Ellipsis for k in keys)
        keys[at : at + 1] = [slice(None)] * rest
    dim = 0
    for k in keys:
        if k is None:
            x, dim = x.unsqueeze(dim), dim + 1
        elif isinstance(k, slice):
            x, dim = torch.ops.aten.slice(x, dim, k.start, k.stop, k.step or 1), dim + 1
        elif isinstance(k, Tensor):
            x, dim = torch.ops.aten.index(x, [*[None] * dim, k]), dim + k.dim()
        else:
            x = x.select(dim, k)
    return x
