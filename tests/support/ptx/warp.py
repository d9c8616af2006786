"""Instructions that a warp executes together: exchanges, and matrices of 8 × 8 and 16 × 8."""

from __future__ import annotations

import numpy as np

from tests.support.ptx.fault import Fault
from tests.support.ptx.machine import WARP, Machine, Mask, executes, select, spread
from tests.support.ptx.numbers import Array
from tests.support.ptx.parse import Instruction, elements

LANE = np.arange(WARP)
# Of the manual's figures: which row and column of an operand's register a lane's value stands in.
A_TILES = ((0, 0), (8, 0), (0, 8), (8, 8))
D_TILES = ((0, 0), (0, 1), (8, 0), (8, 1))


@executes("shfl", "sync bfly idx up down")
def shuffle(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    to, source, count, clamp, members = instruction.operands
    if int(members, 0) not in (-1, 0xFFFFFFFF) or int(clamp, 0) not in (0, 31):
        raise Fault("a shuffle of a part of a warp")
    machine.check_whole_warps(mask)
    values = machine.by_warp(machine.get(source, "b32"))
    n = machine.by_warp(machine.get(count, "u32")).astype(np.int64)
    way = instruction.opcode[2]
    lane = {"bfly": LANE ^ n, "idx": n & 31, "up": LANE - n, "down": LANE + n}[way]
    lane = np.where((lane < 0) | (lane >= WARP), LANE, lane)
    machine.put(to, np.take_along_axis(values, lane, 1).reshape(-1), mask)


@executes("redux", "sync min max")
def reduce(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    """Give every lane the least or greatest value of those that execute it."""
    to, source, members = instruction.operands
    values = machine.by_warp(machine.get(source, instruction.kind))
    limits = np.iinfo(values.dtype)
    smallest = instruction.opcode[2] == "min"
    active = np.ones(values.shape, bool) if mask is None else mask.reshape(-1, WARP)
    named = machine.by_warp(machine.get(members, "u32"))
    if ((named >> LANE.astype(np.uint32) & 1).astype(bool) != active)[active.any(1)].any():
        raise Fault("redux names other lanes than execute it")
    values = np.where(active, values, limits.max if smallest else limits.min)
    found = (values.min if smallest else values.max)(axis=1, keepdims=True)
    machine.put(to, np.broadcast_to(found, values.shape).reshape(-1).copy(), mask)


def _matrix_addresses(address: Array, index: int, transposed: bool) -> list[Array]:
    """Return where each lane's two halves of the 8 × 8 matrix `index` lie; a pair if together.

    Lane 8 · index + row has the address of that matrix's row of 16 bytes.
    """
    if not transposed:
        return [address[:, 8 * index + LANE // 4] + 4 * (LANE % 4)]
    return [address[:, 8 * index + 2 * (LANE % 4) + half] + 2 * (LANE // 4) for half in (0, 1)]


@executes("ldmatrix", "sync aligned m8n8 x1 x2 x4 trans shared")
def load_matrix(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    machine.check_whole_warps(mask)
    to, source = instruction.operands
    address = machine.by_warp(machine.address(source, None))
    program, warp = (select(values, mask) for values in (machine.program, machine.warp))
    for index, name in enumerate(elements(to)):
        places = _matrix_addresses(address, index, "trans" in instruction.opcode)
        bits = 32 // len(places)
        value = np.zeros(len(program), np.uint32)
        for half, place in enumerate(places):
            at = select(place.reshape(-1), mask)
            part = machine.shared.load(at, bits, program, warp).astype(np.uint32)
            value |= part << np.uint32(16 * half)
        machine.put(name, spread(value, mask, machine.threads), mask)


@executes("stmatrix", "sync aligned m8n8 x1 x2 x4 trans shared")
def store_matrix(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    machine.check_whole_warps(mask)
    to, source = instruction.operands
    address = machine.by_warp(machine.address(to, None))
    program, warp = (select(values, mask) for values in (machine.program, machine.warp))
    for index, name in enumerate(elements(source)):
        places = _matrix_addresses(address, index, "trans" in instruction.opcode)
        bits = 32 // len(places)
        value = select(machine.get(name, "u32"), mask)
        for half, place in enumerate(places):
            part = value >> np.uint32(16 * half)
            part = part.astype(np.uint16) if bits == 16 else part
            at = select(place.reshape(-1), mask)
            machine.shared.store(at, part, bits, program, warp)


def halves(machine: Machine, register: str, lanes: int = WARP) -> Array:
    """Return the two float16 of a register of every thread, [groups, lanes, 2] in float64."""
    value = np.ascontiguousarray(machine.get(register, "u32"))
    return value.view(np.float16).reshape(-1, lanes, 2).astype(np.float64)


@executes("mma", "sync aligned m16n8k16 row col")
def matrix_product(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    """D[16, 8] = A[16, 16] B[16, 8] + C; sums are exact here, the tensor core's are not."""
    if instruction.opcode[-4:] != ("f32", "f16", "f16", "f32"):
        raise Fault(f"unknown instruction {'.'.join(instruction.opcode)}")
    machine.check_whole_warps(mask)
    d, a, b, c = (elements(operand) for operand in instruction.operands)
    row, column = LANE // 4, 2 * (LANE % 4)
    warps = machine.threads // WARP
    left, right = np.zeros((warps, 16, 16)), np.zeros((warps, 16, 8))
    for name, (down, across) in zip(a, A_TILES, strict=True):
        pair = halves(machine, name)
        left[:, row + down, column + across] = pair[..., 0]
        left[:, row + down, column + across + 1] = pair[..., 1]
    for name, down in zip(b, (0, 8), strict=True):
        pair = halves(machine, name)
        right[:, column + down, row] = pair[..., 0]
        right[:, column + down + 1, row] = pair[..., 1]
    total = np.zeros((warps, 16, 8))
    for name, (down, across) in zip(c, D_TILES, strict=True):
        total[:, row + down, column + across] = machine.by_warp(machine.get(name, "f32"))
    result = (left @ right + total).astype(np.float32)
    for name, (down, across) in zip(d, D_TILES, strict=True):
        machine.put(name, result[:, row + down, column + across].reshape(-1), mask)
