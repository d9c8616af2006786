"""Which of its parameters a kernel writes through."""

from __future__ import annotations

from functools import cache

from tests.support.ptx.parse import Instruction, Kernel, base_and_offset, elements


@cache
def written_params(kernel: Kernel) -> frozenset[str]:
    """Return the names of pointer parameters that stores and atomics are addressed by."""
    sources = _sources(kernel.code)
    written: set[str] = set()
    for instruction in kernel.code:
        name, *modifiers = instruction.opcode
        if "global" in modifiers and name in ("st", "atom", "red"):
            address = instruction.operands[1 if name == "atom" else 0]
            written |= sources.get(base_and_offset(address)[0], set())
    return frozenset(written & {name for kind, name in kernel.params if kind == "u64"})


def _sources(code: list[Instruction]) -> dict[str, set[str]]:
    """Return for each register the parameters that its value may be computed from."""
    sources: dict[str, set[str]] = {}
    changed = True
    while changed:
        changed = False
        for instruction in code:
            if not instruction.operands or instruction.opcode[0] in ("st", "bra"):
                continue
            first, *others = instruction.operands
            found = _from_operands(instruction, others, sources)
            for register in elements(first):
                known = sources.setdefault(register, set())
                if not found <= known:
                    known |= found
                    changed = True
    return sources


def _from_operands(
    instruction: Instruction, operands: list[str], sources: dict[str, set[str]]
) -> set[str]:
    if instruction.opcode[0] == "ld":
        # A loaded number is no pointer of ours, a parameter may be.
        return {operands[0].strip("[] ")} if "param" in instruction.opcode else set()
    if instruction.opcode[0] == "atom":
        return set()
    return {name for text in operands for one in elements(text) for name in sources.get(one, ())}
