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
from vila_deploy.kernels.cache_key import make_key

Argument = Tensor | int | float | tuple[Any, ...]
# Index of an argument, and within a tuple of its element.
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
        """Name of the kernel."""
        return str(self.kernel.__name__)

    def __call__(self) -> None:
        options = self.options
        if interpreter.INTERPRETED:
            options = {}
        else:
            make_key(self.kernel)
        self.kernel[self.grid](**self.args, **self.constants, num_warps=self.warps, **options)

    def with_pdl(self) -> Launch:
        """Return the same by programmatic dependent launch: begun before the last one's end.

        Its kernel waits for that end itself (`pdl.py`). For compute capability 9.0 and above.
        """
        assert "PDL" in self.constants
        return replace(
            self,
            constants=self.constants | {"PDL": True},
            options=self.options | {"launch_pdl": True},
        )

    def compiled_constants(self) -> dict[Path, Any]:
        """Return what Triton compiles in: `constants`, those within tuples, integers that are 1."""
        implied = {
            path: value
            for path, value in self._leaves()
            if _type_of(value) == "constexpr" and not self._general(path[0])
        }
        named = {
            (self.kernel.arg_names.index(name),): value for name, value in self.constants.items()
        }
        return implied | named

    def signature(self) -> dict[str, Any]:
        """Return Triton's type of each parameter, as its just-in-time compiler would choose it."""
        types = {
            index: "i32" if self._general(index) else _type_of(value)
            for index, value in enumerate(self._values())
        }
        return {self.kernel.arg_names[index]: kind for index, kind in types.items()}

    def attributes(self) -> dict[Path, list[list[Any]]]:
        """Return which arguments are multiples of 16; every tensor of ours is aligned so.

        Other integers have an empty list, and so have constants from Triton 3.7 on; as Triton
        says it, what was compiled ahead is found again on the device.
        """
        attributes: dict[Path, list[list[Any]]] = {}
        for path, value in self._leaves():
            kind = _type_of(value)
            if self._general(path[0]):
                continue  # of what isn't specialized Triton says nothing
            if kind == "constexpr" and CONSTANTS_ARE_LISTED and len(path) == 1:
                attributes[path] = []
            elif kind not in ("constexpr", "fp32"):
                aligned = isinstance(value, Tensor) or value % ALIGNMENT == 0
                attributes[path] = [["tt.divisibility", ALIGNMENT]] if aligned else []
        return attributes

    def _general(self, index: int) -> bool:
        """Return whether every integer in this argument shares one compiled kernel."""
        return bool(self.kernel.params[index].do_not_specialize)

    def _values(self) -> list[Any]:
        """Return the values of the kernel's parameters, in their order."""
        constants = {name: tl.constexpr(value) for name, value in self.constants.items()}
        return [(self.args | constants)[name] for name in self.kernel.arg_names]

    def _leaves(self) -> Iterator[tuple[Path, Any]]:
        """Yield each value with its path; of a tuple its elements."""
        for index, value in enumerate(self._values()):
            if isinstance(value, tuple):
                yield from (((index, inner), element) for inner, element in enumerate(value))
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
    """Return the least power of two that is at least `value`."""
    return 1 << max(value - 1, 0).bit_length()
