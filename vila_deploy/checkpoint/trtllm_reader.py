"""Read a TensorRT-LLM checkpoint back, the shares of all ranks joined."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vila_deploy.checkpoint.folder_layout import Layout
from vila_deploy.checkpoint.llm_config import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    NORMS,
    QKV,
    LlmConfig,
    layer_prefix,
)
from vila_deploy.checkpoint.safetensors_header import TensorInfo, read_header
from vila_deploy.checkpoint.trtllm_sharding import (
    CONFIG,
    FOLDER,
    Parallel,
    check_llm,
    padded_vocabulary,
    qkv_rows,
    rank_file,
    rank_tensors,
)
from vila_deploy.formats import trtllm
from vila_deploy.formats.base import QuantizedLinear
from vila_deploy.formats.trtllm import W4A16_AWQ, Dense, Linear
from vila_deploy.utils.errors import VilaDeployError, short
from vila_deploy.utils.fields import Fields

AGAIN = "make the checkpoint again"


class TrtllmCheckpoint:
    """A WeightSource over the checkpoint in `folder`, under a plain checkpoint's names.

    Args:
        config: of the model, whose sizes the checkpoint must have.

    Raises:
        VilaDeployError: another model, algorithm or dtype than can be read, or a file, tensor,
            dtype or shape that is not as config.json says.
    """

    def __init__(self, folder: Path, config: LlmConfig):
        fields = Fields.from_file(folder / CONFIG)
        self._folder, self._config = folder, config
        self.parallel, self.group_size = _parallel(fields), _group_size(fields)
        _check_sizes(fields, config)
        check_llm(config, self.group_size, self.parallel)
        fields.integer("vocab_size", low=config.vocab_size)
        if fields.values["vocab_size"] != padded_vocabulary(config, self.group_size, self.parallel):
            raise fields.error("vocab_size", f"does not fit the model's {config.vocab_size}", AGAIN)
        self._opened: dict[int, Any] = {}
        for rank in range(self.parallel.ranks):
            self._check_rank(rank)

    def files(self) -> list[Path]:
        """Return the files of weights."""
        return [self._folder / rank_file(rank) for rank in range(self.parallel.ranks)]

    def names(self) -> list[str]:
        """Return the names of all tensors but linears and biases."""
        layers = [
            f"{layer_prefix(index)}.{norm}.weight"
            for index in range(self._config.num_layers)
            for norm in NORMS
        ]
        return sorted([EMBEDDING, HEAD, FINAL_NORM, *layers])

    def info(self, name: str) -> TensorInfo:
        """Return where the first share of a tensor of `names` lies."""
        stage, full = self._stored_name(name)
        path = self._folder / rank_file(stage * self.parallel.tp)
        return read_header(path)[full]

    def _stored_name(self, name: str) -> tuple[int, str]:
        """Return pipeline stage and TensorRT-LLM's name of a tensor that no linear has."""
        last = self.parallel.pp - 1
        ends = {
            EMBEDDING: (0, trtllm.EMBEDDING),
            HEAD: (last, trtllm.HEAD),
            FINAL_NORM: (last, trtllm.FINAL_NORM),
        }
        if name in ends:
            stage, module = ends[name]
            return stage, f"{module.name}.weight"
        stage, target, norm = self._layer(name.removesuffix(".weight"))
        return stage, f"{target}.{trtllm.NORMS[norm].name}.weight"

    def tensor(self, name: str) -> Tensor:
        """Return a float16 tensor such as `model.norm.weight`, or the bias of q, k or v."""
        prefix, _, part = name.rpartition(".")
        if part == "bias":
            bias = self._linear(prefix).bias
            assert bias is not None, name
            return bias
        stage, full = self._stored_name(name)
        if name in (EMBEDDING, HEAD):
            return self._rows(stage, full)[: self._config.vocab_size]
        return self._get(stage, 0, full)

    def linear(self, prefix: str) -> Tensor | QuantizedLinear:
        """Return the weight of a linear, e.g. `model.layers.0.mlp.up_proj`; 4-bit with its bias."""
        linear = self._linear(prefix)
        return linear.weight if isinstance(linear, Dense) else linear

    def _linear(self, prefix: str) -> Linear:
        stage, target, name = self._layer(prefix)
        shares = range(self.parallel.tp)
        if name not in QKV:
            module = trtllm.LINEARS[name]
            linears = [self._share(stage, t, f"{target}.{module.name}") for t in shares]
            if module.split == "columns":
                return trtllm.join_columns(linears)
            return trtllm.join_rows(linears, prefix)
        sizes, number = qkv_rows(self._config, self.parallel), QKV.index(name)
        start = sum(sizes[:number])
        if number:
            # Where ranks have copies of a key/value head, the first rank of each has it for all.
            copies = max(1, self.parallel.tp // self._config.num_kv_heads)
            shares = range(0, self.parallel.tp, copies)
        full = f"{target}.{trtllm.JOINED_QKV.name}"
        joined = [self._share(stage, t, full) for t in shares]
        rows = [trtllm.rows_of(share, start, start + sizes[number]) for share in joined]
        return trtllm.join_rows(rows, prefix)

    def _share(self, stage: int, t: int, name: str) -> Linear:
        stored: Sequence[str] = ("weight",) if self.group_size is None else W4A16_AWQ.tensors
        tensors = {part: self._get(stage, t, f"{name}.{part}") for part in stored}
        if name.endswith(trtllm.JOINED_QKV.name) and self._config.family.qkv_bias:
            tensors["bias"] = self._get(stage, t, f"{name}.bias")
        if self.group_size is None:
            return Dense(tensors["weight"], tensors.get("bias"))
        return W4A16_AWQ.unpack(tensors, self.group_size)

    def _rows(self, stage: int, name: str) -> Tensor:
        return torch.cat([self._get(stage, t, name) for t in range(self.parallel.tp)])

    def _layer(self, name: str) -> tuple[int, str, str]:
        _, _, index, rest = name.split(".", 3)
        stage, local = divmod(int(index), self._config.num_layers // self.parallel.pp)
        return stage, f"transformer.layers.{local}", rest

    def _get(self, stage: int, t: int, name: str) -> Tensor:
        from safetensors import SafetensorError, safe_open

        rank = stage * self.parallel.tp + t
        path = self._folder / rank_file(rank)
        try:
            if rank not in self._opened:
                self._opened[rank] = safe_open(path, framework="pt")
            tensor: Tensor = self._opened[rank].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise VilaDeployError(f"cannot be read ({error})", where=path, fix=AGAIN) from error
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise VilaDeployError(f"tensor {name} holds NaN or Inf", where=path, fix=AGAIN)
        return tensor

    def _check_rank(self, rank: int) -> None:
        path = self._folder / rank_file(rank)
        tensors, known = read_header(path), set[str]()
        for name, shape, (dtype,) in rank_tensors(
            self._config, self.group_size, self.parallel, rank
        ):
            known.add(name)
            info = tensors.get(name)
            if info is None:
                raise VilaDeployError(f"tensor {name} is missing", where=path, fix=AGAIN)
            if (info.dtype, info.shape) != (dtype, shape):
                raise VilaDeployError(
                    f"tensor {name} is {info.dtype} {list(info.shape)}, must be {dtype} "
                    f"{list(shape)}",
                    where=path,
                    fix=AGAIN,
                )
        for name in sorted(tensors.keys() - known):
            raise VilaDeployError(f"tensor {name[:120]} is unknown", where=path, fix=AGAIN)


def open_llm(layout: Layout, config: LlmConfig) -> TrtllmCheckpoint:
    """Open the linears in trtllm/ beside llm/."""
    return TrtllmCheckpoint(layout.root / FOLDER, config)


def _parallel(fields: Fields) -> Parallel:
    mapping = fields.child("mapping")
    parallel = Parallel(
        mapping.integer("tp_size", 1, high=1024), mapping.integer("pp_size", 1, high=1024)
    )
    if mapping.integer("world_size", 1, high=1 << 20) != parallel.ranks:
        raise mapping.error("world_size", f"must be tp_size × pp_size = {parallel.ranks}", AGAIN)
    return parallel


def _group_size(fields: Fields) -> int | None:
    if fields.text("dtype") != "float16":
        raise fields.error("dtype", "only float16 is supported", "export it with dtype float16")
    quantization = fields.child("quantization")
    algorithm = quantization.values.get("quant_algo")
    if algorithm is None:
        return None
    if algorithm != "W4A16_AWQ":
        raise quantization.error(
            "quant_algo", f"{short(algorithm)} is not supported", "W4A16_AWQ and null are"
        )
    return quantization.integer("group_size")


def _check_sizes(fields: Fields, config: LlmConfig) -> None:
    for key, expected in (
        ("hidden_size", config.hidden_size),
        ("num_hidden_layers", config.num_layers),
        ("num_attention_heads", config.num_heads),
        ("num_key_value_heads", config.num_kv_heads),
        ("intermediate_size", config.intermediate_size),
    ):
        found = fields.integer(key)
        if found != expected:
            raise fields.error(key, f"{found} is not the model's {expected}", AGAIN)
