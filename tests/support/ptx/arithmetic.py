"""Instructions on each thread's own registers: numbers, bits, predicates, conversions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.support.ptx.fault import Fault
from tests.support.ptx.machine import Machine, Mask, executes
from tests.support.ptx.numbers import DTYPES, SIGNED, UNSIGNED, Array, bits_of, is_signed
from tests.support.ptx.parse import Instruction, elements

Function = Callable[..., Any]
COMPARISONS: dict[str, Function] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip


def _register(name: str, modifiers: str, function: Function) -> None:
    """Register an opcode that computes its first operand from the others."""

    @executes(name, modifiers)
    def run(machine: Machine, instruction: Instruction, mask: Mask) -> None:
        to, *operands = instruction.operands
        kind = instruction.kind
        if kind == "f16x2":
            values = [machine.get(operand, "b32") for operand in operands]
            machine.put(to, _packed_halves(function, values), mask)
            return
        values = [machine.get(operand, kind) for operand in operands]
        machine.put(to, np.asarray(function(*values), DTYPES[kind]), mask)


def _packed_halves(function: Function, values: list[Array]) -> Array:
    """Apply a function to the lower and the upper float16 of 32-bit numbers."""
    pairs = [np.ascontiguousarray(value).view(np.float16).reshape(-1, 2) for value in values]
    return np.ascontiguousarray(function(*pairs).astype(np.float16)).view(np.uint32)[:, 0]


def _fused(a: Array, b: Array, c: Array) -> Array:
    """Return a · b + c, rounded once (by way of float64)."""
    return (a.astype(np.float64) * b + c).astype(a.dtype)


def _divide(a: Array, b: Array) -> Array:
    if a.dtype.kind == "f":
        return a / b
    quotient = np.trunc(a.astype(np.float64) / b.astype(np.float64))
    return quotient.astype(a.dtype)


_register("add", "rn ftz", np.add)
_register("sub", "rn ftz", np.subtract)
_register("div", "full rn ftz approx", _divide)
_register("neg", "ftz", np.negative)
_register("abs", "ftz", np.abs)
_register("min", "ftz", np.fmin)
_register("max", "ftz", np.fmax)
_register("ex2", "approx ftz", np.exp2)
_register("lg2", "approx ftz", np.log2)
_register("rsqrt", "approx ftz", lambda a: 1 / np.sqrt(a.astype(np.float64)))
_register("and", "", np.bitwise_and)
_register("or", "", np.bitwise_or)
_register("xor", "", np.bitwise_xor)
_register("not", "", np.invert)
_register("fma", "rn ftz", _fused)


def _wide(instruction: Instruction) -> str:
    """Return the type of the whole product of two numbers of the instruction's type."""
    return f"{instruction.kind[0]}{2 * bits_of(instruction.kind)}"


