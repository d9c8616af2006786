"""The statement of a kernel's source that an instruction was compiled from."""

from __future__ import annotations

from functools import cache

from tests.support.paths import REPOSITORY
from tests.support.ptx.parse import Instruction

KERNELS = REPOSITORY / "kernels"


def statement_of(instruction: Instruction) -> str:
    """Return file and first line of the statement, e.g. `gemm.py: total += scale * part`.

    Numbers of lines change with every edit above them; a statement keeps its text.
    """
    file, _, rest = instruction.source_line.partition(":")
    number = rest.partition(":")[0]
    return f"{file}: {lines_of(file)[int(number) - 1]}" if number.isdecimal() else file


@cache
def lines_of(file: str) -> tuple[str, ...]:
    """Return the lines of a kernel's file, without the space around them; of another's none."""
    path = KERNELS / file
    return tuple(map(str.strip, path.read_text("utf-8").splitlines())) if path.exists() else ()
