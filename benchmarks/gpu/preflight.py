"""What must be right before anything begins: each fault is one line. No torch here."""

from __future__ import annotations

import fcntl
import math
import os
import shutil
import sys
from argparse import ArgumentTypeError
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from benchmarks.gpu import rows
from benchmarks.gpu.folders import (
    BASELINES,
    BASELINES_VARIABLE,
    CACHE_VARIABLE,
    PACKED_CACHE,
    triton_cache,
)
from benchmarks.gpu.kernel_cache import unpack_cache
from vila_deploy.utils.errors import VilaDeployError, short

PACKAGES = ("numpy", "safetensors", "torch", "transformers", "triton")
ROWS, LOG = "rows.jsonl", "log.txt"


def above_zero(text: str) -> float:
    """Return the number in an argument.

    Raises:
        ArgumentTypeError: it is none above 0.
    """
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise ArgumentTypeError(f"give a number above 0, not {short(text)}")
    return number


def check_packages() -> None:
    """Raise VilaDeployError if this Python lacks what every stage imports."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise VilaDeployError(
            f"this Python has no {', '.join(missing)}", where=sys.executable,
            fix="name another one in PYTHON",
        )  # fmt: skip


def open_log(folder: Path) -> IO[bytes]:
    """Return the log of a folder for rows, locked against another run as long as it is open.

    Raises:
        VilaDeployError: nothing can be written there, or another run does.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (ROWS, LOG):
            (folder / name).open("ab").close()
        log = (folder / LOG).open("ab")
    except OSError as error:
        raise VilaDeployError(
            f"rows can't be written ({error.strerror})", where=folder,
            fix="name a folder in OUT that outlives the machine",
        ) from None  # fmt: skip
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        log.close()
        raise VilaDeployError(
            "another run writes its rows here", where=folder,
            fix="wait for its end, or name another folder in OUT",
        ) from None  # fmt: skip
    return log


def check_baselines() -> None:
    """Raise VilaDeployError if the folder of baselines that was named isn't there."""
    named = os.environ.get(BASELINES_VARIABLE)
    if named and named != os.devnull and not Path(named).is_dir():
        raise VilaDeployError(
            "there is no such folder of baselines", where=f"{BASELINES_VARIABLE}={named}",
            fix=f"leave it out, or name {os.devnull} for none",
        )  # fmt: skip


def check_cache() -> None:
    """Raise VilaDeployError if Triton can't keep compiled kernels."""
    folder = triton_cache()
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise VilaDeployError(
            "kernels can't be kept here", where=folder,
            fix=f"name a folder of this machine in {CACHE_VARIABLE}",
        )  # fmt: skip


def take_first_call(first: Path | None, out: Path) -> list[str]:
    """Let a second call know the rows of the first; return warnings.

    It goes on from what that found wrong, and which launch mode was the fastest there. If it is
    begun again in the same folder, the rows are there.

    Args:
        first: folder of the first call; None if it is that of `out`, or unknown.

    Raises:
        VilaDeployError: it has no rows.
    """
    if first is None:
        if rows.read(out):
            return []
        return ["FIRST is not set: nothing is known of call 1; launch modes are timed again"]
    given = first / ROWS
    found = rows.read(given)
    if not found:
        raise VilaDeployError(
            f"call 1 left no {ROWS} here", where=f"FIRST={first}",
            fix="name the folder that was OUT then",
        )  # fmt: skip
    if not (out.exists() and given.samefile(out)) and not rows.read(out):
        shutil.copyfile(given, out)
    return []


def take_kernels(first: Path | None, out: Path) -> list[str]:
    """Bring kernels that were compiled elsewhere into Triton's cache; return warnings."""
    folders = dict.fromkeys(f for f in (BASELINES, first, out.parent) if f is not None)
    packed = [folder / PACKED_CACHE for folder in folders]
    return [said for path in packed if path.is_file() and (said := unpack_cache(path))]
