"""Read llm/ of a checkpoint whose weights are GGUF files that this program wrote."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vila_deploy.checkpoint.folder_layout import Layout
from vila_deploy.checkpoint.gguf_layout import (
    FLOAT_TYPES,
    GgufSpec,
    hyperparameters,
    row_order,
    tensor_specs,
)
from vila_deploy.checkpoint.llm_config import EMBEDDING, HEAD, LlmConfig
from vila_deploy.checkpoint.safetensors_header import TensorInfo
from vila_deploy.formats.base import HEAD_LINEAR, QuantizedLinear
from vila_deploy.formats.gguf import GGUF_BLOCKS, dtype, linear_types_of
from vila_deploy.formats.gguf_file import FIX, TENSOR_TYPES, GgufHeader, read_header
from vila_deploy.utils.errors import VilaDeployError, short

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = ".gguf"
# How llama.cpp names the files of one model.
SHARD = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def gguf_files(folder: Path) -> list[Path]:
    """Return the GGUF files in `folder` where there are no safetensors, in the shards' order.

    Raises:
        VilaDeployError: files of several models, or a shard is missing.
    """
    names = sorted(os.listdir(folder))  # noqa: PTH208  names only: links may lead nowhere
    files = [name for name in names if name.endswith(SUFFIX)]
    if not files or any(name.endswith(".safetensors") for name in names):
        return []
    shard = SHARD.fullmatch(files[0])
    expected = files[:1]
    if shard:
        count = int(shard["count"])
        expected = [shard_name(shard["name"], number, count) for number in range(1, count + 1)]
    for name in expected:
        if name not in files:
            raise VilaDeployError("is missing", where=folder / name, fix="download it too")
    if len(files) > len(expected):
        what = f"holds GGUF files of several models, {short(files[0])} and {short(files[-1])}"
        raise VilaDeployError(what, where=folder, fix="remove all but those of one")
    return [folder / name for name in files]


def shard_name(name: str, number: int, count: int) -> str:
    """Return what llama.cpp calls file `number`, from 1, of `count`."""
    return f"{name}{SUFFIX}" if count == 1 else f"{name}-{number:05d}-of-{count:05d}{SUFFIX}"


def open_llm(layout: Layout, config: LlmConfig) -> GgufReader:
    """Open the GGUF files of llm/, checked against `config`."""
    folder = layout.folder("llm")
    files = gguf_files(folder)
    if not files:
        what = f"holds no {SUFFIX} file, or safetensors files beside it"
        raise VilaDeployError(what, where=folder, fix="download the whole checkpoint")
    return GgufReader(files, config)


class GgufReader:
    """A PartReader over the files of one model, under a plain checkpoint's names and row order.

    Tables in Q8_0 or Q6_K are read as float16.

    Raises:
        VilaDeployError: a file that breaks its format, or that is not of the model in `config`.
    """

    def __init__(self, files: list[Path], config: LlmConfig):
        self._config = config
        self._headers = {file: read_header(file) for file in files}
        _check_metadata(self._headers, config)
        quantization = config.quantization
        linear_types = FLOAT_TYPES if quantization is None else (dtype(quantization.zero_point),)
        types_of = {} if quantization is None else linear_types_of(quantization.scheme)
        specs = {
            spec.source: spec
            for spec in tensor_specs(config, linear_types=linear_types, types_of=types_of)
        }
        self._specs, self._file_of = specs, _check_tensors(self._headers, specs.values())

    def files(self) -> list[Path]:
        return sorted(self._headers)

    def names(self) -> list[str]:
        """Return the names of all tensors but the weights of quantized linears."""
        floats = (name for name, spec in self._specs.items() if set(spec.types) & {*FLOAT_TYPES})
        return sorted(floats)

    def info(self, name: str) -> TensorInfo:
        """Return where a tensor lies; its bytes are counted from the end of the header."""
        spec = self._spec(name)
        file = self._file_of[spec.name]
        tensor = self._headers[file].tensors[spec.name]
        end = tensor.begin + tensor.bytes
        return TensorInfo(name, tensor.dtype, tensor.shape, tensor.begin, end, file)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor that is no quantized linear of a layer; a quantized head in float32.

        Raises:
            VilaDeployError: NaN or Inf among its values.
        """
        if name == HEAD and self._config.head_is_quantized:
            head = self.linear(HEAD_LINEAR)
            assert isinstance(head, QuantizedLinear)
            return head.dequantize()
        spec = self._spec(name)
        tensor = self._in_our_order(self._read(spec), name)
        kind = self._narrow_type(spec)
        return tensor if kind is None else _narrowed(tensor, kind)

    def linear(self, prefix: str) -> Tensor | QuantizedLinear:
        """Return the weight [out, in] of a linear layer: a tensor as stored, or a quantized linear.

        Raises:
            VilaDeployError: values that no quantization gives.
        """
        quantization = self._config.quantization
        spec = self._spec(f"{prefix}.weight")
        plain_head = prefix == HEAD_LINEAR and not self._config.head_is_quantized
        if quantization is None or plain_head:
            return self.tensor(spec.source)
        rows = self._bytes(spec).unflatten(1, (-1, TENSOR_TYPES[spec.types[0]].block_bytes))
        bits = quantization.scheme.of(prefix).bits
        try:
            linear = GGUF_BLOCKS.unpack({"blocks": rows}, quantization.group_size, bits)
        except VilaDeployError as error:
            where = f"{self._file_of[spec.name]}: {spec.name}"
            raise VilaDeployError(error.what, where=where, fix=error.fix) from error
        bias = f"{prefix}.bias"
        return replace(
            linear,
            q=self._in_our_order(linear.q, prefix),
            scale=self._in_our_order(linear.scale, prefix),
            zero=self._in_our_order(linear.zero, prefix),
            bias=self.tensor(bias) if bias in self._specs else None,
        )

    def _spec(self, name: str) -> GgufSpec:
        name = EMBEDDING if name == HEAD and self._config.tie_word_embeddings else name
        if name not in self._specs:
            raise VilaDeployError("the checkpoint has no such tensor", where=name, fix=FIX)
        return self._specs[name]

    def _narrow_type(self, spec: GgufSpec) -> str | None:
        """Return the type that a float32 tensor had before: the embedding's; None to keep it."""
        stored = self.info(spec.source).dtype
        if stored in ("F16", "BF16"):
            return None
        table = self.info(EMBEDDING).dtype
        return {"BF16": "BF16", "F32": None}.get(table, "F16") if stored == "F32" else "F16"

    def _in_our_order(self, tensor: Tensor, name: str) -> Tensor:
        order = row_order(self._config, name)
        if order is None:
            return tensor
        ours = tensor.new_empty(tensor.shape)
        ours[order] = tensor
        return ours

    def _read(self, spec: GgufSpec) -> Tensor:
        import torch

        from vila_deploy.formats.gguf_blocks import dequantize_table

        info, content = self.info(spec.source), self._bytes(spec)
        floats = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
        if info.dtype in floats:
            tensor = content.view(floats[info.dtype]).view(info.shape)
        else:
            tensor = torch.cat(
                [dequantize_table(rows, info.dtype) for rows in content.split(1 << 10)]
            )
        if not bool(torch.isfinite(tensor).all()):
            raise VilaDeployError(f"tensor {spec.name} holds NaN or Inf", where=info.file, fix=FIX)
        return tensor

    def _bytes(self, spec: GgufSpec) -> Tensor:
        """Return the bytes [rows, bytes of a row] of a tensor, mapped: don't write into them."""
        import torch

        info = self.info(spec.source)
        try:
            whole = torch.from_file(
                os.fspath(info.file), size=info.file.stat().st_size, dtype=torch.uint8
            )
        except (OSError, RuntimeError) as error:
            raise VilaDeployError(f"cannot be read ({error})", where=info.file, fix=FIX) from error
        start = self._headers[info.file].start
        content = whole[start + info.begin : start + info.end]
        return content.view(spec.shape[0] if len(spec.shape) > 1 else 1, -1)


