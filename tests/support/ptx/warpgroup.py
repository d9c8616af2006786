"""wgmma of compute capability 9.0: products of four warps with operands in shared memory."""

from __future__ import annotations

import re

import numpy as np

from tests.support.ptx.fault import Fault
from tests.support.ptx.machine import WARP, Machine, Mask, executes
from tests.support.ptx.numbers import Array
from tests.support.ptx.parse import Instruction, elements
from tests.support.ptx.warp import A_TILES, D_TILES, halves

GROUP = 4 * WARP
LANE = np.arange(GROUP)
# A register's row and column in a 64-row matrix, as the manual's figures have them.
ROW, COLUMN = 16 * (LANE // WARP) + LANE % WARP // 4, 2 * (LANE % 4)
# Swizzle mode of a descriptor → bytes of a row, and how many bits of the address it mixes.
SWIZZLES = {0: (16, 0), 1: (128, 7), 2: (64, 3), 3: (32, 1)}


@executes("wgmma", "mma_async fence commit_group wait_group sync aligned m64n8k16 m64n16k16 "
          "m64n32k16 m64n64k16 m64n128k16")  # fmt: skip
def warpgroup_product(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    step = instruction.opcode[1]
    active = _active_groups(machine, mask)
    if step == "mma_async":
        _multiply(machine, instruction, mask, active)
    elif step == "commit_group":
        machine.warpgroups.append((machine.open_registers, machine.open_reads))
        machine.open_registers, machine.open_reads = set(), []
    elif step == "wait_group":
        while len(machine.warpgroups) > int(instruction.operands[0]):
            for at, warp in machine.warpgroups.pop(0)[1]:
                # It may have read until here.
                machine.shared.note_read(at, 2, warp)
        machine.in_flight = set[str]().union(
            machine.open_registers, *(registers for registers, _ in machine.warpgroups)
        )


def _active_groups(machine: Machine, mask: Mask) -> Array:
    """Return which warp groups execute an instruction: programs may part, a group may not."""
    if mask is None:
        return np.ones(machine.threads // GROUP, np.bool_)
    threads = mask.reshape(-1, GROUP)
    found: Array = threads.all(1)
    if not np.array_equal(found, threads.any(1)):
        raise Fault("only a part of a program executes a warp group's instruction")
    return found


def _multiply(machine: Machine, instruction: Instruction, mask: Mask, active: Array) -> None:
    """D[64, n] = A[64, 16] B[16, n] + D, or without D where its predicate is false."""
    if instruction.opcode[-3:] != ("f32", "f16", "f16"):
        raise Fault(f"unknown instruction {'.'.join(instruction.opcode)}")
    found = re.search(r"n(\d+)k16", ".".join(instruction.opcode))
    assert found is not None
    columns = int(found[1])
    d, a, b, scale_d, *scales = instruction.operands[:6]
    transposed = instruction.operands[6:]
    if scales != ["1", "1"]:
        raise Fault("unknown instruction: wgmma with negated operands")
    groups, registers = machine.threads // GROUP, elements(d)
    if a[0] == "{":
        left = np.zeros((groups, 64, 16))
        for name, (down, across) in zip(elements(a), A_TILES, strict=True):
            pair = halves(machine, name, GROUP)
            left[:, ROW + down, COLUMN + across] = pair[..., 0]
            left[:, ROW + down, COLUMN + across + 1] = pair[..., 1]
    else:
        left = _described(machine, a, 64, active, transposed=transposed[0] == "1")
    right = _described(machine, b, columns, active, transposed=transposed[-1] == "1")
    total = np.zeros((groups, 64, columns))
    keep = machine.get(scale_d, "pred").reshape(groups, GROUP)[:, :1]
    places = [(down, 8 * tile + across) for tile in range(columns // 8) for down, across in D_TILES]
    machine.in_flight.difference_update(registers)  # products of one group follow each other
    for name, (down, across) in zip(registers, places, strict=True):
        before = machine.get(name, "f32").reshape(groups, GROUP) if name in machine.registers else 0
        total[:, ROW + down, COLUMN + across] = np.where(keep, before, 0)
    result = (left @ right.transpose(0, 2, 1) + total).astype(np.float32)
    for name, (down, across) in zip(registers, places, strict=True):
        machine.put(name, result[:, ROW + down, COLUMN + across].reshape(-1), mask)
    machine.in_flight.update(registers)
    machine.open_registers.update(registers)


def _described(
    machine: Machine, operand: str, rows: int, active: Array, *, transposed: bool
) -> Array:
    """Return an operand [groups, rows, 16] out of shared memory, by its matrix descriptor.

    Groups that are not `active` have zeros.
    Rows run along the leading dimension if `transposed`, else K does (the manual's canonical
    layouts of 16-bit elements: cores of 8 rows by 16 bytes, swizzled by 128, 64, 32 or no bytes).
    """
    descriptors = machine.get(operand, "u64").reshape(-1, GROUP)[:, 0]
    matrices = np.zeros((len(descriptors), rows, 16))
    for group in np.flatnonzero(active).tolist():
        descriptor = descriptors[group]
        offset = _offsets(int(descriptor), rows, transposed=transposed).reshape(-1)
        program = np.full(len(offset), machine.program[group * GROUP])
        at = machine.shared.index(offset, program, 2)
        # All four warps read it.
        warp = np.repeat(machine.warp[group * GROUP : (group + 1) * GROUP : WARP], len(at))
        everywhere = np.tile(at, GROUP // WARP)
        machine.shared.note_read(everywhere, 2, warp)
        machine.open_reads.append((everywhere, warp))
        matrices[group] = machine.shared.data.view(np.float16)[at // 2].reshape(rows, 16)
    return matrices


def _offsets(descriptor: int, rows: int, *, transposed: bool) -> Array:
    """Return the shared address of each element [rows, 16]."""
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    span, mixed = SWIZZLES[descriptor >> 62]
    row, k = np.meshgrid(np.arange(rows), np.arange(16), indexing="ij")
    if transposed:
        # An atom is span / 2 rows by 8 of K.
        width = span // 2
        across = (leading, stride) if mixed else (stride, leading)
        at = start + row // width * across[0] + k // 8 * across[1] + k % 8 * span + row % width * 2
    elif mixed:
        at = start + row // 8 * stride + row % 8 * span + k * 2
    else:
        at = start + row // 8 * stride + k // 8 * leading + row % 8 * 16 + k % 8 * 2
    swizzled: Array = at ^ (at >> 7 & mixed) << 4
    return swizzled
