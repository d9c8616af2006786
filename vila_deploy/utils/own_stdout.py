"""Keep stdout for this program's own output where a library prints to it too."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TextIO

STDOUT, STDERR = 1, 2


@contextmanager
def libraries_print_to_stderr() -> Iterator[None]:
    """Send what compiled code writes to file descriptor 1 to stderr; `sys.stdout` stays stdout.

    Nothing changes where `sys.stdout` is no such descriptor, as in a notebook.
    """
    previous = sys.stdout
    if _descriptor(previous) != STDOUT:
        yield
        return
    previous.flush()
    own = os.dup(STDOUT)
    os.dup2(STDERR, STDOUT)
    encoding, errors = previous.encoding, previous.errors
    sys.stdout = os.fdopen(own, "w", encoding=encoding, errors=errors, closefd=False)
    try:
        yield
    finally:
        try:
            sys.stdout.flush()
        finally:
            sys.stdout = previous
            os.dup2(own, STDOUT)
            os.close(own)


def imports_print_to_stderr() -> redirect_stdout[TextIO]:
    """Return a context in which Python code's `print` writes to stderr."""
    return redirect_stdout(sys.stderr)


def _descriptor(stream: object) -> int | None:
    try:
        number: int = stream.fileno()  # type: ignore[attr-defined]
    except (AttributeError, OSError, ValueError):
        return None
    return number
