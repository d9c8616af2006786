"""Execute one launch of a kernel, with every instruction that this interpreter knows."""

from __future__ import annotations

from tests.support.ptx import arithmetic, memory_access, warp, warpgroup
from tests.support.ptx.global_memory import GlobalMemory
from tests.support.ptx.machine import Machine, Options
from tests.support.ptx.parse import Kernel

# Importing them registers their instructions.
INSTRUCTIONS = (arithmetic, memory_access, warp, warpgroup)


def launch(
    kernel: Kernel,
    grid: tuple[int, int, int],
    arguments: dict[str, bytes],
    memory: GlobalMemory,
    shared_bytes: int,
    options: Options,
) -> Machine:
    """Execute a kernel over its grid; return what it did.

    Raises:
        Fault: it does something wrong; the message names the instruction and its source line.
    """
    machine = Machine(kernel, grid, arguments, memory, shared_bytes, options)
    machine.run()
    return machine
