"""Write TensorRT-LLM's checkpoint of the LLM: float16 or W4A16_AWQ, Llama or Qwen2, any GPUs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from vila_deploy.checkpoint import Checkpoint
from vila_deploy.checkpoint.checksums import write_checksums
from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.llm_config import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    NORMS,
    QKV,
    LlmConfig,
    layer_prefix,
)
from vila_deploy.checkpoint.trtllm_sharding import (
    CONFIG,
    FOLDER,
    ONE_GPU,
    QUANT_CONFIG,
    Parallel,
    check_llm,
    checkpoint_config,
    layer_quantization,
    padded_vocabulary,
    qkv_rows,
    rank_file,
    rank_tensors,
    round_up,
)
from vila_deploy.checkpoint.weight_source import WeightSource
from vila_deploy.formats import trtllm
from vila_deploy.formats.base import Packing, QuantizedLinear, QuantScheme, TensorSpec, to_float16
from vila_deploy.formats.registry import Format
from vila_deploy.formats.trtllm import W4A16_AWQ, Dense, Linear
from vila_deploy.utils.files import canonical_json
from vila_deploy.utils.progress import progress
from vila_deploy.writers.folder import Writer, copy_parts, write_llm_config

# safetensors' dtypes: torch's, and bytes of an element.
DTYPES = {"F16": (torch.float16, 2), "F32": (torch.float32, 4), "I8": (torch.int8, 1)}


class TrtllmWriter(Writer):
    """VILA layout, and in trtllm/ what `trtllm-build --checkpoint_dir` takes, for one GPU."""

    def __init__(self, checkpoint: Checkpoint, folder: Path, row: Format, scheme: QuantScheme):
        super().__init__(checkpoint, folder, row, scheme)
        copy_parts(checkpoint, folder)
        (folder / FOLDER).mkdir()
        self._ranks = RankWriter(checkpoint.config.llm, folder / FOLDER, scheme.group_size)

    @classmethod
    def check(cls, packing: Packing, config: VilaConfig, scheme: QuantScheme) -> None:
        super().check(packing, config, scheme)
        check_llm(config.llm, scheme.group_size)

    def add(self, name: str, value: Tensor | QuantizedLinear) -> None:
        if isinstance(value, QuantizedLinear):
            self._ranks.add_linear(name, value)
        else:
            self._ranks.add_tensor(name, value)

    def finish(self) -> None:
        with self._ranks:
            self._ranks.finish()
        write_llm_config(self._checkpoint, self._folder, self._packing, self._scheme)
        write_checksums(self._folder)


class RankFile:
    """A safetensors file whose tensors are known beforehand and come in any order."""

    def __init__(self, path: Path, specs: list[TensorSpec]):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._pending: dict[str, tuple[int, torch.dtype, tuple[int, ...]]] = {}
        end = 0
        # Wide elements first, so that every tensor is aligned.
        for name, shape, (label, *_) in sorted(
            specs, key=lambda spec: (-DTYPES[spec.dtypes[0]][1], spec.name)
        ):
            begin, (dtype, width) = end, DTYPES[label]
            end += math.prod(shape) * width
            header[name] = {"dtype": label, "shape": list(shape), "data_offsets": [begin, end]}
            self._pending[name] = (begin, dtype, shape)
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file = path.open("xb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._start = self._file.tell()
        self._file.truncate(self._start + end)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor, once, of the dtype and shape that were announced."""
        begin, dtype, shape = self._pending.pop(name)
        assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape), (name, tensor.shape, shape)
        self._file.seek(self._start + begin)
        self._file.write(tensor.contiguous().numpy().data)

    def close(self) -> None:
        self._file.close()

    @property
    def missing(self) -> list[str]:
        return sorted(self._pending)


