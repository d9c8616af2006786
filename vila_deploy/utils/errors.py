"""The one exception that reaches a user: a line that says where, what and what to do."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Collection
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


def check_choice(name: str, value: object, choices: Collection[object]) -> None:
    """Raise VilaDeployError unless `value` of option `name` is one of `choices`."""
    if value not in choices:
        known = ", ".join(str(choice) for choice in choices if choice is not None)
        raise VilaDeployError(f"{name} {short(value)} is unknown", fix=f"give one of {known}")


def check_at_least(name: str, value: float | None, low: float) -> None:
    """Raise VilaDeployError if a number is below `low` or infinite; None is one left out."""
    if value is not None and not low <= value < math.inf:
        raise VilaDeployError(f"{name} is {short(value)}", fix=f"give at least {low}")


def unreadable(error: OSError, where: str | Path) -> VilaDeployError:
    """Return the error for a file that is missing, or that the system doesn't let us read."""
    if isinstance(error, FileNotFoundError):
        return VilaDeployError("is missing", where=where, fix="download this file again")
    return VilaDeployError(
        f"cannot be read ({error.strerror or error})",
        where=where,
        fix="check its permissions and its disk",
    )


OUT_OF_MEMORY = "out of memory; close other programs or use a computer with more memory"


def out_of_memory(error: BaseException) -> bool:
    """Return whether Python or torch, which may not be imported, found no memory."""
    says_so = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and says_so)


def printable(text: str) -> str:
    """Return `text` as one line; control characters, as in hostile names, are escaped."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def short(value: Any) -> str:
    """Return `repr` of a value from outside, however long or deep, cut to fit into a line."""
    text = _REPR.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 60
_REPR.maxlevel = 3
