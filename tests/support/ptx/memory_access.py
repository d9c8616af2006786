"""Instructions that read and write memory, and what orders them."""

from __future__ import annotations

import numpy as np

from tests.support.ptx.arithmetic import widen
from tests.support.ptx.fault import Fault
from tests.support.ptx.machine import Machine, Mask, executes, select, spread
from tests.support.ptx.numbers import DTYPES, UNSIGNED, Array, bits_of
from tests.support.ptx.parse import Instruction, elements

EARLY = "before griddepcontrol.wait"


def _check_order(machine: Machine, instruction: Instruction) -> None:
    """Raise Fault for what a dependent launch does with memory before it waits.

    A load past the L1 (`.cg`) may be early: what it brings isn't kept there for a later load.
    """
    if not machine.waited and "cg" not in instruction.opcode[:3]:
        raise Fault(f"memory is used {EARLY}")


@executes("ld", "param global shared v2 v4 cg acquire gpu")
def load(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    to, source = instruction.operands
    kind, names = instruction.kind, elements(to)
    bits = bits_of(kind)
    if "param" in instruction.opcode:
        value = np.frombuffer(machine.arguments[source.strip("[] ")], DTYPES[kind])[0]
        whole = np.full(machine.threads, value)
        return machine.put(to, widen(whole, machine.register_width(to), kind), mask)
    address = machine.address(source, mask)
    _check_vector(address, len(names) * bits // 8)
    shared = "shared" in instruction.opcode
    if not shared:
        _check_order(machine, instruction)
    if "acquire" in instruction.opcode:
        return _load_acquire(machine, instruction, mask, address)
    program, warp = (select(values, mask) for values in (machine.program, machine.warp))
    for index, name in enumerate(names):
        at = address + index * bits // 8
        if shared:
            value = machine.shared.load(at, bits, program, warp)
        else:
            value = machine.memory.load(at.astype(np.uint64), bits, warp)
        value = widen(value.view(DTYPES[kind]), machine.register_width(name), kind)
        machine.put(name, spread(value, mask, machine.threads), mask)
    return None


def _load_acquire(machine: Machine, instruction: Instruction, mask: Mask, address: Array) -> None:
    values = machine.memory.load(address.astype(np.uint64), 32)
    program = select(machine.grid_program, mask)
    for one, at in {*zip(program.tolist(), address.tolist(), strict=True)}:
        machine.programs.acquire(one, at)
    machine.put(elements(instruction.operands[0])[0], spread(values, mask, machine.threads), mask)


@executes("st", "global shared v2 v4")
def store(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    to, source = instruction.operands
    kind, names = instruction.kind, elements(source)
    address = machine.address(to, mask)
    _check_vector(address, len(names) * bits_of(kind) // 8)
    shared = "shared" in instruction.opcode
    if not shared:
        _check_order(machine, instruction)
    program, warp = (select(values, mask) for values in (machine.program, machine.warp))
    values = _joined([select(machine.get(name, kind), mask) for name in names])
    bits = 8 * values.itemsize
    for index, value in enumerate(values.T):
        at = address + index * bits // 8
        if shared:
            machine.shared.store(at, value, bits, program, warp)
        else:
            machine.memory.store(at.astype(np.uint64), value, bits, warp)


def _joined(numbers: list[Array]) -> Array:
    """Return each thread's numbers, which lie behind each other, as wider ones of up to 64 bits.

    The log of accesses has cells that hold several narrow numbers: one store is one access there.
    """
    rows = np.stack(numbers, axis=1)
    joined: Array = rows.view(UNSIGNED[8 * min(8, rows.shape[1] * rows.itemsize)])
    return joined


def _check_vector(address: Array, size: int) -> None:
    if (address % size).any():
        raise Fault(f"misaligned access of {size} bytes")


@executes("atom", "global gpu acq_rel add")
def atomic(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    """Add to a number in memory, thread by thread."""
    to, target, operand = instruction.operands
    if instruction.opcode[1:] != ("global", "gpu", "acq_rel", "add", "u32"):
        raise Fault(f"unknown instruction {'.'.join(instruction.opcode)}")
    _check_order(machine, instruction)
    address = machine.address(target, mask)
    added = select(machine.get(operand, "u32"), mask)
    program = select(machine.grid_program, mask)
    before = np.empty(len(address), np.uint32)
    for index, at in enumerate(address.tolist()):
        machine.programs.acquire(int(program[index]), at)
        before[index] = machine.memory.add(at, int(added[index]))
        machine.programs.release(int(program[index]), at)
    machine.put(to, spread(before, mask, machine.threads), mask)


@executes("prefetch", "global L2")
def prefetch(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    """Check that the address is within a tensor."""
    machine.memory.locate(machine.address(instruction.operands[0], mask).astype(np.uint64), 1)


@executes("cp", "async ca cg bulk prefetch L2 shared global commit_group wait_group wait_all")
def copy_async(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    modifiers = instruction.opcode[2:]
    if modifiers[0] == "commit_group":
        machine.shared.commit_group()
    elif modifiers[0] == "wait_group":
        machine.shared.wait_group(int(instruction.operands[0]))
    elif modifiers[0] == "wait_all":
        machine.shared.finish()
    elif modifiers[:2] == ("bulk", "prefetch"):
        _bulk_prefetch(machine, instruction, mask)
    elif modifiers[0] in ("ca", "cg") and modifiers[1:] == ("shared", "global"):
        _begin_copy(machine, instruction, mask)
    else:
        raise Fault(f"unknown instruction {'.'.join(instruction.opcode)}")


def _bulk_prefetch(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    source, size = instruction.operands
    address = machine.address(source, mask).astype(np.uint64)
    count = select(machine.get(size, "u32"), mask).astype(np.uint64)
    if (address % 16).any() or (count % 16).any():
        raise Fault("a bulk prefetch is not of multiples of 16 bytes")
    if (count == 0).any():
        raise Fault("a bulk prefetch of no bytes")
    machine.memory.locate(address, 1)
    machine.memory.locate(address + count - np.uint64(1), 1)


def _begin_copy(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    """Begin a cp.async of 4 to 16 bytes; a fourth operand 0 copies nothing and writes zeros."""
    _check_order(machine, instruction)
    to, source, size_text, *read = instruction.operands
    size = int(size_text, 0)
    target, address = machine.address(to, mask), machine.address(source, mask)
    wanted = select(machine.get(read[0], "u32"), mask) if read else np.full(len(target), size)
    if not np.isin(wanted, (0, size)).all():
        raise Fault("a cp.async of a part of its bytes")
    warp = select(machine.warp, mask)
    at = machine.shared.index(target, select(machine.program, mask), size)
    real = wanted > 0
    if (address[real] % size).any():
        raise Fault(f"misaligned cp.async of {size} bytes")
    for offset in range(0, size, 4):
        value = np.zeros(len(target), np.uint32)
        if real.any():
            from_address = (address[real] + offset).astype(np.uint64)
            value[real] = machine.memory.load(from_address, 32, warp[real])
        machine.shared.begin_copy(at + offset, value, warp)


@executes("griddepcontrol", "wait launch_dependents")
def grid_dependency(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    if instruction.opcode[1] == "wait":
        if mask is not None:
            raise Fault("only a part of a grid waits for the one before it")
        machine.waited = True


@executes("bar", "sync warp")
def barrier(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    if instruction.opcode[1] == "warp":
        return
    programs = np.arange(machine.count)
    if mask is not None:
        by_program = mask.reshape(machine.count, -1)
        if (by_program.any(1) != by_program.all(1)).any():
            raise Fault("a barrier that only a part of a program reaches")
        programs = programs[by_program.all(1)]
    machine.programs.pass_barrier(programs + int(machine.grid_program[0]))


@executes("fence", "proxy async shared::cta acq_rel sc gpu cta")
def fence(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    """Do nothing: stores of this interpreter are seen at once, and races are found without it."""
