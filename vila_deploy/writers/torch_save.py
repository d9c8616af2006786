"""Write a file of torch.save tensor by tensor; torch.save itself needs all of them in memory.

The archive: a zip without compression, with data.pkl, a pickle of protocol 2 that builds the
dictionary and names the storages, and the bytes of each storage under data/. The records may stand
in any order, so the pickle comes last, when all names are known.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = "archive"
# As torch aligns storages, so that a mapped file gives aligned tensors.
ALIGNMENT = 64
LOCAL_HEADER_BYTES, ZIP64_BYTES = 30, 20
PADDING_ID = b"FB"
STORAGES = {
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.float32: torch.FloatStorage,
    torch.int16: torch.ShortStorage,
    torch.int32: torch.IntStorage,
}


class TorchFile:
    """Collects a dictionary of tensors in a file that torch.load(weights_only=True) reads."""

    def __init__(self, path: Path):
        self._archive = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED)
        self._entries: dict[str, _Entry] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor; nothing of it is kept in memory."""
        key = str(len(self._entries))
        content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        self._write(f"data/{key}", content.data)
        self._entries[name] = _Entry(key, tensor.dtype, tuple(tensor.shape))

    def finish(self) -> None:
        """Write the pickle that names the tensors, and close the file."""
        content = io.BytesIO()
        _Pickler(content, protocol=2).dump(self._entries)
        self._write("data.pkl", content.getvalue())
        self._write("byteorder", b"little")
        self._write("version", b"3\n")
        self._archive.close()

    def _write(self, name: str, content: bytes | memoryview) -> None:
        info = zipfile.ZipInfo(f"{ROOT}/{name}", date_time=(1980, 1, 1, 0, 0, 0))
        info.file_size = len(content)
        assert self._archive.fp is not None
        begin = self._archive.fp.tell() + LOCAL_HEADER_BYTES + len(info.filename) + ZIP64_BYTES
        padding = -(begin + 4) % ALIGNMENT
        info.extra = PADDING_ID + padding.to_bytes(2, "little") + bytes(padding)
        with self._archive.open(info, "w", force_zip64=True) as record:
            record.write(content)


class _Entry:
    """Pickled as a tensor; `key` names its storage."""

    def __init__(self, key: str, dtype: torch.dtype, shape: tuple[int, ...]):
        self.key, self.dtype, self.shape = key, dtype, shape

    def __reduce__(self) -> tuple[Any, ...]:
        strides, step = [], 1
        for size in reversed(self.shape):
            strides.append(step)
            step *= size
        arguments = (_Storage(self, step), 0, self.shape, tuple(reversed(strides)))
        return torch._utils._rebuild_tensor_v2, (*arguments, False, OrderedDict())


class _Storage:
    def __init__(self, entry: _Entry, count: int):
        self.entry, self.count = entry, count


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, _Storage):
            return ("storage", STORAGES[obj.entry.dtype], obj.entry.key, "cpu", obj.count)
        return None
