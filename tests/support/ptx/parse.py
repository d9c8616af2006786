"""The text of a compiled kernel, taken apart."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache

from tests.support.ptx.fault import Fault

ENTRY = ".visible .entry"
# By the manual a predicate has no width; 0 stands for it here.
PREDICATE_BITS = 0


@dataclass(frozen=True)
class Guard:
    """`@%p` or `@!%p` before an instruction."""

    register: str
    negated: bool


@dataclass(frozen=True)
class Instruction:
    """One instruction: `opcode` at its dots, operands as they are written."""

    opcode: tuple[str, ...]
    operands: tuple[str, ...]
    guard: Guard | None
    source_line: str

    @property
    def kind(self) -> str:
        """Type of the operands, the last part of the opcode."""
        return self.opcode[-1]

    def __str__(self) -> str:
        guard = f"@{'!' * self.guard.negated}{self.guard.register} " if self.guard else ""
        shown = f"{guard}{'.'.join(self.opcode)} {', '.join(self.operands)}".rstrip()
        return f"{shown} ({self.source_line})" if self.source_line else shown


@dataclass(eq=False)
class Kernel:
    """A kernel: name, parameters as (type, name), threads of a program, code and labels.

    `register_bits` is the width of each family of registers, by the name without its number.
    """

    name: str
    params: list[tuple[str, str]]
    threads: int
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    register_bits: dict[str, int] = field(default_factory=dict)


def parse(ptx: str) -> Kernel:
    """Return the one kernel of a PTX module as Triton writes it.

    Raises:
        Fault: there is none.
    """
    found = re.search(r"\.visible \.entry (\w+)\(", ptx)
    if found is None:
        raise Fault("no kernel in the module")
    head, body = ptx[found.start() :].split("\n{", 1)
    threads = re.search(r"\.reqntid (\d+)", head)
    assert threads is not None
    params = re.findall(r"\.param \.(\w+)[^,\n]*?(\w+_param_\d+)", head)
    kernel = Kernel(found[1], params, int(threads[1]))
    source_line = ""
    for raw in body.split("\n"):
        text, _, comment = (part.strip() for part in raw.partition("//"))
        if text.startswith(".section"):
            break
        if text.startswith(".loc"):
            source_line = comment
        elif label := re.match(r"(\$\w+):", text):
            kernel.labels[label[1]] = len(kernel.code)
        else:
            # A block in braces holds registers and instructions of inline assembly.
            for statement in _statements(text):
                _add_statement(kernel, statement, source_line)
    return kernel


def _statements(text: str) -> list[str]:
    """Return what semicolons separate, without the braces of a block of inline assembly."""
    if text.startswith("{") and text.endswith("}") and ";" in text:
        text = text[1:-1]
    return [part for part in (part.strip() for part in text.split(";")) if part.strip("{}")]


def _add_statement(kernel: Kernel, statement: str, source_line: str) -> None:
    if declared := re.match(r"\.reg\s+\.(\w+)\s+(%?[A-Za-z_]+)(<\d+>)?$", statement):
        kind, family, _ = declared.groups()
        kernel.register_bits[family] = PREDICATE_BITS if kind == "pred" else int(kind[1:])
    elif not statement.startswith("."):
        kernel.code.append(_instruction(statement, source_line))


def _instruction(text: str, source_line: str) -> Instruction:
    guard = None
    if text.startswith("@"):
        name, text = text.split(None, 1)
        guard = Guard(name[1:].lstrip("!"), name[1] == "!")
    opcode, _, operands = text.replace("\t", " ").partition(" ")
    return Instruction(tuple(opcode.split(".")), split_operands(operands), guard, source_line)


def split_operands(text: str) -> tuple[str, ...]:
    """Return what commas outside of braces and brackets separate."""
    parts, depth, current = [], 0, ""
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character == "," and not depth:
            parts.append(current.strip())
            current = ""
        else:
            current += character
    return tuple(part for part in (*parts, current.strip()) if part)


@cache
def elements(operand: str) -> tuple[str, ...]:
    """Return the names in `{a, b}`, or the one name without braces."""
    return tuple(part.strip() for part in operand.strip("{} ").split(","))


@cache
def base_and_offset(operand: str) -> tuple[str, int]:
    """Return register and byte offset of `[%rd1 + 16]`."""
    base, _, offset = operand.strip()[1:-1].replace(" ", "").partition("+")
    return base, int(offset, 0) if offset else 0


@cache
def register_family(name: str) -> str:
    """Return the name of a register without its number."""
    return name.rstrip("0123456789")
