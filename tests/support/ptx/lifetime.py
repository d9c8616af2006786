"""Behind which instruction of a kernel a register is needed no more.

Compiled code gives every value a register of its own: all together they are many times what a
program holds at once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from tests.support.ptx.parse import Instruction, Kernel

REGISTER = re.compile(r"%[a-z]+\d+")
# Their first operand is read, or is both read and written.
WITHOUT_RESULT = {"st", "stmatrix", "bra", "bar", "cp", "prefetch", "red", "wgmma"}


@dataclass
class Lifetime:
    """The instructions that name a register: the first and the last.

    Args:
        begins_new: the first one gives it a value whatever it held before.
    """

    first: int
    last: int
    begins_new: bool


@cache
def last_uses(kernel: Kernel) -> dict[int, tuple[str, ...]]:
    """Return index of an instruction → registers that nothing behind it needs.

    Threads that part meet again before anything behind, so no thread stands before an instruction
    that another has left, but in a loop. What a loop's next round may need lives until its end.
    """
    loops = _loops(kernel)
    found: dict[int, list[str]] = {}
    for register, lifetime in _lifetimes(kernel.code).items():
        found.setdefault(_end(lifetime, loops), []).append(register)
    return {index: tuple(registers) for index, registers in found.items()}


def _lifetimes(code: list[Instruction]) -> dict[str, Lifetime]:
    lifetimes: dict[str, Lifetime] = {}
    for index, instruction in enumerate(code):
        guard = [instruction.guard.register] if instruction.guard else []
        named = [REGISTER.findall(operand) for operand in instruction.operands]
        read = {*guard, *(register for registers in named[1:] for register in registers)}
        has_result = not guard and instruction.opcode[0] not in WITHOUT_RESULT
        for register in [*guard, *(one for registers in named for one in registers)]:
            begins_new = has_result and register not in read
            lifetime = lifetimes.setdefault(register, Lifetime(index, index, begins_new))
            lifetime.last = index
    return lifetimes


def _loops(kernel: Kernel) -> list[tuple[int, int]]:
    """Return first and last instruction of each loop, inner ones before outer ones."""
    jumps = [(i, one) for i, one in enumerate(kernel.code) if one.opcode[0] == "bra"]
    targets = [(kernel.labels[one.operands[0]], i) for i, one in jumps]
    return sorted((loop for loop in targets if loop[0] <= loop[1]), key=lambda loop: loop[1])


def _end(lifetime: Lifetime, loops: list[tuple[int, int]]) -> int:
    """Return the last instruction before which the register's value may be needed."""
    end = lifetime.last
    for first, last in loops:
        own = lifetime.begins_new and lifetime.first >= first
        if first <= end <= last and not own:
            end = last + 1
    return end
