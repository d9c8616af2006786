"""A kernel with all its arguments: the same object runs on a device and compiles ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila_deploy.kernels import interpreter  # also prepares it before the first launch

Argument = Tensor | int | float | tuple[Any, ...]
Path = tuple[int, ...]

TYPES = {
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
ALIGNMENT = 16
# Among the attributes of a kernel's arguments.
CONSTANTS_ARE_LISTED = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Args:
        kernel: a function under `triton.jit`.
        grid: programs along each axis.
        args: what may change without compiling anew; tensors may be on the meta device if the
            launch is only compiled.
        constants: the kernel's constexpr parameters.
        options: of the compiler and of the launch besides `warps`; the interpreter has none.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Argument]
    constants: dict[str, Any]
    warps: int
    options: dict[str, bool] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    def __call__(self) -> None:
        options = {} if interpreter.INTERPRETED else self.options
        self.kernel[self.grid](**self.args, **self.constants, num_warps=self.warps, **options)

    def overlapped(self) -> Launch:
        """The same by programmatic dependent launch: it begins before the launch before it ends.

        Its kernel waits for that end itself (`boundary.py`). For compute capability 9.0 and above.
        """
        assert "PDL" in self.constants
        return replace(
            self,
            constants=self.constants | {"PDL": True},
            options=self.options | {"launch_pdl": True},
        )

    def compiled_constants(self) -> dict[Path, Any]:
        """`constants`, those within tuples, and integers that are 1: Triton compiles them in."""
        found = {path: each for path, each in self._leaves() if _type_of(each) == "constexpr"}
        own = {
            (self.kernel.arg_names.index(name),): value for name, value in self.constants.items()
        }
        return found | own

    def signature(self) -> dict[str, Any]:
        """Parameter → Triton's name of its type, as its just-in-time compiler would choose it."""
        return dict(zip(self.kernel.arg_names, map(_type_of, self._values()), strict=True))

    def attributes(self) -> dict[Path, list[list[Any]]]:
        """Which arguments are multiples of 16; every tensor of ours is aligned so.

        Other integers have nothing behind them, nor have constants from Triton 3.7 on; as Triton
        says it, what was compiled ahead is found again on the device.
        """
        found: dict[Path, list[list[Any]]] = {}
        for path, value in self._leaves():
            kind = _type_of(value)
            if kind == "constexpr" and CONSTANTS_ARE_LISTED and len(path) == 1:
                found[path] = []
            elif kind not in ("constexpr", "fp32"):
                aligned = isinstance(value, Tensor) or value % ALIGNMENT == 0
                found[path] = [["tt.divisibility", ALIGNMENT]] if aligned else []
        return found

    def _values(self) -> list[Any]:
        """What the kernel's parameters are, in their order."""
        constants = {name: tl.constexpr(value) for name, value in self.constants.items()}
        return [(self.args | constants)[name] for name in self.kernel.arg_names]

    def _leaves(self) -> Iterator[tuple[Path, Any]]:
        """Values and where they stand; of a tuple those within it."""
        for index, value in enumerate(self._values()):
            if isinstance(value, tuple):
                yield from (((index, inner), each) for inner, each in enumerate(value))
            else:
                yield (index,), value


def _type_of(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_type_of, value))
    if isinstance(value, tl.constexpr) or (isinstance(value, int) and value == 1):
        return "constexpr"
    if isinstance(value, Tensor):
        return TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def next_power_of_2(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()
