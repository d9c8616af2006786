"""A kernel with all its arguments: the same object runs on a device and compiles ahead of time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vila_deploy.kernels import interpreter  # noqa: F401  prepares it before the first launch

Argument = Tensor | int | float

TYPES = {
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
ALIGNMENT = 16


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Args:
        kernel: a function under `triton.jit`.
        grid: programs along each axis.
        args: what may change without compiling anew; tensors may be on the meta device if the
            launch is only compiled.
        constants: the kernel's constexpr parameters.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Argument]
    constants: dict[str, Any]
    warps: int

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    def __call__(self) -> None:
        self.kernel[self.grid](**self.args, **self.constants, num_warps=self.warps)

    def compiled_constants(self) -> dict[str, Any]:
        """`constants`, and integers that are 1: Triton compiles them in."""
        ones = {n: v for n, v in self.args.items() if isinstance(v, int) and v == 1}
        return self.constants | ones

    def signature(self) -> dict[str, str]:
        """Parameter → Triton's name of its type, as its just-in-time compiler would choose it."""
        types = {name: "constexpr" for name in self.compiled_constants()}
        for name, value in self.args.items():
            if name in types:
                continue
            if isinstance(value, Tensor):
                types[name] = TYPES[value.dtype]
            else:
                types[name] = "fp32" if isinstance(value, float) else "i32"
        return {name: types[name] for name in self.kernel.arg_names}

    def attributes(self) -> dict[tuple[int, ...], list[list[Any]]]:
        """Which arguments are multiples of 16; every tensor of ours is aligned so."""
        marked = {}
        for index, name in enumerate(self.kernel.arg_names):
            value = self.args.get(name)
            whole = isinstance(value, int) and value % ALIGNMENT == 0
            if isinstance(value, Tensor) or whole:
                marked[(index,)] = [["tt.divisibility", ALIGNMENT]]
        return marked


def next_power_of_2(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()
