"""Headers of GGUF files, version 3: written, and read with every length and offset checked.

The format: magic, version, counts, metadata as typed key-value pairs, a record for each tensor, and
from the next multiple of 32 bytes on the tensors, each at a multiple of 32 from there. All numbers
are little-endian. Source: docs/gguf.md of github.com/ggml-org/ggml.
"""

from __future__ import annotations

import math
import stat
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from vila_deploy.utils.errors import VilaDeployError, short, unreadable

MAGIC, VERSION = b"GGUF", 3
ALIGNMENT = 32
MAX_HEADER_BYTES = 256 << 20  # a vocabulary of 128,256 tokens with its merges needs about 8 MB
MAX_DIMENSIONS = 4
MAX_NAME_BYTES = 64
FIX = "download this file again"
# struct's letter of each kind of number, by the format's own number of the kind.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
UINT16, UINT32, INT32, FLOAT32, BOOL, TEXT, ARRAY = 2, 4, 5, 6, 7, 8, 9


class TensorType(NamedTuple):
    """How values are stored: the format's number, and bytes of a block of so many values."""

    number: int
    block: int
    block_bytes: int


TENSOR_TYPES = {
    "F32": TensorType(0, 1, 4),
    "F16": TensorType(1, 1, 2),
    "Q4_0": TensorType(2, 32, 18),
    "Q4_1": TensorType(3, 32, 20),
    "Q5_0": TensorType(6, 32, 22),
    "Q5_1": TensorType(7, 32, 24),
    "Q8_0": TensorType(8, 32, 34),
    "Q6_K": TensorType(14, 256, 210),
    "BF16": TensorType(30, 1, 2),
}
_NAMES = {row.number: name for name, row in TENSOR_TYPES.items()}


class Typed(NamedTuple):
    """A metadata value of another kind than its Python type is written as."""

    kind: int
    value: Any


@dataclass(frozen=True)
class GgufTensor:
    """One tensor; `begin` counts from the first byte of the tensors' part of the file.

    Args:
        shape: as torch has it, the longest stride first.
        dtype: a key of TENSOR_TYPES.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    begin: int

    @property
    def bytes(self) -> int:
        return tensor_bytes(self.shape, self.dtype)


@dataclass(frozen=True)
class GgufHeader:
    """Metadata and tensors of a file; the tensors begin at byte `start`."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    start: int


def tensor_bytes(shape: Sequence[int], dtype: str) -> int:
    """Return how many bytes a tensor takes, without the padding behind it."""
    kind = TENSOR_TYPES[dtype]
    return math.prod(shape) // kind.block * kind.block_bytes


