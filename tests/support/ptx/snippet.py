"""A few lines of PTX as a whole kernel: a thread loads an element of each input and stores one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.support.ptx.global_memory import GlobalMemory, Region
from tests.support.ptx.launch import launch
from tests.support.ptx.machine import Machine, Options
from tests.support.ptx.numbers import Array
from tests.support.ptx.parse import Kernel, parse

WARP = 32
FAMILIES = {2: "%rs", 4: "%r", 8: "%rd"}
HEAD = """.visible .entry snippet(
{params}
)
.reqntid {threads}
{{
.reg .pred %p<99>;
.reg .b16 %rs<99>;
.reg .b32 %r<99>;
.reg .b64 %rd<99>;
mov.u32 %r90, %tid.x;
mov.u32 %r91, %ctaid.x;
mad.lo.s32 %r92, %r91, {threads}, %r90;
"""


def snippet(
    body: str, inputs: Sequence[Array], out: Array, threads: int = WARP, loaded: int | None = None
) -> Kernel:
    """Return a kernel whose result is in `%r0` (`%rs0`, `%rd0`), inputs in `%r1`, `%r2` and on.

    Args:
        loaded: of so many inputs each thread has an element; None means of all.

    Thread, program and index in the grid are in %r90, %r91, %r92, the arrays' addresses of the
    thread in %rd80 and on, of the array itself in %rd70 and on; the output's are the last.
    """
    arrays = [*inputs, out]
    params = ",\n".join(
        f".param .u64 .ptr .global .align 1 snippet_param_{i}" for i in range(len(arrays))
    )
    lines = [HEAD.format(params=params, threads=threads)]
    for index, array in enumerate(arrays):
        size = array.itemsize
        lines += [
            f"ld.param.b64 %rd{70 + index}, [snippet_param_{index}];",
            f"mad.wide.u32 %rd{80 + index}, %r92, {size}, %rd{70 + index};",
        ]
        if index < (len(inputs) if loaded is None else loaded):
            register = f"{FAMILIES[size]}{index + 1}"
            lines.append(f"ld.global.b{8 * size} {{ {register} }}, [ %rd{80 + index} + 0 ];")
    lines.append(body)
    if f"{FAMILIES[out.itemsize]}0" in body:
        result = f"{FAMILIES[out.itemsize]}0"
        lines.append(
            f"st.global.b{8 * out.itemsize} [ %rd{79 + len(arrays)} + 0 ], {{ {result} }};"
        )
    return parse("\n".join([*lines, "ret;", "}"]))


def execute(
    kernel: Kernel, arrays: Sequence[Array], grid: int = 1, shared_bytes: int = 0,
    options: Options | None = None,
) -> Machine:  # fmt: skip
    """Execute a kernel whose parameters are arrays."""
    regions = [
        Region(array.ctypes.data, array.reshape(-1).view(np.uint8), name, array.itemsize)
        for array, (_, name) in zip(arrays, kernel.params, strict=True)
    ]
    arguments = {
        name: array.ctypes.data.to_bytes(8, "little")
        for array, (_, name) in zip(arrays, kernel.params, strict=True)
    }
    memory = GlobalMemory(regions)
    return launch(
        kernel, (grid, 1, 1), arguments, memory, shared_bytes, options or Options(races=True)
    )


def compute(body: str, inputs: Sequence[Array], dtype: Any, shared_bytes: int = 0) -> Array:
    """Return what a snippet computes of each element, in as many threads as there are elements."""
    out = np.zeros(inputs[0].shape, dtype)
    kernel = snippet(body, inputs, out, len(inputs[0]))
    execute(kernel, [*inputs, out], shared_bytes=shared_bytes)
    return out
