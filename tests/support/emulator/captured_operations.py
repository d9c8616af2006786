"""torch's operations during the capture of a graph: recorded, and executed by each replay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What a capture ends with an error at: the host would have to wait for a value.
HOST_READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default}


class CapturedOperations(TorchDispatchMode):
    """Appends to `calls` what each operation does to its tensors.

    Nothing that a tensor holds changes during the capture: an operation in place is only recorded.
    One with a new tensor is executed for its shape; the values, computed from what no kernel has
    written yet, are replaced by each replay.
    """

    def __init__(self, calls: list[Callable[[], None]]):
        super().__init__()
        self._calls = calls

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # fmt: skip
        kwargs = kwargs or {}
        if func in HOST_READS:
            raise RuntimeError(f"{func}: operation not permitted when stream is capturing")
        written = _written(func, args, kwargs)
        if written:
            self._calls.append(lambda: func(*args, **kwargs))
            return written[0] if len(func._schema.returns) == 1 else tuple(written)
        result = func(*args, **kwargs)
        given = {_storage(one) for one in _tensors((args, kwargs))}
        new = any(_storage(one) not in given for one in _tensors(result))
        if new and "empty" not in func._schema.name:
            self._calls.append(lambda: _replace(result, func(*args, **kwargs)))
        return result


def _written(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """Return the arguments that the operation changes."""
    found = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(kwargs[argument.name] if argument.name in kwargs else args[index])
    return found


def _replace(before: Any, now: Any) -> None:
    for old, new in zip(_tensors(before), _tensors(now), strict=True):
        old.copy_(new)


def _tensors(result: Any) -> list[Tensor]:
    return [one for one in tree_leaves(result) if isinstance(one, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