class RankWriter:
    """Writes a checkpoint rank by rank into the existing `folder`, with memory for one layer.

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

    def __enter__(self) -> RankWriter:
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
        """Write the embeddings, the head or a norm, in float16."""
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
        """Write a linear of a layer, e.g. `model.layers.0.mlp.up_proj`; q, k and v in any order.

        Raises:
            VilaDeployError: zero points, or q, k and v that can't be one linear.
        """
        if not isinstance(linear, Dense) and not linear.symmetric:
            raise trtllm.asymmetric(prefix)
        stage, target, name = self._layer(prefix)
        if name in QKV:
            joined = self._qkv.setdefault(target, {})
            joined[name] = linear
            if len(joined) == len(QKV):
                self._add_qkv(stage, target, self._qkv.pop(target))
            return
        module, tp = trtllm.LINEARS[name], self._parallel.tp
        size = self._config.linears[name][0 if module.split == "rows" else 1]
        cut = trtllm.rows_of if module.split == "rows" else trtllm.columns_of
        shares = [cut(linear, size * t // tp, size * (t + 1) // tp) for t in range(tp)]
        self._put_linear(stage, f"{target}.{module.name}", shares)

    def finish(self) -> None:
        """Write the configs; everything must have been added."""
        missing = [name for file in self._files for name in file.missing]
        assert not missing, missing[:3]
        values = checkpoint_config(self._config, self._group_size, self._parallel)
        (self._folder / CONFIG).write_text(canonical_json(values), "utf-8")
        layers = layer_quantization(self._group_size)
        if layers is not None:
            (self._folder / QUANT_CONFIG).write_text(canonical_json(layers), "utf-8")

    def _layer(self, name: str) -> tuple[int, str, str]:
        """model.layers.17.mlp.up_proj → (pipeline stage, name of the layer in it, mlp.up_proj)."""
        _, _, index, rest = name.split(".", 3)
        stage, local = divmod(int(index), self._config.num_layers // self._parallel.pp)
        return stage, f"transformer.layers.{local}", rest

    def _add_qkv(self, stage: int, target: str, linears: dict[str, Linear]) -> None:
        config, tp = self._config, self._parallel.tp
        rows = qkv_rows(config, self._parallel)
        shares = []
        for t in range(tp):
            share = []
            for name, count in zip(QKV, rows, strict=True):
                heads = config.num_heads if name == QKV[0] else config.num_kv_heads
                first = t * heads // tp * config.head_dim
                share.append(trtllm.rows_of(linears[name], first, first + count))
            shares.append(trtllm.join_rows(share, target))
        self._put_linear(stage, f"{target}.{trtllm.JOINED_QKV.name}", shares)

    def _put_rows(self, stage: int, name: str, table: Tensor) -> None:
        """Write a table over the vocabulary, padded with zeros, a share to each rank."""
        padded = padded_vocabulary(self._config, self._group_size, self._parallel)
        rows = round_up(padded, self._parallel.tp) // self._parallel.tp
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
            else W4A16_AWQ.pack(share)
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
    """Write the LLM as a TensorRT-LLM checkpoint into the existing `folder`.

    W4A16_AWQ where `config` says that it is quantized, float16 otherwise; one layer in memory.

    Raises:
        VilaDeployError: zero points, sizes that don't fit, or a tensor that can't be read.
    """
    group_size = config.quantization.group_size if config.quantization else None

    def half(name: str) -> Tensor:
        return to_float16(source.tensor(name), name)

    steps = config.num_layers + 1
    writer = RankWriter(config, folder, group_size, parallel)
    with writer, progress(steps, "writing the TensorRT-LLM checkpoint") as advance:
        for name in (EMBEDDING, FINAL_NORM, *([] if config.tie_word_embeddings else [HEAD])):
            writer.add_tensor(name, half(name))
        advance("embeddings")
        for index in range(config.num_layers):
            prefix = layer_prefix(index)
            for norm in NORMS:
                writer.add_tensor(f"{prefix}.{norm}.weight", half(f"{prefix}.{norm}.weight"))
            for name in config.linears:
                full = f"{prefix}.{name}"
                weight = source.linear(full)
                if isinstance(weight, Tensor):
                    bias = half(f"{full}.bias") if config.has_bias(name) else None
                    writer.add_linear(full, Dense(to_float16(weight, full), bias))
                else:
                    writer.add_linear(full, weight)
            advance(f"layer {index + 1}/{config.num_layers}")
        writer.finish()
