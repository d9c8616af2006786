"""Write the GGUF files of a language model, tensor by tensor, in any order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from vila_deploy.checkpoint.gguf_layout import GgufSpec, row_order
from vila_deploy.checkpoint.gguf_reader import shard_name
from vila_deploy.checkpoint.llm_config import LlmConfig
from vila_deploy.formats.base import BITS, QuantizedLinear, no_prequant_scale
from vila_deploy.formats.gguf import GGUF_BLOCKS, dtype
from vila_deploy.formats.gguf_blocks import five_bit_blocks, quantize_table
from vila_deploy.formats.gguf_file import (
    INT32,
    UINT16,
    GgufTensor,
    Typed,
    header_bytes,
    place,
)

# Of one file; more are several, as llama.cpp splits them. The hub takes up to 50 GB.
MAX_FILE_BYTES = 40 * 10**9
# general.file_type, what most tensors are (llama.h's LLAMA_FTYPE_*).
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 8, "BF16": 32}
FLOATS = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}


class GgufFiles:
    """The GGUF files of one model, whose tensors are known beforehand and come in any order.

    Args:
        name: of the files, without their ending.
        specs: of all tensors, with one type each.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        metadata: dict[str, Any],
        specs: Sequence[GgufSpec],
    ):
        shards = list(_shards(specs))
        self._pending: dict[str, tuple[BinaryIO, int, GgufTensor]] = {}
        self._opened: list[BinaryIO] = []
        self.names = [shard_name(name, number, len(shards)) for number in range(1, len(shards) + 1)]
        for number, shard in enumerate(shards):
            values = dict(metadata) if number == 0 else {}
            if len(shards) > 1:
                values["split.no"] = Typed(UINT16, number)
                values["split.count"] = Typed(UINT16, len(shards))
                values["split.tensors.count"] = Typed(INT32, len(specs))
            tensors = place([(spec.name, spec.shape, spec.types[0]) for spec in shard])
            header = header_bytes(values, tensors)
            file = (folder / self.names[number]).open("xb")
            self._opened.append(file)
            file.write(header)
            file.truncate(len(header) + tensors[-1].begin + tensors[-1].bytes)
            for spec, tensor in zip(shard, tensors, strict=True):
                self._pending[spec.source] = (file, len(header) + tensor.begin, tensor)

    def __enter__(self) -> GgufFiles:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._opened:
            file.close()

    def type_of(self, name: str) -> str:
        """Return how the tensor that we call `name` is stored."""
        return self._pending[name][2].dtype

    def write(self, name: str, parts: Iterator[Tensor] | Sequence[Tensor]) -> None:
        """Write the tensor that we call `name`, once, from its first row on."""
        file, begin, tensor = self._pending.pop(name)
        file.seek(begin)
        written = 0
        for part in parts:
            content = part.contiguous().view(torch.uint8).numpy()
            written += file.write(content.data)
        assert written == tensor.bytes, (name, written, tensor)

    def finish(self) -> None:
        """Close the files; every tensor must have been written."""
        assert not self._pending, sorted(self._pending)[:3]
        for file in self._opened:
            file.close()


def add_tensor(
    files: GgufFiles, config: LlmConfig, name: str, value: Tensor | QuantizedLinear
) -> None:
    """Write a tensor, or a quantized linear with its bias, in the type and order of the file.

    Args:
        name: ours, of a tensor or of a linear.
    """
    order = row_order(config, name)
    if isinstance(value, QuantizedLinear):
        blocks = _blocks(value, files.type_of(f"{name}.weight")).flatten(1)
        files.write(f"{name}.weight", [blocks if order is None else blocks[order]])
        if value.bias is not None:
            add_tensor(files, config, f"{name}.bias", value.bias)
        return
    tensor = value if order is None else value[order]
    stored = files.type_of(name)
    if stored in FLOATS.values():
        target = next(kind for kind, label in FLOATS.items() if label == stored)
        rows = tensor.split(1 << 12) if tensor.ndim > 1 else [tensor]
        files.write(name, (part.to(target) for part in rows))
    else:
        files.write(name, quantize_table(tensor, stored))


def _blocks(linear: QuantizedLinear, kind: str) -> Tensor:
    """Return the blocks [rows, blocks, bytes] of a quantized linear; Q5_0 holds 4 bits too."""
    if kind == "Q5_0" and linear.bits == BITS:
        no_prequant_scale(linear, "GGUF")
        return five_bit_blocks(linear.q, linear.scale, linear.zero)
    return GGUF_BLOCKS.pack(linear, zero_point=kind == dtype(True, linear.bits))["blocks"]


def _shards(specs: Sequence[GgufSpec]) -> Iterator[list[GgufSpec]]:
    shard: list[GgufSpec] = []
    for spec in specs:
        whole = place([(s.name, s.shape, s.types[0]) for s in [*shard, spec]])
        if shard and whole[-1].begin + whole[-1].bytes > MAX_FILE_BYTES:
            yield shard
            shard = []
        shard.append(spec)
    yield shard
