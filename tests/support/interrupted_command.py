"""Run a command that sends itself a signal as it changes the N-th file, folder or name.

`python -m tests.support.interrupted_command FOLDER SIGNAL N COMMAND ARGUMENTS…` counts what the
command opens for writing, makes, renames and removes below FOLDER, before each is done, and prints
the count at the end. With N = 0 it sends nothing.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}
COUNTED = "changes: "


def counter(folder: str, at: int, then: Callable[[], None]) -> tuple[Any, list[str]]:
    """Return an audit hook that calls `then` at the change numbered `at`, and what it counts."""
    changes: list[str] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and bool(arguments[2] & WRITING)
        if not (writes or event in CHANGES) or not isinstance(arguments[0], str | os.PathLike):
            return
        if os.fspath(arguments[0]).startswith(folder):
            changes.append(event)
            if len(changes) == at:
                then()

    return hook, changes


def main() -> None:
    folder, number, at, command, *arguments = sys.argv[1:]
    hook, changes = counter(folder, int(at), lambda: os.kill(os.getpid(), int(number)))
    sys.argv = [command, *arguments]
    sys.addaudithook(hook)
    try:
        runpy.run_path(str(Path(sys.executable).parent / command), run_name="__main__")
    finally:
        print(f"{COUNTED}{len(changes)}", file=sys.stderr)


if __name__ == "__main__":
    main()
