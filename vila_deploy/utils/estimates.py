"""Rows and steps of a plan: bytes of what is stored, memory and time of what is done."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class MemoryItem:
    """A part of a model: how many parameters, bits of each, bytes of all."""

    name: str
    parameters: int
    bits: float
    bytes: int

    @classmethod
    def of(cls, name: str, parameters: int, bits: float) -> MemoryItem:
        """Return the row of `parameters` numbers of `bits` each."""
        return cls(name, parameters, bits, int(parameters * bits / 8))


@dataclass(frozen=True)
class PlanStep:
    """A step of a job, the memory that it needs at its peak, and its time if that is known."""

    name: str
    memory_bytes: int
    seconds: float | None = None


def total_contiguous_bytes() -> int | None:
    """Return what Linux keeps for memory in one piece (CMA); None where it doesn't say."""
    return _meminfo_bytes("CmaTotal")


def available_memory_bytes() -> int:
    """Return the memory that a new program can use, within the container's limit."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    available = _meminfo_bytes("MemAvailable")
    if available is not None:
        limits.append(available)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip().isdigit():
        limits.append(max(0, int(limit.read_text()) - int(used.read_text())))
    return min(limits)


def free_swap_bytes() -> int:
    """Return the swap space that is not in use."""
    return _meminfo_bytes("SwapFree") or 0


def _meminfo_bytes(key: str) -> int | None:
    if not MEMINFO.exists():
        return None
    for line in MEMINFO.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    return None
