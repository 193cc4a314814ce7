"""A card that is not there: shapes, dtypes and devices run, numbers do not.

Why: 671B parameters fit on no laptop, but a wrong shape or a tensor left on the CPU shows without a
single number. torch's fake tensors carry shape, dtype and device through every operation and refuse
to mix devices. What they cannot show: numbers, time, memory in use, and (without CUDA in torch) a
backward pass.

Make tensors on the device that they belong to, ``torch.zeros(1, 8, device="cuda")``, and modules by
``environment.build_on``: ``.to("cuda")`` needs a torch that was built with CUDA.
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
def fake() -> Iterator[None]:
    """Every tensor that is made inside is fake, on the CPU and on cuda; gradients are off.

    A question that only numbers could answer, ``bool(x.isfinite().all())``, is answered yes, so
    that checks of values pass. Reading a number (``item``, ``tolist``) raises.
    """
    # Recorded for a backward pass, a cuda tensor would end the process: torch looks for a card.
    with torch.no_grad(), FakeTensorMode(), _Named():
        yield


class _Named(TorchFunctionMode):
    """What torch, built without CUDA, would ask a card for, by operations that do not."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.__getitem__:
            return _take(*args)
        if func is Tensor.__setitem__:
            x, key, value = args
            return torch.ops.aten.copy_(_take(x, key), value)
        if func is Tensor.contiguous:
            return args[0].clone(memory_format=torch.contiguous_format)
        if func is Tensor.__invert__:
            return torch.bitwise_not(*args)
        if func is Tensor.__bool__:
            return True
        if func is nn.init.kaiming_uniform_:  # how an nn.Linear begins; there are no numbers
            return kwargs["tensor"]
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
