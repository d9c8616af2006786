"""From one layer's attention to the next in one launch: persistent programs with grid barriers.

The phases are o_proj, gate and up, down, and the next layer's q, k and v. They are what the
separate kernels do, tile by tile, so the bits are theirs. Each phase's tiles are dealt out over the
programs; while a program computes one, it prefetches the first weights of its next tile, also where
that belongs to the next phase.

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
from vila_deploy.kernels.capability import INTERPRETER, ComputeCapability
from vila_deploy.kernels.gate_up import gate_up_rows
from vila_deploy.kernels.launch import Argument, Launch
from vila_deploy.kernels.norm_qkv import norm_qkv_rows
from vila_deploy.kernels.pdl import grid_barrier, prefetch_weights
from vila_deploy.kernels.tile_config import device

PHASES = 4
WARPS = 4
# More than one, so that tiles are dealt out there too.
INTERPRETED_PROGRAMS = 2


@triton.jit
def fused_layer_kernel(
    o: tl.tuple, gate_up: tl.tuple, down: tl.tuple, qkv: tl.tuple, o_weights: tl.tuple,
    gate_up_weights: tl.tuple, down_weights: tl.tuple, qkv_weights: tl.tuple, tiles: tl.tuple,
    arrivals_ptr: tl.tensor,
    FIRST: tl.constexpr, LAST: tl.constexpr,
) -> None:  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    if FIRST <= 0 and LAST > 0:
        for tile in range(program, tiles[0], programs):
            if tile + programs < tiles[0]:
                prefetch_weights(tile + programs, *o_weights)
            add_residual_rows(tile, *o)
    if FIRST <= 0 and LAST > 1:
        if program < tiles[1]:
            prefetch_weights(program, *gate_up_weights)
        grid_barrier(arrivals_ptr)
    if FIRST <= 1 and LAST > 1:
        for tile in range(program, tiles[1], programs):
            if tile + programs < tiles[1]:
                prefetch_weights(tile + programs, *gate_up_weights)
            gate_up_rows(tile, *gate_up)
    if FIRST <= 1 and LAST > 2:
        if program < tiles[2]:
            prefetch_weights(program, *down_weights)
        grid_barrier(arrivals_ptr)
    if FIRST <= 2 and LAST > 2:
        for tile in range(program, tiles[2], programs):
            if tile + programs < tiles[2]:
                prefetch_weights(tile + programs, *down_weights)
            add_residual_rows(tile, *down)
    if FIRST <= 2 and LAST > 3:
        if program < tiles[3]:
            prefetch_weights(program, *qkv_weights)
        grid_barrier(arrivals_ptr)
    if FIRST <= 3 and LAST > 3:
        for tile in range(program, tiles[3], programs):
            if tile + programs < tiles[3]:
                prefetch_weights(tile + programs, *qkv_weights)
            norm_qkv_rows(tile, *qkv)


def fused_layer(
    launches: Sequence[Launch], arrivals: Tensor, capability: ComputeCapability
) -> tuple[Launch, ...]:
    """Return one launch for `launches`, or in the interpreter one for each phase.

    Args:
        launches: `add_residual` of o_proj, `gate_up`, `add_residual` of the MLP, and `norm_qkv` of
            the next layer.
        arrivals: int32 [1], zero at first, for launches of one number of programs.
    """
    interpreted = capability == INTERPRETER
    if not interpreted:
        launches = [with_fused_warps(launch) for launch in launches]
    phases = ("o", "gate_up", "down", "qkv")
    functions = (add_residual_rows, gate_up_rows, add_residual_rows, norm_qkv_rows)
    args: dict[str, Argument] = {"tiles": tuple(launch.grid[0] for launch in launches)}
    args["arrivals_ptr"] = arrivals
    for phase, function, launch in zip(phases, functions, launches, strict=True):
        args[phase] = _arguments(function, launch)
        args[f"{phase}_weights"] = _arguments(prefetch_weights, launch)
    ranges = [(first, first + 1) for first in range(PHASES)] if interpreted else [(0, PHASES)]
    return tuple(
        Launch(
            fused_layer_kernel, (programs(capability, arrivals),), args,
            {"FIRST": first, "LAST": last}, WARPS, {"launch_cooperative_grid": True},
        )
        for first, last in ranges
    )  # fmt: skip


def with_fused_warps(launch: Launch) -> Launch:
    """Return the launch with as many warps as a phase of `fused_layer` has, so with its bits."""
    return replace(launch, warps=WARPS)


def programs(capability: ComputeCapability, arrivals: Tensor) -> int:
    """Return how many programs are on the device at once."""
    if capability == INTERPRETER:
        return INTERPRETED_PROGRAMS
    processors = device(capability).processors
    if arrivals.is_cuda:
        processors = torch.cuda.get_device_properties(arrivals.device).multi_processor_count
    return processors * device(capability).fused_layer_programs


def _arguments(function: Any, launch: Launch) -> tuple[Any, ...]:
    """Return the arguments of `function` behind the tile, by the names of the launch's kernel."""
    constants = {name: tl.constexpr(value) for name, value in launch.constants.items()}
    # It prefetches by itself; and there are no tuples in tuples.
    values = launch.args | constants | {"next_weights": 0}
    return tuple(values[name] for name in function.arg_names[1:])
