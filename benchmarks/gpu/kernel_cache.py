"""Compiled kernels, brought from one machine to the next: Triton's cache as one file."""

from __future__ import annotations

import lzma
import shutil
import tarfile
import tempfile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from benchmarks.gpu.folders import PACKED_CACHE, triton_cache

if TYPE_CHECKING:
    from benchmarks.gpu.environment import Run

# Of the cache, and of what is brought back of it.
MOST_BYTES, MOST_PACKED_BYTES = 256 << 20, 16 << 20
INNER = "cache"  # the folder within the file


def pack_cache(run: Run) -> None:
    """Write Triton's cache beside the rows, so that the next machine finds it."""
    folder, path = triton_cache(), run.out.parent / PACKED_CACHE
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    if not folder.is_dir() or size > MOST_BYTES:
        run.add("skipped", "Triton's cache", reason=f"{size >> 20} MiB in {folder}")
        return
    unfinished = path.with_suffix(".part")
    with tarfile.open(unfinished, "w:xz", preset=1) as packed:
        packed.add(folder, INNER)
    packed_bytes = unfinished.stat().st_size
    if packed_bytes > MOST_PACKED_BYTES:
        unfinished.unlink()
        run.add("skipped", "Triton's cache", reason=f"{packed_bytes >> 20} MiB when packed")
        return
    unfinished.replace(path)
    run.add("packed", "Triton's cache", bytes=size, packed_bytes=packed_bytes)


def unpack_cache(path: Path) -> str | None:
    """Add the kernels of a packed cache to Triton's; return what is wrong with the file, if so.

    Kernels that are there already stay as they are.
    """
    folder = triton_cache()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as unpacked:
        try:
            with tarfile.open(path, "r:xz") as packed:
                _extract(packed, Path(unpacked))
        except (OSError, EOFError, tarfile.TarError, lzma.LZMAError) as error:
            return f"{path}: {error or type(error).__name__}; its kernels are compiled again"
        inner = Path(unpacked, INNER)
        for entry in inner.iterdir() if inner.is_dir() else ():
            if not (folder / entry.name).exists():
                entry.rename(folder / entry.name)
    return None


def _extract(packed: tarfile.TarFile, folder: Path) -> None:
    """Write the plain files of `packed`; `extractall` has no filter before Python 3.11.4."""
    for member in packed:
        name = PurePosixPath(member.name)
        if name.is_absolute() or ".." in name.parts:
            raise tarfile.TarError(f"{member.name!r} would lie outside")
        source = packed.extractfile(member) if member.isfile() else None
        if source is not None:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with source, path.open("xb") as target:
                shutil.copyfileobj(source, target)
