"""Emit what graphs for every TensorRT share: float16 matrices, float32 between layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from onnx import TensorProto
from torch import Tensor

from vila_deploy.formats.base import QuantizedLinear
from vila_deploy.formats.module_dtypes import head_group_size
from vila_deploy.onnx_export.arrays import float16
from vila_deploy.onnx_export.dialects.base import (
    AttentionShape,
    StoredLinear,
    gated,
    merged_bias,
    pack_transposed_nibbles,
)
from vila_deploy.onnx_export.graph_writer import GraphWriter, StoredTensor, WeightFile
from vila_deploy.onnx_export.rounding import Int8Linear, round_head
from vila_deploy.utils.errors import VilaDeployError

SIGN_BIT = 8  # q ^ 8 is the two's complement nibble of q − 8
HEAD = "lm_head"
# The int4 halves of an int8 matrix, and the names of scales. The largest int8 value that the
# halves represent with either sign is 16 · 7 + 7.
PAIR = ("high", "low")
SCALE_OF = {"weight": "scale", "high": "high_scale", "low": "low_scale"}
LARGEST_OF_PAIR = 119


class TensorRtDialect(ABC):
    """Emit all building blocks but norm and attention.

    Inputs of every graph: inputs_embeds [batch, tokens, hidden] float32; positions [batch, tokens]
    int64, the position of each token in its sequence, ascending by one; and last [batch] int64, the
    index of each sequence's last token among `tokens`. Tokens after `last` are padding: the next
    pass overwrites their rows of the cache.

    4-bit weights are signed and have no zero points, since TensorRT takes no others. As
    W = s·(q − 8) + s·(8 − z), zero points become a product of the groups' means with
    group · s · (8 − z), which has a row per group. Symmetric weights need no such product.
    """

    opset: ClassVar[int]
    batch: ClassVar[str] = "batch"

    def rows(self, graph: GraphWriter, embeds: str, hidden: int) -> str:
        return embeds

    def last(self, graph: GraphWriter, x: str) -> str:
        index = graph.node("Unsqueeze", "last", graph.integers(1))
        return graph.node("GatherND", x, index, batch_dims=1)

    def narrowed(self, graph: GraphWriter, x: str) -> str:
        return to_half(graph, x)

    def store_linear(
        self,
        file: WeightFile,
        name: str,
        linears: Sequence[Tensor | QuantizedLinear],
        bias: Tensor | None = None,
    ) -> StoredLinear:
        quantized = [linear for linear in linears if isinstance(linear, QuantizedLinear)]
        dense = [linear for linear in linears if isinstance(linear, Tensor)]
        assert not (quantized and dense)
        group_size = None
        if quantized:
            group_size, bias = quantized[0].group_size, merged_bias(quantized)
            tensors = _store_quantized(file, name, quantized)
        else:
            weight = float16(torch.cat(dense) if len(dense) > 1 else dense[0], name)
            tensors = {"weight": file.append(weight.T)}
        if bias is not None:
            tensors["bias"] = file.append(float16(bias, f"{name}.bias"))
        out_features = tensors["scale" if quantized else "weight"].shape[1]
        in_features = tensors["weight"].shape[0]
        size = sum(tensor.size_bytes for tensor in tensors.values())
        return StoredLinear(name, out_features, in_features, group_size, tensors, size)

    def store_head(self, file: WeightFile, weight: Tensor, dtype: str) -> StoredLinear:
        head = round_head(weight, dtype, HEAD, LARGEST_OF_PAIR)
        if not isinstance(head, Int8Linear):
            return self.store_linear(file, HEAD, [head])
        group_size = head_group_size(weight.shape[1])
        tensors = _store_pair(file, head, group_size)
        size = sum(tensor.size_bytes for tensor in tensors.values())
        out_features, in_features = weight.shape
        return StoredLinear(HEAD, out_features, in_features, group_size, tensors, size)

    def linear(self, graph: GraphWriter, x: str, linear: StoredLinear) -> str:
        names = {key: graph.weight(f"{linear.name}.{key}", t) for key, t in linear.tensors.items()}
        if "prequant_scale" in names:
            x = graph.node("Mul", x, names["prequant_scale"])
        if "high" in names:
            halves = (_product(graph, x, names, half, linear.group_size) for half in PAIR)
            return graph.node("Add", *halves)
        y = _product(graph, x, names, "weight", linear.group_size)
        if "correction" in names:
            assert linear.group_size is not None
            means = _group_means(graph, x, linear.in_features, linear.group_size)
            y = graph.node("Add", y, graph.node("MatMul", means, names["correction"]))
        return graph.node("Add", y, names["bias"]) if "bias" in names else y

    def gated(self, graph: GraphWriter, both: str) -> str:
        wide = graph.node("Cast", both, to=TensorProto.FLOAT)
        return to_half(graph, gated(graph, wide))

    def head(self, graph: GraphWriter, x: str, linear: StoredLinear) -> str:
        logits = self.linear(graph, x, linear)
        return graph.node("Cast", logits, to=TensorProto.FLOAT, output="logits")

    def add_norm(
        self, graph: GraphWriter, x: str, delta: str, weight: str, epsilon: float
    ) -> tuple[str, str]:
        total = graph.node("Add", x, graph.node("Cast", delta, to=TensorProto.FLOAT))
        return self.norm(graph, total, weight, epsilon), total

    @abstractmethod
    def norm(self, graph: GraphWriter, x: str, weight: str, epsilon: float) -> str: ...

    @abstractmethod
    def attention(self, graph: GraphWriter, qkv: str, shape: AttentionShape, layer: int) -> str: ...

    def cache(
        self, graph: GraphWriter, shape: AttentionShape, num_layers: int, tokens: int | str
    ) -> None:
        graph.input("positions", np.int64, ["batch", tokens])
        graph.input("last", np.int64, ["batch"])

    @abstractmethod
    def finish(self, graph: GraphWriter, num_layers: int) -> None: ...


def _product(
    graph: GraphWriter, x: str, names: Mapping[str, str], key: str, group_size: int | None
) -> str:
    """Return x times the matrix `key`; scales of a quantized one are under SCALE_OF[key]."""
    weight = names[key]
    if group_size is not None:
        scale = names[SCALE_OF[key]]
        weight = graph.node("DequantizeLinear", weight, scale, axis=0, block_size=group_size)
    return graph.node("MatMul", x, weight)


def to_half(graph: GraphWriter, x: str) -> str:
    """Return `x` in float16."""
    return graph.node("Cast", x, to=TensorProto.FLOAT16)


def split_heads(graph: GraphWriter, qkv: str, shape: AttentionShape) -> tuple[str, str]:
    """Split q | k | v by head: float32 queries | keys, and values [batch, heads, tokens, dim]."""
    rotated, kv, width = shape.num_heads + shape.num_kv_heads, shape.num_kv_heads, shape.head_dim
    names = [graph.new_name("qk"), graph.new_name("v")]
    sizes = graph.integers(rotated * width, kv * width)
    qk, v = graph.nodes("Split", qkv, sizes, outputs=names, axis=-1)

    def by_head(x: str, heads: int) -> str:
        split = graph.node("Reshape", x, graph.integers(0, 0, heads, width))
        return graph.node("Transpose", split, perm=[0, 2, 1, 3])

    wide = graph.node("Cast", by_head(qk, rotated), to=TensorProto.FLOAT)
    return wide, by_head(v, kv)


def merge_heads(graph: GraphWriter, attended: str, shape: AttentionShape) -> str:
    """Return [batch, heads, tokens, dim] as [batch, tokens, heads · dim]."""
    rows = graph.node("Transpose", attended, perm=[0, 2, 1, 3])
    return graph.node("Reshape", rows, graph.integers(0, 0, shape.num_heads * shape.head_dim))


def _group_means(graph: GraphWriter, x: str, width: int, group: int) -> str:
    """Return the mean of each group of x [batch, tokens, width]: [batch, tokens, width / group].

    Means and no sums, since a sum of float16 values may exceed float16.
    """
    wide = graph.node("Cast", x, to=TensorProto.FLOAT)
    groups = graph.node("Reshape", wide, graph.integers(0, 0, width // group, group))
    return to_half(graph, graph.node("ReduceMean", groups, graph.integers(-1), keepdims=0))


def _store_quantized(
    file: WeightFile, name: str, linears: Sequence[QuantizedLinear]
) -> dict[str, StoredTensor]:
    """Write quantized values [in, out], scales and the zero points' correction [groups, out]."""
    group_size = linears[0].group_size
    assert len({linear.group_size for linear in linears}) == 1
    values = torch.cat([linear.q for linear in linears]) ^ SIGN_BIT
    scale = torch.cat([linear.scale for linear in linears]).T
    tensors = {
        "weight": file.append_int4(pack_transposed_nibbles(values), tuple(values.T.shape)),
        "scale": file.append(scale.numpy()),
    }
    if not all(linear.symmetric for linear in linears):
        zero = torch.cat([linear.zero for linear in linears]).T
        correction = scale.float() * (SIGN_BIT - zero.float()) * group_size
        tensors["correction"] = file.append(float16(correction, f"{name}.zero"))
    prequant_scale = _shared_prequant_scale(name, linears)
    if prequant_scale is not None:
        tensors["prequant_scale"] = file.append(float16(prequant_scale, name))
    return tensors


