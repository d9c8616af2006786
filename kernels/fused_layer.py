"""From one layer's attention to the next in one launch: programs stay, and meet between phases.

The phases are o_proj, gate and up, down, and q, k and v of the layer behind. They are what the
separate kernels do, tile by tile, so the bits are theirs. Each phase's tiles are dealt out over the
programs; while a program is at one, the L2 is asked for the first weights of its next tile, also
where that belongs to the next phase.

In Triton's interpreter programs run one after another and can't wait for each other: there every
phase is a launch of the same kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila_deploy.kernels.add_residual import add_residual_rows
from vila_deploy.kernels.gate_up import gate_up_rows
from vila_deploy.kernels.launch import Launch
from vila_deploy.kernels.norm_qkv import norm_qkv_rows
from vila_deploy.kernels.pdl import meet, prefetch_rows
from vila_deploy.kernels.tile_config import INTERPRETER, device

PHASES = 4
WARPS = 4
# More than one, so that tiles are dealt out there too.
INTERPRETED_PROGRAMS = 2


@triton.jit
def joined_kernel(
    o, gate_up, down, qkv, o_ahead, gate_up_ahead, down_ahead, qkv_ahead, tiles, arrived,
    FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    if FIRST <= 0 and LAST > 0:
        for tile in range(program, tiles[0], programs):
            if tile + programs < tiles[0]:
                prefetch_rows(tile + programs, *o_ahead)
            add_residual_rows(tile, *o)
    if FIRST <= 0 and LAST > 1:
        if program < tiles[1]:
            prefetch_rows(program, *gate_up_ahead)
        meet(arrived)
    if FIRST <= 1 and LAST > 1:
        for tile in range(program, tiles[1], programs):
            if tile + programs < tiles[1]:
                prefetch_rows(tile + programs, *gate_up_ahead)
            gate_up_rows(tile, *gate_up)
    if FIRST <= 1 and LAST > 2:
        if program < tiles[2]:
            prefetch_rows(program, *down_ahead)
        meet(arrived)
    if FIRST <= 2 and LAST > 2:
        for tile in range(program, tiles[2], programs):
            if tile + programs < tiles[2]:
                prefetch_rows(tile + programs, *down_ahead)
            add_residual_rows(tile, *down)
    if FIRST <= 2 and LAST > 3:
        if program < tiles[3]:
            prefetch_rows(program, *qkv_ahead)
        meet(arrived)
    if FIRST <= 3 and LAST > 3:
        for tile in range(program, tiles[3], programs):
            if tile + programs < tiles[3]:
                prefetch_rows(tile + programs, *qkv_ahead)
            norm_qkv_rows(tile, *qkv)


def joined(launches: Sequence[Launch], arrived: Tensor, sm: int) -> tuple[Launch, ...]:
    """One launch for `launches`, or in the interpreter one for each phase.

    Args:
        launches: `add_residual` of o_proj, `gate_up`, `add_residual` of the MLP, and `norm_qkv` of
            the next layer.
        arrived: int32 [1], zero at first, for launches of one number of programs.
    """
    if sm != INTERPRETER:
        launches = [separate(launch) for launch in launches]
    phases = ("o", "gate_up", "down", "qkv")
    rows = (add_residual_rows, gate_up_rows, add_residual_rows, norm_qkv_rows)
    args: dict[str, Any] = {"tiles": tuple(launch.grid[0] for launch in launches)}
    args["arrived"] = arrived
    for phase, function, launch in zip(phases, rows, launches, strict=True):
        args[phase] = _values(function, launch)
        args[f"{phase}_ahead"] = _values(prefetch_rows, launch)
    each = [(first, first + 1) for first in range(PHASES)]
    options = {"launch_cooperative_grid": True}
    return tuple(
        Launch(
            joined_kernel, (programs(sm, arrived),), args, {"FIRST": first, "LAST": last}, WARPS,
            options,
        )
        for first, last in (each if sm == INTERPRETER else [(0, PHASES)])
    )  # fmt: skip


def separate(launch: Launch) -> Launch:
    """The launch with as many warps as a phase of `joined` has, and so with the same bits."""
    return replace(launch, warps=WARPS)


def programs(sm: int, arrived: Tensor) -> int:
    """As many as are on the device at once."""
    if sm == INTERPRETER:
        return INTERPRETED_PROGRAMS
    processors = device(sm).processors
    if arrived.is_cuda:
        processors = torch.cuda.get_device_properties(arrived.device).multi_processor_count
    return processors * device(sm).joined_programs


def _values(function: Any, launch: Launch) -> tuple[Any, ...]:
    """What `function` takes for a tile, by the names that the launch's kernel has for it."""
    constants = {name: tl.constexpr(value) for name, value in launch.constants.items()}
    values = launch.args | constants
    return tuple(values[name] for name in function.arg_names[1:])
