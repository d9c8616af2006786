"""A grid of programs that executes a kernel, all threads in step.

Where threads part, those with the smallest program counter go on until they meet others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from tests.support.ptx.access_log import Programs
from tests.support.ptx.fault import Fault
from tests.support.ptx.global_memory import GlobalMemory
from tests.support.ptx.lifetime import last_uses
from tests.support.ptx.numbers import DTYPES, UNSIGNED, Array, immediate
from tests.support.ptx.parse import Instruction, Kernel, base_and_offset, register_family
from tests.support.ptx.provenance import written_params
from tests.support.ptx.shared_memory import SharedMemory

WARP = 32
# What a register holds before it is written: NaN in every float type.
UNWRITTEN = 0xFF
SHARED_SYMBOL = "global_smem"
NEVER = 1 << 60
# Threads of one batch: as many programs run in step as make about so many.
BATCH_THREADS = 1 << 14
MAX_STEPS = 2_000_000

# None means every thread.
Mask = Array | None


@dataclass
class Group:
    """Threads that stand at one instruction; `mask` None means all."""

    at: int
    mask: Mask


@dataclass
class Options:
    """How a kernel is executed.

    Args:
        races: accesses are logged and checked.
        dependent: by programmatic dependent launch: before `griddepcontrol.wait` nothing is read
            but by loads past the L1, which a prefetch is steered by.
        together: all programs are in one batch, as a cooperative launch asks for.
        max_steps: instructions of a batch, behind which a kernel counts as endless.
    """

    races: bool = False
    dependent: bool = False
    together: bool = False
    max_steps: int = MAX_STEPS


@dataclass
class Machine:
    """One launch of a kernel.

    Args:
        arguments: raw bytes of each parameter, by its name.
        shared_bytes: of a program.
    """

    kernel: Kernel
    grid: tuple[int, int, int]
    arguments: dict[str, bytes]
    memory: GlobalMemory
    shared_bytes: int
    options: Options = field(default_factory=Options)
    # Executed instructions by opcode.
    executed: Counter[str] = field(default_factory=Counter)
    # Indices of guarded instructions that some thread skipped.
    skipped: set[int] = field(default_factory=set)
    # Of a batch's registers that still have a use: now, and the most there were.
    register_bytes: int = field(default=0, init=False)
    peak_register_bytes: int = field(default=0, init=False)

    def run(self) -> None:
        """Execute the whole grid.

        Raises:
            Fault: the kernel did something wrong; the message names the instruction.
        """
        total = int(np.prod(self.grid))
        self._last_uses = last_uses(self.kernel)
        self.programs = Programs(total, self.kernel.threads // WARP)
        if self.options.races:
            addresses = {
                int.from_bytes(self.arguments[name], "little")
                for name in written_params(self.kernel)
            }
            self.memory.watch(addresses, self.programs)
        each = max(1, BATCH_THREADS // self.kernel.threads)
        if self.options.together:
            each = total
        with np.errstate(all="ignore"):
            for first in range(0, total, each):
                self._run_batch(first, min(each, total - first))

    def _run_batch(self, first: int, count: int) -> None:
        threads = self.kernel.threads
        self.count, self.threads = count, threads * count
        lane = np.arange(self.threads)
        self.program = lane // threads
        self.grid_program = first + self.program
        self.warp = (first * threads + lane) // WARP
        self.waited = not self.options.dependent
        watched = self.programs if self.options.races else None
        self.shared = SharedMemory(self.shared_bytes, count, watched)
        self.registers: dict[str, Array] = {}
        self.register_bytes = 0
        self._literals: dict[tuple[str, str], Array] = {}
        self.in_flight: set[str] = set()
        # Of wgmma: committed groups, and the open one: registers, and what they may still read.
        self.warpgroups: list[tuple[set[str], list[tuple[Array, Array]]]] = []
        self.open_registers: set[str] = set()
        self.open_reads: list[tuple[Array, Array]] = []
        self._special = self._special_registers(lane % threads)
        groups = [Group(0, None)]
        steps = 0
        while groups:
            steps += self._run_group(groups)
            if steps > self.options.max_steps:
                raise Fault(f"{self.kernel.name} has not ended after {steps} instructions")
        self.shared.finish()

    def _special_registers(self, thread: Array) -> dict[str, Array]:
        x, y, _ = self.grid
        values = {
            "%tid.x": thread, "%tid.y": 0, "%tid.z": 0, "%laneid": thread % WARP,
            "%ctaid.x": self.grid_program % x, "%ctaid.y": self.grid_program // x % y,
            "%ctaid.z": self.grid_program // (x * y),
            "%nctaid.x": x, "%nctaid.y": y, "%ntid.x": self.kernel.threads,
        }  # fmt: skip
        return {name: np.full(self.threads, value, np.uint32) for name, value in values.items()}

    # Control flow

    def _run_group(self, groups: list[Group]) -> int:
        """Execute the rearmost threads until they meet or part; return how many steps."""
        groups.sort(key=lambda group: group.at)
        at, mask = groups[0].at, groups[0].mask
        del groups[0]
        while groups and groups[0].at == at:
            other = groups.pop(0).mask
            mask = None if mask is None or other is None else mask | other
        if mask is not None and mask.all():
            mask = None
        meet = groups[0].at if groups else NEVER
        code, steps = self.kernel.code, 0
        while at < meet and steps <= self.options.max_steps:
            instruction, steps = code[at], steps + 1
            name = instruction.opcode[0]
            active = self._guarded(at, instruction, mask)
            if name == "ret":
                if active is not mask:
                    raise Fault(f"a part of a program returns; at {instruction}")
                return steps
            if name != "bra" and (active is None or active.any()):
                self._execute(instruction, active)
            self._forget(at)
            if name == "bra":
                target = self.kernel.labels[instruction.operands[0]]
                rest = _without(mask, active, self.threads)
                if rest is None:
                    at = target
                elif active is not None and not active.any():
                    at += 1
                else:
                    groups += [Group(target, active), Group(at + 1, rest)]
                    return steps
            else:
                at += 1
        groups.append(Group(at, mask))
        return steps

    def _forget(self, at: int) -> None:
        """Drop the registers that nothing behind an instruction needs."""
        for register in self._last_uses.get(at, ()):
            value = self.registers.pop(register, None)
            if value is not None:
                self.register_bytes -= value.nbytes

    def _guarded(self, at: int, instruction: Instruction, mask: Mask) -> Mask:
        """Return the threads of `mask` that execute the instruction; `mask` itself if all do."""
        guard = instruction.guard
        if guard is None:
            return mask
        holds = self.registers[guard.register]
        holds = ~holds if guard.negated else holds
        active = holds if mask is None else holds & mask
        if active.all() or (mask is not None and np.array_equal(active, mask)):
            return mask
        self.skipped.add(at)
        return active

    def _execute(self, instruction: Instruction, mask: Mask) -> None:
        opcode = ".".join(instruction.opcode)
        self.executed[opcode] += 1
        try:
            form(instruction.opcode)(self, instruction, mask)
        except Fault as fault:
            raise Fault(f"{fault}; at {instruction}") from None
        except Exception as error:
            raise RuntimeError(f"{type(error).__name__}: {error}; at {instruction}") from error

    # Operands

    def get(self, operand: str, kind: str) -> Array:
        """Return an operand of every thread as the type says; a literal is broadcast."""
        if operand in self._special:
            value = self._special[operand]
        elif operand in self.registers:
            if operand in self.in_flight:
                raise Fault(f"{operand} is read before wgmma.wait_group")
            value = self.registers[operand]
        elif operand == SHARED_SYMBOL:
            return np.zeros(self.threads, DTYPES[kind])
        elif operand[0] == "%":
            raise Fault(f"{operand} is read before it is written")
        else:
            return self._literal(operand, kind)
        dtype = DTYPES[kind]
        if value.dtype == dtype or value.dtype == np.bool_:
            return value
        if value.dtype.itemsize == dtype.itemsize:
            return value.view(dtype)
        return value.astype(UNSIGNED[dtype.itemsize * 8]).view(dtype)

    def _literal(self, text: str, kind: str) -> Array:
        value = self._literals.get((text, kind))
        if value is None:
            value = np.broadcast_to(immediate(text, kind), self.threads)
            self._literals[text, kind] = value
        return value

    def put(self, register: str, value: Array, mask: Mask) -> None:
        """Set a register of the threads of `mask`; `value` has an element for every thread.

        Raises:
            Fault: the value has another width than the register.
        """
        if register == "_":
            return
        bits = self.kernel.register_bits[register_family(register)]
        if bits == 0:
            value = value.astype(np.bool_)
        elif value.dtype.itemsize * 8 == bits:
            value = value.view(UNSIGNED[bits])
        else:
            raise Fault(f"{register} has {bits} bits and gets {value.dtype}")
        old = self.registers.get(register)
        if old is not None:
            self.register_bytes -= old.nbytes
        if mask is not None:
            if old is None:
                old = np.full(self.threads * value.itemsize, UNWRITTEN, np.uint8).view(value.dtype)
            value = np.where(mask, value, old)
        self.registers[register] = value
        self.register_bytes += value.nbytes
        self.peak_register_bytes = max(self.peak_register_bytes, self.register_bytes)

    def register_width(self, register: str) -> int:
        """Return the bits of a register, 0 of a predicate."""
        return self.kernel.register_bits[register_family(register)]

    def address(self, operand: str, mask: Mask) -> Array:
        """Return the address `[base + offset]` of each thread of `mask`."""
        base, offset = base_and_offset(operand)
        if base == SHARED_SYMBOL:
            return select(np.full(self.threads, offset, np.int64), mask)
        return (
            select(self.get(base, f"u{self.register_width(base)}"), mask).astype(np.int64) + offset
        )

    def by_warp(self, value: Array) -> Array:
        """Return values of all threads as [warps, 32]."""
        return np.broadcast_to(value, self.threads).reshape(-1, WARP)

    def check_whole_warps(self, mask: Mask) -> None:
        """Raise Fault if only a part of a warp executes what a warp does together."""
        if mask is not None:
            per_warp = mask.reshape(-1, WARP)
            if (per_warp.any(1) != per_warp.all(1)).any():
                raise Fault("only a part of a warp executes what a warp does together")


Executor = Callable[[Machine, Instruction, Mask], None]
# First part of an opcode → what executes it, and the modifiers that it knows.
FORMS: dict[str, tuple[Executor, frozenset[str]]] = {}


def executes(name: str, modifiers: str = "") -> Callable[[Executor], Executor]:
    """Register what executes an opcode.

    Args:
        modifiers: that may stand between dots behind the name, besides types.
    """

    def register(executor: Executor) -> Executor:
        FORMS[name] = executor, frozenset(modifiers.split())
        return executor

    return register


@cache
def form(opcode: tuple[str, ...]) -> Executor:
    """Return what executes an instruction.

    Raises:
        Fault: there is nothing, or not with these modifiers.
    """
    name, *modifiers = opcode
    executor, known = FORMS.get(name, (None, frozenset[str]()))
    unknown = [word for word in modifiers if word not in known and word not in DTYPES]
    if executor is None or [word for word in unknown if word != "f16x2"]:
        raise Fault(f"unknown instruction {'.'.join(opcode)}")
    return executor


def select(values: Array, mask: Mask) -> Array:
    """Return the elements of the threads of `mask`."""
    return values if mask is None else values[mask]


def spread(values: Array, mask: Mask, threads: int) -> Array:
    """Return values of the threads of `mask` as an element for every thread, elsewhere 0."""
    if mask is None:
        return values
    whole = np.zeros(threads, values.dtype)
    whole[mask] = values
    return whole


def _without(mask: Mask, active: Mask, threads: int) -> Mask:
    """Return the threads of `mask` that aren't `active`; None if there are none."""
    if active is mask:
        return None
    assert active is not None
    return ~active if mask is None else mask & ~active
