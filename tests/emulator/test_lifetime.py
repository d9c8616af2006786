"""What the emulator holds: registers until their last use, and within a limit in a rehearsal."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from tests.support.emulator.device import EmulatedDevice
from tests.support.emulator.steps import random_step
from tests.support.paths import REPOSITORY
from tests.support.ptx.lifetime import last_uses
from tests.support.ptx.parse import Kernel
from tests.support.ptx.snippet import execute, snippet

NUMBERS = np.arange(32, dtype=np.uint32) + 1
# Of each round: %r2 is new, %r3 is carried on, %r4 is read ahead of what the round writes to it.
LOOP = """mov.u32 %r3, 0;
mov.u32 %r4, 0;
mov.u32 %r5, 0;
$L_loop:
mul.lo.u32 %r2, %r1, %r5;
add.u32 %r3, %r3, %r2;
add.u32 %r3, %r3, %r4;
add.u32 %r5, %r5, 1;
mov.u32 %r4, %r5;
setp.lt.u32 %p1, %r5, 5;
@%p1 bra $L_loop;
mov.u32 %r0, %r3;"""


def instruction_of(kernel: Kernel, register: str) -> str:
    """Return the instruction behind which a register is dropped."""
    (index,) = (at for at, registers in last_uses(kernel).items() if register in registers)
    return ".".join(kernel.code[index].opcode)


def test_what_the_next_round_needs_lives_until_the_loop_ends() -> None:
    out = np.zeros(32, np.uint32)
    kernel = snippet(LOOP, [NUMBERS], out)
    machine = execute(kernel, [NUMBERS, out])
    assert np.array_equal(out, NUMBERS * 10 + 10)
    assert instruction_of(kernel, "%r2") == "add.u32"
    behind = "mov.u32"
    assert [instruction_of(kernel, name) for name in ("%r1", "%r4", "%r5")] == [behind] * 3
    # The address of the output, and five numbers.
    assert machine.peak_register_bytes == 32 * (8 + 5 * 4)


def test_threads_that_part_keep_what_the_others_need() -> None:
    body = """setp.lt.u32 %p1, %r90, 7;
add.u32 %r2, %r1, 5;
@%p1 bra $L_else;
add.u32 %r3, %r2, 100;
bra.uni $L_end;
$L_else:
add.u32 %r3, %r2, 1000;
$L_end:
mov.u32 %r0, %r3;"""
    out = np.zeros(32, np.uint32)
    execute(snippet(body, [NUMBERS], out), [NUMBERS, out])
    assert np.array_equal(out, NUMBERS + 5 + np.where(np.arange(32) < 7, 1000, 100))


@pytest.mark.slow
def test_a_step_holds_a_small_part_of_its_registers(emulated_device: EmulatedDevice) -> None:
    """Of compiled kernels; a record of a launch holds none."""
    random_step("separate").run()
    products = {"norm_qkv_kernel", "add_residual_kernel", "gate_up_kernel", "head_kernel"}
    for record in (one for one in emulated_device.records if one.name in products):
        names = {name for registers in last_uses(record.kernel).values() for name in registers}
        all_bytes = 4 * len(names) * record.threads
        assert record.peak_register_bytes < all_bytes / 3, record.name


def test_a_stage_that_wants_too_much_memory_fails_by_itself() -> None:
    script = """
import numpy
from tests.support.emulated_stage import MEMORY_LIMIT_BYTES, limit_memory
limit_memory()
numpy.zeros(MEMORY_LIMIT_BYTES // 2, numpy.uint8)
try:
    numpy.zeros(MEMORY_LIMIT_BYTES, numpy.uint8)
except MemoryError:
    print("refused")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY, check=False
    )
    assert done.stdout == "refused\n", done.stderr
