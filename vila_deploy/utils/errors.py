"""The one exception that reaches a user: a single line that says where, what and what to do."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Any


class VilaDeployError(Exception):
    """A problem that the user can act on.

    Args:
        what: the rule that is broken and what was found.
        where: file, config key or tensor that it concerns.
        fix: what to do about it.
    """

    def __init__(self, what: str, *, where: str | Path | None = None, fix: str | None = None):
        self.what, self.where, self.fix = what, where, fix
        line = what if where is None else f"{where}: {what}"
        if fix:
            line = f"{line}; {fix}"
        super().__init__(printable(line))


OUT_OF_MEMORY = "out of memory; close other programs or use a computer with more memory"


def out_of_memory(error: BaseException) -> bool:
    """Whether Python or torch found no memory; torch may not even be imported."""
    told = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and told)


def printable(text: str) -> str:
    """`text` as one line, control characters escaped: hostile names never reach a terminal raw."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def short(value: Any) -> str:
    """`repr` of a value from outside, however long, deep or large, cut to fit into a line."""
    text = _REPR.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 60
_REPR.maxlevel = 3
