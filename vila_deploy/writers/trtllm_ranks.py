"""Writes a TensorRT-LLM checkpoint rank by rank, with memory for one layer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from vila_deploy.checkpoint.llm_config import EMBEDDING, FINAL_NORM, HEAD, LlmConfig, layer_prefix
from vila_deploy.checkpoint.trtllm_sharding import (
    CONFIG,
    DTYPES,
    ONE_GPU,
    QUANT_CONFIG,
    Parallel,
    Shapes,
    check_llm,
    checkpoint_config,
    layer_quantization,
    padded_vocabulary,
    qkv_rows,
    rank_file,
    rank_tensors,
    whole,
)
from vila_deploy.checkpoint.weight_source import WeightSource
from vila_deploy.formats import trtllm
from vila_deploy.formats.trtllm import Dense, Linear
from vila_deploy.utils.files import canonical_json
from vila_deploy.utils.progress import progress


class RankFile:
    """A safetensors file whose tensors are known beforehand and come in any order."""

    def __init__(self, path: Path, tensors: Shapes):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._places: dict[str, tuple[int, torch.dtype, tuple[int, ...]]] = {}
        end = 0
        # Wide elements first, so that every tensor is aligned.
        by_width = sorted(tensors.items(), key=lambda item: (-DTYPES[item[1][0]][1], item[0]))
        for name, (dtype, shape) in by_width:
            begin, (label, width) = end, DTYPES[dtype]
            end += math.prod(shape) * width
            header[name] = {"dtype": label, "shape": list(shape), "data_offsets": [begin, end]}
            self._places[name] = (begin, dtype, shape)
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file = path.open("xb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._start = self._file.tell()
        self._file.truncate(self._start + end)

    def write(self, name: str, tensor: Tensor) -> None:
        """Stores a tensor, once, of the dtype and shape that were announced."""
        begin, dtype, shape = self._places.pop(name)
        assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape), (name, tensor.shape, shape)
        self._file.seek(self._start + begin)
        self._file.write(tensor.contiguous().numpy().data)

    def close(self) -> None:
        self._file.close()

    @property
    def missing(self) -> list[str]:
        return sorted(self._places)


class CheckpointWriter:
    """Writes a checkpoint into the existing `folder`, with memory for one layer.

    Names are those of a plain checkpoint, e.g. `model.norm.weight`; a context manager.
    """

    def __init__(
        self,
        config: LlmConfig,
        folder: Path,
        group_size: int | None,
        parallel: Parallel = ONE_GPU,
    ):
        check_llm(config, group_size, parallel)
        self._config, self._folder = config, folder
        self._group_size, self._parallel = group_size, parallel
        self._qkv: dict[str, dict[str, Linear]] = {}
        self._files = [
            RankFile(folder / rank_file(rank), rank_tensors(config, group_size, parallel, rank))
            for rank in range(parallel.ranks)
        ]

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._files:
            file.close()

    def add_tensor(self, name: str, tensor: Tensor) -> None:
        """The embeddings, the head or a norm, in float16."""
        last = self._parallel.pp - 1
        if name == EMBEDDING:
            self._put_rows(0, f"{trtllm.EMBEDDING.name}.weight", tensor)
            if self._config.tie_word_embeddings:
                self._put_rows(last, f"{trtllm.HEAD.name}.weight", tensor)
        elif name == HEAD:
            self._put_rows(last, f"{trtllm.HEAD.name}.weight", tensor)
        elif name == FINAL_NORM:
            self._put(last, f"{trtllm.FINAL_NORM.name}.weight", [tensor] * self._parallel.tp)
        else:
            stage, prefix, norm = self._layer(name.removesuffix(".weight"))
            full = f"{prefix}.{trtllm.NORMS[norm].name}.weight"
            self._put(stage, full, [tensor] * self._parallel.tp)

    def add_linear(self, prefix: str, linear: Linear) -> None:
        """A linear of a layer, e.g. `model.layers.0.mlp.up_proj`; q, k and v in any order.

        Raises:
            VilaDeployError: zero points, or q, k and v that can't be one linear.
        """
        if not isinstance(linear, Dense) and not linear.symmetric:
            raise trtllm.asymmetric(prefix)
        stage, target, name = self._layer(prefix)
        if name in trtllm.QKV:
            parts = self._qkv.setdefault(target, {})
            parts[name] = linear
            if len(parts) == len(trtllm.QKV):
                self._add_qkv(stage, target, self._qkv.pop(target))
            return
        place, tp = trtllm.LINEARS[name], self._parallel.tp
        size = self._config.linears[name][0 if place.split == "rows" else 1]
        cut = trtllm.rows_of if place.split == "rows" else trtllm.columns_of
        shares = [cut(linear, size * t // tp, size * (t + 1) // tp) for t in range(tp)]
        self._put_linear(stage, f"{target}.{place.name}", shares)

    def finish(self) -> None:
        """Writes the configs; everything must have been added."""
        missing = [name for file in self._files for name in file.missing]
        assert not missing, missing[:3]
        values = checkpoint_config(self._config, self._group_size, self._parallel)
        (self._folder / CONFIG).write_text(canonical_json(values), "utf-8")
        layers = layer_quantization(self._group_size)
        if layers is not None:
            (self._folder / QUANT_CONFIG).write_text(canonical_json(layers), "utf-8")

    def _layer(self, name: str) -> tuple[int, str, str]:
        """model.layers.17.mlp.up_proj → (stage, name of the layer in it, mlp.up_proj)."""
        _, _, index, rest = name.split(".", 3)
        stage, local = divmod(int(index), self._config.num_layers // self._parallel.pp)
        return stage, f"transformer.layers.{local}", rest

    def _add_qkv(self, stage: int, target: str, parts: dict[str, Linear]) -> None:
        config, tp = self._config, self._parallel.tp
        rows = qkv_rows(config, self._parallel)
        shares = []
        for t in range(tp):
            own = []
            for name, count in zip(trtllm.QKV, rows, strict=True):
                heads = config.num_heads if name == trtllm.QKV[0] else config.num_kv_heads
                first = t * heads // tp * config.head_dim
                own.append(trtllm.rows_of(parts[name], first, first + count))
            shares.append(trtllm.join_rows(own, target))
        self._put_linear(stage, f"{target}.{trtllm.JOINED.name}", shares)

    def _put_rows(self, stage: int, name: str, table: Tensor) -> None:
        """A table over the vocabulary, padded with zeros and shared out."""
        padded = padded_vocabulary(self._config, self._group_size, self._parallel)
        rows = whole(padded, self._parallel.tp) // self._parallel.tp
        shares = []
        for t in range(self._parallel.tp):
            share = table[t * rows : (t + 1) * rows]
            padding = table.new_zeros(rows - len(share), table.shape[1])
            shares.append(torch.cat([share, padding]) if len(padding) else share)
        self._put(stage, name, shares)

    def _put_linear(self, stage: int, name: str, shares: list[Linear]) -> None:
        stored = [
            {"weight": share.weight} | ({} if share.bias is None else {"bias": share.bias})
            if isinstance(share, Dense)
            else trtllm.pack(share)
            for share in shares
        ]
        for part in stored[0]:
            self._put(stage, f"{name}.{part}", [tensors[part] for tensors in stored])

    def _put(self, stage: int, name: str, shares: list[Tensor]) -> None:
        first = stage * self._parallel.tp
        for t, share in enumerate(shares):
            self._files[first + t].write(name, share)


def write_trtllm(
    config: LlmConfig,
    source: WeightSource,
    folder: Path,
    parallel: Parallel = ONE_GPU,
) -> None:
    """Writes the LLM as a TensorRT-LLM checkpoint into the existing `folder`.

    W4A16_AWQ where `config` says that it is quantized, float16 otherwise; one layer in memory.

    Raises:
        VilaDeployError: zero points, sizes that don't fit, or a tensor that can't be read.
    """
    from vila_deploy.formats.rtn import to_float16

    group_size = config.quantization.group_size if config.quantization else None

    def half(name: str) -> Tensor:
        return to_float16(source.tensor(name), name)

    steps = config.num_layers + 1
    writer = CheckpointWriter(config, folder, group_size, parallel)
    with writer, progress(steps, "writing the TensorRT-LLM checkpoint") as advance:
        for name in (EMBEDDING, FINAL_NORM, HEAD):
            if name != HEAD or not config.tie_word_embeddings:
                writer.add_tensor(name, half(name))
        advance("embeddings")
        for index in range(config.num_layers):
            prefix = layer_prefix(index)
            for norm in trtllm.NORMS:
                writer.add_tensor(f"{prefix}.{norm}.weight", half(f"{prefix}.{norm}.weight"))
            for name in config.linears:
                full = f"{prefix}.{name}"
                found = source.linear(full)
                if isinstance(found, Tensor):
                    bias = half(f"{full}.bias") if config.has_bias(name) else None
                    writer.add_linear(full, Dense(to_float16(found, full), bias))
                else:
                    writer.add_linear(full, found)
            advance(f"layer {index + 1}/{config.num_layers}")
        writer.finish()
