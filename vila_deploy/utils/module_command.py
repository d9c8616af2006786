"""Running a module of this package in a process of its own."""

from __future__ import annotations

import sys

# Python 3.10, which JetPack 6 has, doesn't know it.
_SAFE_PATH = ["-P"] if sys.version_info >= (3, 11) else []


def command(module: str, *arguments: str) -> list[str]:
    """What runs `module` in this Python.

    The package is the installed one, also where the folder that the user is in has one too: in a
    checkout, say, whose kernels/ and engines/ are part of the package only once it is installed.
    """
    return [sys.executable, *_SAFE_PATH, "-m", module, *arguments]
