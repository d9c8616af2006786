"""Run a module of this package in a process of its own."""

from __future__ import annotations

import sys

# Keep the current folder, which may hold modules of the same names, out of the search path.
# Python 3.10, which JetPack 6 has, doesn't know the option.
_SAFE_PATH = ["-P"] if sys.version_info >= (3, 11) else []


def module_command(module: str, *arguments: str) -> list[str]:
    """Return the command line that runs `module` in this Python."""
    return [sys.executable, *_SAFE_PATH, "-m", module, *arguments]