def _narrowed(tensor: Tensor, kind: str) -> Tensor:
    """Return float32 `tensor` in 16 bits, where that holds all its values or it was quantized."""
    import torch

    narrow = tensor.to({"F16": torch.float16, "BF16": torch.bfloat16}[kind])
    exact = tensor.ndim > 1 or torch.equal(narrow.float(), tensor.float())
    return narrow if exact else tensor


def _check_metadata(headers: dict[Path, GgufHeader], config: LlmConfig) -> None:
    """Raise VilaDeployError unless the first file is of this model, and all are of one."""
    first = next(iter(headers))
    for key, expected in hyperparameters(config).items():
        found = headers[first].metadata.get(key)
        if not _same(found, expected):
            what = f"says {short(found)}, config.json says {short(expected)}"
            raise VilaDeployError(what, where=f"{first}: {key}", fix=FIX)
    for number, (file, header) in enumerate(headers.items()):
        place = (header.metadata.get("split.no", 0), header.metadata.get("split.count", 1))
        if place != (number, len(headers)):
            what = f"is file {short(place[0])} of {short(place[1])}, not {number} of {len(headers)}"
            raise VilaDeployError(what, where=file, fix=FIX)


def _same(found: Any, expected: Any) -> bool:
    import struct

    if isinstance(expected, float):
        single: float = struct.unpack("<f", struct.pack("<f", expected))[0]
        return type(found) is float and found == single
    return type(found) is type(expected) and bool(found == expected)


def _check_tensors(headers: dict[Path, GgufHeader], specs: Iterable[GgufSpec]) -> dict[str, Path]:
    """Return the file of each tensor; raise unless there are exactly those of `specs`."""
    file_of: dict[str, Path] = {}
    for file, header in headers.items():
        for name in header.tensors:
            if name in file_of:
                raise VilaDeployError(f"tensor {name} is in another file too", where=file, fix=FIX)
            file_of[name] = file
    first = next(iter(headers))
    known = set()
    for spec in specs:
        known.add(spec.name)
        if spec.name not in file_of:
            raise VilaDeployError(f"tensor {spec.name} is missing", where=first, fix=FIX)
        file = file_of[spec.name]
        tensor = headers[file].tensors[spec.name]
        if tensor.shape != spec.shape or tensor.dtype not in spec.types:
            what = (
                f"tensor {spec.name} is {tensor.dtype} {list(tensor.shape)}, must be "
                f"{' or '.join(spec.types)} {list(spec.shape)}"
            )
            raise VilaDeployError(what, where=file, fix=FIX)
    for name in file_of.keys() - known:
        raise VilaDeployError(f"tensor {short(name)} is unknown", where=file_of[name], fix=FIX)
    return file_of
