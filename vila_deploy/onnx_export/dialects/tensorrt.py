"""Emit what graphs for every TensorRT share: float16 matrices, float32 between layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import TensorProto
from torch import Tensor

from vila_deploy.formats.base import SYMMETRIC_ZERO, QuantizedLinear
from vila_deploy.formats.int8_linear import Int8Linear
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
from vila_deploy.onnx_export.matrix_pieces import column_ranges
from vila_deploy.onnx_export.rounding import round_head
from vila_deploy.utils.errors import VilaDeployError

SIGN_BIT = 8  # q ^ 8 is the two's complement nibble of q − 8
HEAD = "lm_head"
# The int4 halves of an int8 matrix, and the names of scales. The largest int8 value that the
# halves represent with either sign is 16 · 7 + 7.
PAIR = ("high", "low")
SCALE_OF = {"weight": "scale", "high": "high_scale", "low": "low_scale"}
LARGEST_OF_PAIR = 119
# TensorRT's parser takes int4 matrices with an even number of columns; kernels like more of them.
INT4_COLUMNS = 8
# Values of every graph: the sizes [batch, tokens], and the shapes that begin with them.
TOKEN_SHAPE, ROTATED_SHAPE, VALUE_SHAPE, ROW_SHAPE = (
    f"shape.{name}" for name in ("tokens", "rotated", "values", "rows")
)


class TensorRtDialect(ABC):
    """Emit all building blocks but norm and attention.

    Inputs of every graph: inputs_embeds [batch, tokens, hidden] float32; positions [batch, tokens]
    int64, the position of each token in its sequence, ascending by one; and last [batch] int64, the
    index of each sequence's last token among `tokens`. Tokens after `last` are padding: the next
    pass overwrites their rows of the cache.

    4-bit weights are signed and have no zero points, since TensorRT takes no others. As
    W = s·(q − 8) + s·(8 − z), zero points become a product of the groups' means with
    group · s · (8 − z), which has a row per group. Symmetric weights need no such product.

    Hidden states are [batch · tokens, channels]: between a matrix of rank 2 and activations of
    rank 3 the parser would put a reshape, and TensorRT multiplies by 4-bit weights in one kernel
    only where DequantizeLinear feeds the MatMul directly.

    Args:
        max_matrix_bytes: larger matrices are cut into pieces of columns; None leaves them whole.
    """

    opset: ClassVar[int]
    batch: ClassVar[str] = "batch"

    def __init__(self, max_matrix_bytes: int | None = None) -> None:
        self._max_matrix_bytes = max_matrix_bytes

    def rows(self, graph: GraphWriter, embeds: str, hidden: int) -> str:
        return graph.node("Reshape", embeds, graph.integers(-1, hidden))

    def last(self, graph: GraphWriter, x: str) -> str:
        by_token = graph.node("Reshape", x, ROW_SHAPE)
        index = graph.node("Unsqueeze", "last", graph.integers(1))
        return graph.node("GatherND", by_token, index, batch_dims=1)

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
        if not quantized:
            dense = [linear for linear in linears if isinstance(linear, Tensor)]
            weight = torch.cat(dense) if len(dense) > 1 else dense[0]
            return self._store_float(file, name, float16(weight, name), bias)
        assert len(quantized) == len(linears)
        joined = _joined(name, quantized)
        packed_bytes = joined.q.shape[1] / 2
        return self._store_int4(file, name, joined, packed_bytes)

    def store_head(self, file: WeightFile, weight: Tensor, dtype: str) -> StoredLinear:
        head = round_head(weight, dtype, HEAD, LARGEST_OF_PAIR)
        out_features, in_features = weight.shape
        # A compiler that dequantizes it has it in float16, whatever it is stored in.
        half_bytes = 2 * in_features
        if isinstance(head, Tensor):
            return self._store_float(file, HEAD, float16(head, HEAD), None)
        if isinstance(head, QuantizedLinear):
            return self._store_int4(file, HEAD, head, half_bytes)
        group_size = head_group_size(in_features)
        pieces = []
        for number, (start, end) in enumerate(self._ranges(out_features, half_bytes)):
            piece = Int8Linear(_padded(head.q[start:end]), _padded(head.scale[start:end], 1))
            tensors = _store_pair(file, piece, group_size)
            pieces.append(_stored(f"{HEAD}.{number}", end - start, group_size, tensors))
        return _split(HEAD, pieces)

    def _store_float(
        self, file: WeightFile, name: str, weight: NDArray[np.float16], bias: Tensor | None
    ) -> StoredLinear:
        pieces = []
        half_bias = None if bias is None else float16(bias, f"{name}.bias")
        for number, (start, end) in enumerate(self._ranges(len(weight), 2 * weight.shape[1])):
            tensors = {"weight": file.append(weight[start:end].T)}
            if half_bias is not None:
                tensors["bias"] = file.append(half_bias[start:end])
            pieces.append(_stored(f"{name}.{number}", end - start, None, tensors))
        return _split(name, pieces)

    def _store_int4(
        self, file: WeightFile, name: str, linear: QuantizedLinear, column_bytes: float
    ) -> StoredLinear:
        pieces = []
        for number, (start, end) in enumerate(self._ranges(len(linear.q), column_bytes)):
            tensors = _store_quantized(file, name, _columns(linear, start, end))
            pieces.append(_stored(f"{name}.{number}", end - start, linear.group_size, tensors))
        of_input = {}
        if linear.prequant_scale is not None:
            of_input["prequant_scale"] = file.append(float16(linear.prequant_scale, name))
        return _split(name, pieces, of_input)

    def _ranges(self, columns: int, column_bytes: float) -> list[tuple[int, int]]:
        return column_ranges(columns, column_bytes, self._max_matrix_bytes)

    def linear(self, graph: GraphWriter, x: str, linear: StoredLinear) -> str:
        if "prequant_scale" in linear.tensors:
            name = f"{linear.name}.prequant_scale"
            x = graph.node("Mul", x, graph.weight(name, linear.tensors["prequant_scale"]))
        pieces = linear.parts or (linear,)
        means = ""
        if any("correction" in piece.tensors for piece in pieces):
            assert linear.group_size is not None
            means = _group_means(graph, x, linear.in_features, linear.group_size)
        outputs = [_piece(graph, x, means, piece) for piece in pieces]
        return outputs[0] if len(outputs) == 1 else graph.node("Concat", *outputs, axis=-1)

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
        graph.node("Shape", "positions", output=TOKEN_SHAPE)
        rotated, kv_heads = shape.num_heads + shape.num_kv_heads, shape.num_kv_heads
        for name, rest in (
            (ROTATED_SHAPE, (rotated, shape.head_dim)),
            (VALUE_SHAPE, (kv_heads, shape.head_dim)),
            (ROW_SHAPE, (-1,)),
        ):
            graph.node("Concat", TOKEN_SHAPE, graph.integers(*rest), axis=0, output=name)

    @abstractmethod
    def finish(self, graph: GraphWriter, num_layers: int) -> None: ...


def _piece(graph: GraphWriter, x: str, means: str, piece: StoredLinear) -> str:
    """Return x [rows, in] times one piece, plus its correction by the groups' means and bias."""
    tensors = piece.tensors
    names = {key: graph.weight(f"{piece.name}.{key}", tensor) for key, tensor in tensors.items()}
    keys = PAIR if "high" in names else ("weight",)
    products = [_product(graph, x, names, key, piece.group_size) for key in keys]
    y = products[0] if len(products) == 1 else graph.node("Add", *products)
    if "correction" in names:
        y = graph.node("Add", y, graph.node("MatMul", means, names["correction"]))
    if "bias" in names:
        y = graph.node("Add", y, names["bias"])
    if tensors[keys[0]].shape[1] > piece.out_features:
        start, end, axis = (graph.integers(n) for n in (0, piece.out_features, -1))
        y = graph.node("Slice", y, start, end, axis)
    return y


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

    def by_head(x: str, by_token: str) -> str:
        split = graph.node("Reshape", x, by_token)
        return graph.node("Transpose", split, perm=[0, 2, 1, 3])

    wide = graph.node("Cast", by_head(qk, ROTATED_SHAPE), to=TensorProto.FLOAT)
    return wide, by_head(v, VALUE_SHAPE)