def _store_pair(file: WeightFile, linear: Int8Linear, group_size: int) -> dict[str, StoredTensor]:
    """Write an int8 matrix as two int4 ones, q = 16 · high + low, which is exact.

    TensorRT keeps weights quantized beside float activations where they are int4 (its
    documentation, "Working with Quantized Types"); it may widen int8 ones.
    """
    groups = linear.q.shape[1] // group_size
    tensors = {}
    # All groups of an output have the same scale.
    for key, factor in zip(PAIR, (16, 1), strict=True):
        scale = (linear.scale * factor).expand(groups, -1)
        tensors[SCALE_OF[key]] = file.append(float16(scale.contiguous(), HEAD))
    low = ((linear.q + SIGN_BIT) & 15) - SIGN_BIT
    for key, digits in (("high", (linear.q - low) >> 4), ("low", low)):
        values = (digits & 15).to(torch.uint8)
        tensors[key] = file.append_int4(pack_transposed_nibbles(values), tuple(values.T.shape))
    return tensors


def _shared_prequant_scale(name: str, linears: Sequence[QuantizedLinear]) -> Tensor | None:
    first = linears[0].prequant_scale
    for linear in linears[1:]:
        other = linear.prequant_scale
        same = other is None if first is None else other is not None and torch.equal(first, other)
        if not same:
            raise VilaDeployError(
                "linears with the same input have different pre-quantization scales",
                where=name,
                fix="give them one scale, or fold it into the layer before",
            )
    return first