def aligned(position: int) -> int:
    """Return `position`, or the next multiple of the alignment."""
    return -(-position // ALIGNMENT) * ALIGNMENT


def place(specs: Sequence[tuple[str, tuple[int, ...], str]]) -> list[GgufTensor]:
    """Return tensors (name, shape, dtype) with their places, one behind the other."""
    tensors, position = [], 0
    for name, shape, dtype in specs:
        tensors.append(GgufTensor(name, shape, dtype, position))
        position = aligned(position + tensors[-1].bytes)
    return tensors


def header_bytes(metadata: Mapping[str, Any], tensors: Sequence[GgufTensor]) -> bytes:
    """Return everything before the tensors, padded to the alignment.

    Args:
        metadata: bool, str, int (uint32), float (float32), lists of one of str, int (int32) and
            float, or Typed.
    """
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        typed = value if isinstance(value, Typed) else Typed(_kind(value), value)
        parts += [_text(key), struct.pack("<I", typed.kind), _value(typed.kind, typed.value)]
    for tensor in tensors:
        sides = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
        kind = TENSOR_TYPES[tensor.dtype].number
        parts += [_text(tensor.name), sides, struct.pack("<IQ", kind, tensor.begin)]
    content = b"".join(parts)
    return content + bytes(aligned(len(content)) - len(content))


def _kind(value: Any) -> int:
    if isinstance(value, list):
        return ARRAY
    # bool first: it is an int too.
    kinds = ((bool, BOOL), (str, TEXT), (int, UINT32), (float, FLOAT32))
    return next(kind for python, kind in kinds if isinstance(value, python))


def _value(kind: int, value: Any) -> bytes:
    if kind == TEXT:
        return _text(value)
    if kind == BOOL:
        return struct.pack("<?", value)
    if kind == ARRAY:
        item = _kind(value[0])
        item = INT32 if item == UINT32 else item
        head = struct.pack("<IQ", item, len(value))
        if item in NUMBERS:
            return head + struct.pack(f"<{len(value)}{NUMBERS[item]}", *value)
        return head + b"".join(_value(item, each) for each in value)
    return struct.pack(f"<{NUMBERS[kind]}", value)


def _text(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content


def read_header(path: Path) -> GgufHeader:
    """Return the checked header of a GGUF file; no tensor is read.

    Raises:
        VilaDeployError: no regular file, or anything in it breaks the format.
    """
    try:
        # Opening a pipe would wait for ever.
        if not stat.S_ISREG(path.stat().st_mode):
            raise _error(path, "is no regular file")
        with path.open("rb") as file:
            return _Reader(file, path).header()
    except OSError as error:
        raise unreadable(error, path) from error


class _Reader:
    """Reads a header value by value; `left` bytes of the file are unread."""

    def __init__(self, file: BinaryIO, path: Path):
        self._file, self._path = file, path
        self._size = path.stat().st_size
        self._left = min(self._size, MAX_HEADER_BYTES)

    def header(self) -> GgufHeader:
        magic = self._take(4)
        if magic != MAGIC:
            pointer = magic == b"vers"
            what = "is a Git LFS pointer, not the weights" if pointer else "is no GGUF file"
            raise _error(self._path, what)
        (version,) = self._numbers("I")
        if version != VERSION:
            raise _error(self._path, f"is GGUF version {version}, this version reads {VERSION}")
        count, pairs = self._numbers("QQ")
        metadata: dict[str, Any] = {}
        for _ in range(self._count(pairs, 13)):
            key = self._text()
            if key in metadata:
                raise _error(self._path, f"metadata key {short(key)} occurs twice")
            metadata[key] = self._value(self._numbers("I")[0])
        if metadata.get("general.alignment", ALIGNMENT) != ALIGNMENT:
            raise _error(self._path, "has an alignment of its own, which is not supported")
        tensors = [self._tensor() for _ in range(self._count(count, 24))]
        start = aligned(self._file.tell())
        return GgufHeader(metadata, self._placed(tensors, start), start)

    def _placed(self, tensors: list[GgufTensor], start: int) -> dict[str, GgufTensor]:
        """Return the tensors by name; raise unless they fill the file one behind the other."""
        position = 0
        for tensor in sorted(tensors, key=lambda tensor: tensor.begin):
            if tensor.begin != position:
                what = f"tensor {tensor.name} lies at byte {tensor.begin}, not at {position}"
                raise _error(self._path, what)
            position = aligned(position + tensor.bytes)
        by_name = {tensor.name: tensor for tensor in tensors}
        if len(by_name) < len(tensors):
            raise _error(self._path, "has two tensors of one name")
        # Some writers leave out the padding behind the last tensor.
        last = max((tensor.begin + tensor.bytes for tensor in tensors), default=0)
        if not start + last <= self._size <= start + position:
            state = "is truncated" if self._size < start + last else "has bytes of no tensor"
            raise _error(self._path, f"{state}: {self._size} bytes, not {start + position}")
        return by_name

    def _tensor(self) -> GgufTensor:
        name = self._text()
        if len(name.encode()) >= MAX_NAME_BYTES:
            raise _error(self._path, f"tensor name {short(name)} is too long")
        (dimensions,) = self._numbers("I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise _error(self._path, f"tensor {short(name)} has {dimensions} dimensions")
        shape = tuple(reversed(self._numbers(f"{dimensions}Q")))
        number, begin = self._numbers("IQ")
        if number not in _NAMES:
            known = ", ".join(TENSOR_TYPES)
            what = f"tensor {short(name)} has type {number}; {known} are read"
            raise _error(self._path, what)
        dtype = _NAMES[number]
        if not all(0 < side <= self._size for side in shape):
            raise _error(
                self._path, f"tensor {short(name)} has the impossible shape {short(shape)}"
            )
        if shape[-1] % TENSOR_TYPES[dtype].block:
            raise _error(self._path, f"tensor {short(name)} has rows that are no blocks of {dtype}")
        return GgufTensor(name, shape, dtype, begin)

    def _value(self, kind: int) -> Any:
        if kind == TEXT:
            return self._text()
        if kind == BOOL:
            return self._take(1) != b"\0"
        if kind == ARRAY:
            item, count = self._numbers("IQ")
            if item in NUMBERS:
                self._count(count, struct.calcsize(NUMBERS[item]))
                return list(self._numbers(f"{count}{NUMBERS[item]}"))
            if item in (TEXT, BOOL):
                return [self._value(item) for _ in range(self._count(count, 1))]
            kind = item
        if kind not in NUMBERS:
            raise _error(self._path, f"has a metadata value of unknown kind {kind}")
        return self._numbers(NUMBERS[kind])[0]

    def _text(self) -> str:
        (length,) = self._numbers("Q")
        content = self._take(length)
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            raise _error(self._path, "holds a text that is no UTF-8") from error

    def _numbers(self, letters: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{letters}", self._take(struct.calcsize(f"<{letters}")))

    def _count(self, count: int, least_bytes: int) -> int:
        """Return `count`, if so many values of `least_bytes` or more can follow."""
        if count * least_bytes > self._left:
            raise _error(self._path, f"asks for {count} values in {self._left} bytes")
        return count

    def _take(self, size: int) -> bytes:
        self._count(size, 1)
        content = self._file.read(size)
        self._left -= size
        if len(content) < size:
            raise _error(self._path, "is truncated")
        return content


def _error(path: Path, what: str) -> VilaDeployError:
    return VilaDeployError(what, where=path, fix=FIX)