@executes("mul", "lo hi wide rn ftz")
def multiply(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    to, *operands = instruction.operands
    if instruction.kind == "f16x2":
        values = [machine.get(operand, "b32") for operand in operands]
        return machine.put(to, _packed_halves(np.multiply, values), mask)
    a, b = (machine.get(operand, instruction.kind) for operand in operands)
    if "wide" in instruction.opcode:
        a = a.astype(DTYPES[_wide(instruction)])
    elif "hi" in instruction.opcode:
        whole = a.astype(DTYPES[_wide(instruction)]) * b
        return machine.put(to, (whole >> bits_of(instruction.kind)).astype(a.dtype), mask)
    return machine.put(to, a * b, mask)


@executes("mad", "lo wide")
def multiply_add(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    to, *operands, last = instruction.operands
    a, b = (machine.get(operand, instruction.kind) for operand in operands)
    kind = instruction.kind
    if "wide" in instruction.opcode:
        kind = _wide(instruction)
        a = a.astype(DTYPES[kind])
    machine.put(to, a * b + machine.get(last, kind), mask)


@executes("mov")
def move(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    """Copy a register, or take it apart into halves, or put it together from them."""
    (to, source), kind = instruction.operands, instruction.kind
    parts = elements(source if source[0] == "{" else to)
    bits = bits_of(kind) // len(parts)
    if to[0] == "{":
        whole = machine.get(source, f"u{bits_of(kind)}")
        for index, part in enumerate(parts):
            piece = (whole >> whole.dtype.type(bits * index)).astype(UNSIGNED[bits])
            machine.put(part, piece, mask)
    elif source[0] == "{":
        whole = np.zeros(machine.threads, UNSIGNED[bits_of(kind)])
        for index, part in enumerate(parts):
            piece = machine.get(part, f"u{bits}").astype(whole.dtype)
            whole |= piece << whole.dtype.type(bits * index)
        machine.put(to, whole, mask)
    else:
        machine.put(to, machine.get(source, kind), mask)


@executes("shl")
def shift_left(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    to, source, count = instruction.operands
    a, n = machine.get(source, instruction.kind), machine.get(count, "u32")
    bits = bits_of(instruction.kind)
    shifted = a << np.minimum(n, bits - 1).astype(a.dtype)
    machine.put(to, np.where(n >= bits, a.dtype.type(0), shifted), mask)


@executes("shr")
def shift_right(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    to, source, count = instruction.operands
    a, n = machine.get(source, instruction.kind), machine.get(count, "u32")
    bits = bits_of(instruction.kind)
    shifted = a >> np.minimum(n, bits - 1).astype(a.dtype)
    if not is_signed(instruction.kind):
        shifted = np.where(n >= bits, a.dtype.type(0), shifted)
    machine.put(to, shifted, mask)


@executes("shf", "l r wrap")
def funnel_shift(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    """Shift the 64 bits of two registers; keep the upper ones (left) or the lower ones."""
    to, *operands = instruction.operands
    low, high, count = (machine.get(operand, "u32").astype(np.uint64) for operand in operands)
    both, n = high << np.uint64(32) | low, count & np.uint64(31)
    left = instruction.opcode[1] == "l"
    shifted = (both << n) >> np.uint64(32) if left else both >> n
    machine.put(to, shifted.astype(np.uint32), mask)


@executes("bfe")
def extract_bits(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    to, source, position, length = instruction.operands
    a, bits = machine.get(source, instruction.kind), bits_of(instruction.kind)
    first, count = (int(machine.get(operand, "u32")[0]) for operand in (position, length))
    if not 0 < count <= bits - first:
        raise Fault(f"bfe of {count} bits from {first} on")
    up, down = (a.dtype.type(n) for n in (bits - first - count, bits - count))
    machine.put(to, (a << up) >> down, mask)


@executes("prmt")
def permute_bytes(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    """Choose each byte of the result out of 8; bit 3 of a selector repeats the byte's sign."""
    to, *sources, selector = instruction.operands
    low, high = (machine.get(source, "u32").astype(np.uint64) for source in sources)
    both, selectors = high << np.uint64(32) | low, machine.get(selector, "u32").astype(np.uint64)
    result = np.zeros(machine.threads, np.uint64)
    for index in range(4):
        choice = selectors >> np.uint64(4 * index) & np.uint64(15)
        byte = both >> (choice & np.uint64(7)) * np.uint64(8) & np.uint64(0xFF)
        sign = np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
        byte = np.where(choice & np.uint64(8), sign, byte)
        result |= byte << np.uint64(8 * index)
    machine.put(to, result.astype(np.uint32), mask)


@executes("selp")
def select_by_predicate(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    to, yes, no, predicate = instruction.operands
    a, b = (machine.get(operand, instruction.kind) for operand in (yes, no))
    machine.put(to, np.where(machine.get(predicate, "pred"), a, b), mask)


@executes("setp", " ".join(COMPARISONS))
def compare(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    to, *operands = instruction.operands
    a, b = (machine.get(operand, instruction.kind) for operand in operands)
    machine.put(to, COMPARISONS[instruction.opcode[1]](a, b), mask)


ROUNDINGS: dict[str, Function] = {
    "rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil,
}  # fmt: skip


@executes("cvt", "rn rz sat ftz f16x2 " + " ".join(ROUNDINGS))
def convert(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    to, *sources = instruction.operands
    *modifiers, target, kind = instruction.opcode[1:]
    if "sat" in modifiers or "rz" in modifiers:
        raise Fault(f"unknown instruction {'.'.join(instruction.opcode)}")
    if target == "f16x2":
        # The first source is the upper half.
        upper, lower = (machine.get(source, kind).astype(np.float16) for source in sources)
        return machine.put(to, np.stack([lower, upper], 1).view(np.uint32)[:, 0], mask)
    value = machine.get(sources[0], kind)
    rounding = next((ROUNDINGS[word] for word in modifiers if word in ROUNDINGS), None)
    if rounding is not None:
        value = rounding(value.astype(np.float64) if target[0] != "f" else value)
    if kind[0] == "f" and target[0] != "f":
        limits = np.iinfo(DTYPES[target])
        value = np.nan_to_num(np.clip(value, float(limits.min), float(limits.max)))
    value = value.astype(DTYPES[target])
    return machine.put(to, widen(value, machine.register_width(to), target), mask)


def widen(value: Array, bits: int, kind: str) -> Array:
    """Return integers in a register of more bits, extended as their type says."""
    if value.dtype.kind == "f" or bits <= value.dtype.itemsize * 8:
        return value
    return value.astype(SIGNED[bits] if is_signed(kind) else UNSIGNED[bits])
