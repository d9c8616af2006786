"""Locks on a work folder, and which programs quantize which layers of it.

One program holds `lock` alone, or those with --layers share it. Each of these keeps a claim, a
locked file that names its layers; the lock ends with the program, the file stays and tells that
the layers were divided among several programs.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from vila_deploy.quantize.layer_range import layers_text
from vila_deploy.utils.errors import VilaDeployError, short

LOCK_FILE, CLAIMS_LOCK_FILE = "lock", "claims.lock"
CLAIM_FILE = re.compile(r"layers-(\d{5,})-(\d{5,})\.claim")
CLAIM_BYTES = 1000


@dataclass(frozen=True)
class Claim:
    """A file that says which layers a program quantizes, or has quantized."""

    file: Path
    layers: range

    def is_held(self) -> bool:
        """Return whether its program is running; False where files can't be locked."""
        with suppress(FileNotFoundError), _opened(self.file) as descriptor:
            return not _try_lock(descriptor)
        return False

    def holder(self) -> str:
        """Return "process 12 on host", as far as the file says so."""
        try:
            value = json.loads(self.file.read_bytes()[:CLAIM_BYTES])
            return f"process {short(value['pid'])} on {short(value['host'])}"
        except (OSError, ValueError, TypeError, KeyError):
            return "another program"


@contextmanager
def locked(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Keep other programs out of the work folder `path`; shared: but those with --layers."""
    with _opened(path / LOCK_FILE) as descriptor:
        held = _try_lock(descriptor, shared=shared)
        # A program that has just finished removes the folder.
        if not held or not (path / LOCK_FILE).exists():
            raise _busy(path)
        yield


@contextmanager
def claims_locked(path: Path) -> Iterator[None]:
    """Let no other program with --layers change claims and state.json meanwhile; waits for it."""
    with _opened(path / CLAIMS_LOCK_FILE) as descriptor:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if not (path / CLAIMS_LOCK_FILE).exists():
            raise _busy(path)
        yield


@contextmanager
def claimed(path: Path, layers: range) -> Iterator[None]:
    """Hold a claim on `layers`; to be entered with the claims locked.

    Raises:
        VilaDeployError: a running program has claimed some of them.
    """
    for claim in held_claims(path):
        if common := set(claim.layers) & set(layers):
            raise VilaDeployError(
                f"{claim.holder()} is quantizing {layers_text(common)}",
                where=path,
                fix="give other --layers, or wait for it",
            )
    with _opened(path / f"layers-{layers.start:05d}-{layers.stop:05d}.claim") as descriptor:
        _try_lock(descriptor)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps({"host": platform.node(), "pid": os.getpid()}).encode())
        yield


def claims(path: Path) -> list[Claim]:
    """Return all claims in the work folder `path`, of running and of ended programs."""
    found = [(file, CLAIM_FILE.fullmatch(file.name)) for file in sorted(path.glob("*.claim"))]
    return [Claim(file, range(int(m[1]), int(m[2]))) for file, m in found if m]


def held_claims(path: Path) -> list[Claim]:
    """Return the claims of running programs."""
    return [claim for claim in claims(path) if claim.is_held()]


@contextmanager
def _opened(file: Path) -> Iterator[int]:
    # Network file systems can lock files that are open for writing, if anything.
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, *, shared: bool = False) -> bool:
    """Return False if another program holds the file's lock."""
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        # Some file systems have no locks at all; then the user must take care.
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    return True


def _busy(path: Path) -> VilaDeployError:
    fix = "wait for it or choose another -o"
    return VilaDeployError("another program is at work in it", where=path, fix=fix)