def merge_heads(graph: GraphWriter, attended: str, shape: AttentionShape) -> str:
    """Return [batch, heads, tokens, dim] as [batch · tokens, heads · dim]."""
    rows = graph.node("Transpose", attended, perm=[0, 2, 1, 3])
    return graph.node("Reshape", rows, graph.integers(-1, shape.num_heads * shape.head_dim))


def _group_means(graph: GraphWriter, x: str, width: int, group: int) -> str:
    """Return the mean of each group of x [rows, width]: [rows, width / group].

    Means and no sums, since a sum of float16 values may exceed float16.
    """
    wide = graph.node("Cast", x, to=TensorProto.FLOAT)
    groups = graph.node("Reshape", wide, graph.integers(-1, width // group, group))
    return to_half(graph, graph.node("ReduceMean", groups, graph.integers(-1), keepdims=0))


def _stored(
    name: str, out_features: int, group_size: int | None, tensors: dict[str, StoredTensor]
) -> StoredLinear:
    """Describe a piece of a linear; its matrix may have columns that are only padding."""
    matrix = tensors["weight" if "weight" in tensors else PAIR[0]]
    size = sum(tensor.size_bytes for tensor in tensors.values())
    return StoredLinear(name, out_features, matrix.shape[0], group_size, tensors, size)


def _split(
    name: str, pieces: Sequence[StoredLinear], of_input: Mapping[str, StoredTensor] | None = None
) -> StoredLinear:
    """Describe a linear of several pieces, or the only piece itself."""
    first, of_input = pieces[0], dict(of_input or {})
    size = sum(tensor.size_bytes for tensor in of_input.values())
    if len(pieces) == 1:
        tensors = {**first.tensors, **of_input}
        return replace(
            first, name=name, tensors=tensors, bytes_per_step=first.bytes_per_step + size
        )
    return StoredLinear(
        name,
        sum(piece.out_features for piece in pieces),
        first.in_features,
        first.group_size,
        of_input,
        size + sum(piece.bytes_per_step for piece in pieces),
        tuple(pieces),
    )


def _joined(name: str, linears: Sequence[QuantizedLinear]) -> QuantizedLinear:
    """Return linears that read the same input as one: their outputs are concatenated."""
    assert len({linear.group_size for linear in linears}) == 1
    return QuantizedLinear(
        torch.cat([linear.q for linear in linears]),
        torch.cat([linear.scale for linear in linears]),
        torch.cat([linear.zero for linear in linears]),
        bias=merged_bias(linears),
        prequant_scale=_shared_prequant_scale(name, linears),
    )


def _columns(linear: QuantizedLinear, start: int, end: int) -> QuantizedLinear:
    """Return some outputs of `linear`, followed by zeros up to a multiple of INT4_COLUMNS."""
    return QuantizedLinear(
        _padded(linear.q[start:end], SYMMETRIC_ZERO),
        _padded(linear.scale[start:end], 1),
        _padded(linear.zero[start:end], SYMMETRIC_ZERO),
        bias=None if linear.bias is None else _padded(linear.bias[start:end]),
    )


def _padded(rows: Tensor, value: int = 0) -> Tensor:
    """Return `rows` followed by rows of `value` up to a multiple of INT4_COLUMNS."""
    missing = -len(rows) % INT4_COLUMNS
    return torch.cat([rows, rows.new_full((missing, *rows.shape[1:]), value)]) if missing else rows


def _store_quantized(
    file: WeightFile, name: str, linear: QuantizedLinear
) -> dict[str, StoredTensor]:
    """Write quantized values [in, out], scales, the zero points' correction [groups, out], bias."""
    values, scale = linear.q ^ SIGN_BIT, linear.scale.T
    tensors = {
        "weight": file.append_int4(pack_transposed_nibbles(values), tuple(values.T.shape)),
        "scale": file.append(scale.numpy()),
    }
    if not linear.symmetric:
        correction = scale.float() * (SIGN_BIT - linear.zero.T.float()) * linear.group_size
        tensors["correction"] = file.append(float16(correction, f"{name}.zero"))
    if linear.bias is not None:
        tensors["bias"] = file.append(float16(linear.bias, f"{name}.bias"))
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
