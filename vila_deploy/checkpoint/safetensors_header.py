"""Safetensors headers, checked in full before any library sees the file; no torch needed.

The format: 8 bytes little-endian header size, that many bytes of JSON, then the tensors' bytes
without gaps (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vila_deploy.utils.errors import VilaDeployError, short, unreadable
from vila_deploy.utils.files import parse_json_object

MAX_HEADER_BYTES = 16 << 20  # a 70B model in 4 bits needs about 300 kB
MAX_DIMENSIONS = 8
MAX_EXTENT = 1 << 40
METADATA = "__metadata__"
ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}
_LFS_POINTER = b"version "
_DOWNLOAD = "download this file again"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a header; `begin` and `end` count from the end of the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    file: Path


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a safetensors file by name.

    Raises:
        VilaDeployError: no regular file, or anything in it breaks the format.
    """
    file_bytes, header = _header_bytes(path)
    values = parse_json_object(header, f"{path}: header")
    metadata = values.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _error(path, "__metadata__ is not a mapping of strings")
    infos = {name: _tensor_info(path, name, entry) for name, entry in values.items()}
    position = 0
    for info in sorted(infos.values(), key=lambda info: (info.begin, info.end)):
        if info.begin != position:
            kind = "overlaps the one before it" if info.begin < position else "leaves a gap"
            raise _error(path, f"tensor {info.name[:120]} at byte {info.begin} {kind}")
        position = info.end
    expected = 8 + len(header) + position
    if file_bytes != expected:
        state = "is truncated" if file_bytes < expected else "has bytes that belong to no tensor"
        raise _error(path, f"{state}: {file_bytes} bytes, the header asks for {expected}")
    return infos


def _header_bytes(path: Path) -> tuple[int, bytes]:
    """Size of the file, and its JSON part."""
    try:
        status = path.stat()
        # Opening a pipe would wait for ever.
        if not stat.S_ISREG(status.st_mode):
            raise _error(path, "is no regular file")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            first = file.read(8)
            if first == _LFS_POINTER:
                raise VilaDeployError(
                    "is a Git LFS pointer, not the weights", where=path, fix="run 'git lfs pull'"
                )
            length = int.from_bytes(first, "little")
            if len(first) < 8:
                raise _error(path, f"is truncated: {size} bytes")
            if length > min(size - 8, MAX_HEADER_BYTES):
                raise _error(path, f"has an impossible header of {length} bytes in {size} bytes")
            return size, file.read(length)
    except OSError as error:
        raise unreadable(error, path) from error


def _tensor_info(path: Path, name: str, entry: Any) -> TensorInfo:
    def error(what: str) -> VilaDeployError:
        return _error(path, f"tensor {name[:120]}: {what}")

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise error("its entry must have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise error(f"unknown dtype {short(dtype)}")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS or any(n > MAX_EXTENT for n in shape):
        raise error(f"shape must be at most {MAX_DIMENSIONS} sizes, found {short(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise error(f"data_offsets must be two positions, found {short(offsets)}")
    begin, end = offsets
    if end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
        raise error(f"{end - begin} bytes don't hold {dtype} {list(shape)}")
    return TensorInfo(name, dtype, tuple(shape), begin, end, path)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _error(path: Path, what: str) -> VilaDeployError:
    return VilaDeployError(what, where=path, fix=_DOWNLOAD)
