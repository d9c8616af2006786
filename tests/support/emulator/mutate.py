"""Kernels with one instruction or one mask less."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from tests.support.ptx.parse import Instruction, Kernel

# Instructions of memory whose guard is a mask of Triton's.
GUARDED = {"ld", "st", "cp", "atom"}
READ_BYTES = 3  # operand of cp.async that says how many bytes are read: 0 where masked


def barriers(kernel: Kernel) -> list[int]:
    """Return the indices of barriers among the instructions."""
    return _with_opcode(kernel, ("bar", "sync"))


def copy_waits(kernel: Kernel) -> list[int]:
    """Return the indices of waits for cp.async."""
    return [*_with_opcode(kernel, ("cp", "async", "wait_group")),
            *_with_opcode(kernel, ("cp", "async", "wait_all"))]  # fmt: skip


def grid_waits(kernel: Kernel) -> list[int]:
    return _with_opcode(kernel, ("griddepcontrol", "wait"))


def masks(kernel: Kernel, skipped: Iterable[int]) -> list[int]:
    """Return the indices of accesses to memory that are masked.

    Args:
        skipped: guarded instructions that a thread skipped; of the others a mask can't be missed.
    """
    used = set(skipped)
    return [
        index
        for index, instruction in enumerate(kernel.code)
        if instruction.opcode[0] in GUARDED and (index in used or _has_read_bytes(instruction))
    ]


def without(kernel: Kernel, index: int) -> Kernel:
    """Return the kernel without one instruction."""
    labels = {name: at - (at > index) for name, at in kernel.labels.items()}
    return _changed(kernel, [*kernel.code[:index], *kernel.code[index + 1 :]], labels)


def moved(kernel: Kernel, index: int, behind: int) -> Kernel:
    """Return the kernel with one instruction moved behind another, later one."""
    code = [*kernel.code[:index], *kernel.code[index + 1 : behind + 1], kernel.code[index]]
    labels = {name: at - (index < at <= behind) for name, at in kernel.labels.items()}
    return _changed(kernel, [*code, *kernel.code[behind + 1 :]], labels)


def without_mask(kernel: Kernel, index: int) -> Kernel:
    """Return the kernel with an access that every thread makes, wholly."""
    instruction = kernel.code[index]
    if instruction.guard is not None:
        instruction = replace(instruction, guard=None)
    else:
        instruction = replace(instruction, operands=instruction.operands[:READ_BYTES])
    return _changed(kernel, [*kernel.code[:index], instruction, *kernel.code[index + 1 :]])


def _has_read_bytes(instruction: Instruction) -> bool:
    copies = instruction.opcode[2:] in (("ca", "shared", "global"), ("cg", "shared", "global"))
    return copies and len(instruction.operands) > READ_BYTES


def _with_opcode(kernel: Kernel, opcode: tuple[str, ...]) -> list[int]:
    return [i for i, one in enumerate(kernel.code) if one.opcode[: len(opcode)] == opcode]


def _changed(
    kernel: Kernel, code: list[Instruction], labels: dict[str, int] | None = None
) -> Kernel:
    return replace(kernel, code=code, labels=kernel.labels if labels is None else labels)
