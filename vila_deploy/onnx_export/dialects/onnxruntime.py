"""Emit graphs for onnxruntime's CPU provider: fused com.microsoft operators, all in float32."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from onnx import TensorProto
from torch import Tensor

from vila_deploy.formats.base import BITS, GROUP_SIZES, QuantizedLinear
from vila_deploy.formats.int8_linear import Int8Linear, round_int8
from vila_deploy.formats.module_dtypes import FP32, INT8, INT8X2, head_group_size
from vila_deploy.onnx_export.arrays import float16, float32
from vila_deploy.onnx_export.dialects.base import (
    AttentionShape,
    StoredLinear,
    cache_names,
    gated,
    merged_bias,
    pack_nibbles,
)
from vila_deploy.onnx_export.graph_writer import MICROSOFT, OPSET, GraphWriter, WeightFile
from vila_deploy.onnx_export.rounding import round_head
from vila_deploy.utils.errors import VilaDeployError

ACCURACY_FLOAT32, ACCURACY_INT8 = 1, 4
# int8 terms of an activation for each value of --activations; None: no linear is 4-bit. Two hold
# 15 bits of it, 4 more than float16 does; a third costs a third of the speed (188 against 138 ms a
# token at VILA1.5-3b's shapes) and changes no token.
INT8_TERMS: Mapping[str | None, int] = {None: 0, FP32: 0, INT8: 1, INT8X2: 2}
# For 8-bit weights in place of float32 activations, which are as accurate: with those the kernel
# dequantizes every weight at every step.
FLOAT32_TERMS = 3
HEAD = "lm_head"
# Values that a graph computes once for all of its layers.
QKV_SHAPE, LAST_TOKENS = "qkv_shape", "last_tokens"


@dataclass(frozen=True)
class OnnxRuntimeDialect:
    """Emit com.microsoft GroupQueryAttention and MatMulNBits.

    Args:
        int8_terms: 0 multiplies 4-bit weights by float32 activations, 1 by activations rounded to
            int8, with a scale for each token and group, which is about twice as fast. n > 1 splits
            the activations into n int8 terms, x ≈ x₁ + … + xₙ, each term the rounding error of the
            terms before; the kernel reads every weight once for all terms. Two terms have 15 bits
            of each group, three have 22.

    A graph takes the next tokens of several sequences, in rows that follow each other in hidden
    states [rows * tokens, channels]; each row is at a position of its own.
    """

    int8_terms: int = 0
    opset: ClassVar[int] = OPSET
    batch: ClassVar[str] = "rows"

    def rows(self, graph: GraphWriter, embeds: str, hidden: int) -> str:
        return graph.node("Reshape", embeds, graph.integers(-1, hidden))

    def last(self, graph: GraphWriter, x: str) -> str:
        # With one token a row all of them are last.
        return graph.node("Gather", x, LAST_TOKENS, axis=0) if graph.has(LAST_TOKENS) else x

    def gated(self, graph: GraphWriter, both: str) -> str:
        return gated(graph, both)

    def narrowed(self, graph: GraphWriter, x: str) -> str:
        return x

    def store_linear(
        self,
        file: WeightFile,
        name: str,
        linears: Sequence[Tensor | QuantizedLinear],
        bias: Tensor | None = None,
    ) -> StoredLinear:
        quantized = [linear for linear in linears if isinstance(linear, QuantizedLinear)]
        if quantized and len(quantized) == len(linears):
            by_kernel = itertools.groupby(quantized, lambda linear: linear.bits == BITS)
            runs = [list(run) for _, run in by_kernel]
            if len(runs) == 1:
                return _store_quantized(file, name, quantized)
            parts = [
                _store_quantized(file, f"{name}.{index}", run) for index, run in enumerate(runs)
            ]
            return _side_by_side(name, parts)
        dense = [linear for linear in linears if isinstance(linear, Tensor)]
        assert len(dense) == len(linears)
        weight = float16(torch.cat(dense) if len(dense) > 1 else dense[0], name)
        out_features, in_features = weight.shape
        # Stored in float16, widened once when the session is made: that is what a step reads.
        bytes_per_step = weight.size * np.dtype(np.float32).itemsize
        tensors = {"weight": file.append(weight)}
        if bias is not None:
            tensors["bias"] = file.append(float32(bias))
            bytes_per_step += tensors["bias"].size_bytes
        return StoredLinear(name, out_features, in_features, None, tensors, bytes_per_step)

    def store_head(self, file: WeightFile, weight: Tensor, dtype: str) -> StoredLinear:
        if dtype == INT8:
            return _store_int8(file, HEAD, weight)
        head = round_head(weight, dtype, HEAD)
        assert not isinstance(head, Int8Linear)
        return self.store_linear(file, HEAD, [head])

    def linear(self, graph: GraphWriter, x: str, linear: StoredLinear) -> str:
        if linear.parts:
            outputs = [self.linear(graph, x, part) for part in linear.parts]
            return graph.node("Concat", *outputs, axis=-1)
        if linear.group_size is None:
            bias = [_bias(graph, linear)] if "bias" in linear.tensors else []
            return graph.node("Gemm", x, _widened(graph, linear), *bias, transB=1)
        tensors = linear.tensors.items()
        weight = [graph.weight(f"{linear.name}.{k}", t) for k, t in tensors if k in _QUANTIZED]
        bits = 8 if "q8" in linear.tensors else 4
        shape = (linear.out_features, linear.in_features, linear.group_size)
        count = FLOAT32_TERMS if bits == 8 and not self.int8_terms else self.int8_terms
        if count:
            terms = _int8_terms(graph, x, linear.in_features, linear.group_size, count)
            y = _matmul_nbits(graph, terms, weight, shape, ACCURACY_INT8, bits)
        else:
            y = _matmul_nbits(graph, x, weight, shape, ACCURACY_FLOAT32, bits)
        if count > 1:
            y = graph.node("ReduceSum", y, graph.integers(0), keepdims=0)
        if "bias" in linear.tensors:
            y = graph.node("Add", y, _bias(graph, linear))
        return y

    def head(self, graph: GraphWriter, x: str, linear: StoredLinear) -> str:
        if linear.group_size is not None:
            # The head computes one token of a row, however many the rest of the graph takes. One
            # term of its input would add twice the loss that one term in all layers does
            # (SmolLM2-135M).
            terms = replace(self, int8_terms=INT8_TERMS[INT8X2])
            return graph.node("Identity", terms.linear(graph, x, linear), output="logits")
        # The weight comes first: onnxruntime would repack a second operand, which is slower here.
        columns = graph.node("Transpose", x, perm=[1, 0])
        logits = graph.node("MatMul", _widened(graph, linear), columns)
        return graph.node("Transpose", logits, perm=[1, 0], output="logits")

    def norm(self, graph: GraphWriter, x: str, weight: str, epsilon: float) -> str:
        return graph.node("SimplifiedLayerNormalization", x, weight, axis=-1, epsilon=epsilon)

    def add_norm(
        self, graph: GraphWriter, x: str, delta: str, weight: str, epsilon: float
    ) -> tuple[str, str]:
        names = [graph.new_name("normed"), "", "", graph.new_name("sum")]
        normed, _, _, total = graph.nodes(
            "SkipSimplifiedLayerNormalization", x, delta, weight,
            outputs=names, domain=MICROSOFT, epsilon=epsilon,
        )  # fmt: skip
        return normed, total

    def attention(self, graph: GraphWriter, qkv: str, shape: AttentionShape, layer: int) -> str:
        heads, kv_heads = shape.num_heads, shape.num_kv_heads
        packed = graph.node("Reshape", qkv, QKV_SHAPE)
        key, value = cache_names(layer)
        int8 = {
            "kv_cache_bit_width": 8,
            "k_quant_type": "PER_CHANNEL",
            "v_quant_type": "PER_CHANNEL",
        }
        scales = ["", "", "", *shape.cache_scales[layer]] if shape.cache_scales else []
        attended, _, _ = graph.nodes(
            "GroupQueryAttention", packed, "", "", f"past_{key}", f"past_{value}",
            "seqlens_k", "total_sequence_length", shape.cos, shape.sin, *scales,
            outputs=[graph.new_name("attended"), f"present_{key}", f"present_{value}"],
            domain=MICROSOFT, num_heads=heads, kv_num_heads=kv_heads, do_rotary=1,
            **(int8 if scales else {}),
        )  # fmt: skip
        return graph.node("Reshape", attended, graph.integers(-1, heads * shape.head_dim))

    def cache(
        self, graph: GraphWriter, shape: AttentionShape, num_layers: int, tokens: int | str
    ) -> None:
        graph.input("seqlens_k", np.int32, [self.batch])
        graph.input("total_sequence_length", np.int32, [])
        width = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
        if tokens == 1:
            graph.constant(np.array([-1, 1, width]), QKV_SHAPE)
        else:
            _declare_rows(graph, width)
        dims: list[int | str] = [
            self.batch,
            shape.num_kv_heads,
            "max_seq_len",
            shape.head_dim,
        ]
        dtype = np.int8 if shape.cache_scales else np.float32
        for layer in range(num_layers):
            for name in cache_names(layer):
                graph.input(f"past_{name}", dtype, dims)
                graph.output(f"present_{name}", dtype, dims)

    def finish(self, graph: GraphWriter, num_layers: int) -> None:
        """Add nothing: each layer has updated its own cache."""


def _declare_rows(graph: GraphWriter, width: int) -> None:
    """Emit what depends on the numbers of rows and tokens of `inputs_embeds`.

    QKV_SHAPE is [rows, tokens, width], LAST_TOKENS where in all rows' tokens each row ends.
    """
    dims = graph.node("Shape", "inputs_embeds", end=2)
    graph.node("Concat", dims, graph.integers(width), axis=0, output=QKV_SHAPE)
    tokens = graph.node("Gather", dims, graph.constant(np.array(1)))
    all_tokens = graph.node("ReduceProd", dims, keepdims=0)
    first = graph.node("Sub", tokens, graph.constant(np.array(1)))
    graph.node("Range", first, all_tokens, tokens, output=LAST_TOKENS)


def _int8_terms(graph: GraphWriter, x: str, width: int, group: int, count: int) -> str:
    """Return `count` terms of x [rows, width]: [count, rows, width].

    Their sum is x, except for the rounding of the last term to int8. Multiplying x by the
    identity matrix returns x as the kernel rounds it.
    """
    if count == 1:
        return x
    identity = _identity(graph, group)
    rest = graph.node("Reshape", x, graph.integers(-1, group))
    terms = [rest]
    for _ in range(count - 1):
        shape = (group, group, group)
        rounded = _matmul_nbits(graph, rest, identity, shape, ACCURACY_INT8)
        rest = graph.node("Sub", rest, rounded)
        terms.append(rest)
    stacked = graph.node("Concat", *terms, axis=0)
    return graph.node("Reshape", stacked, graph.integers(count, -1, width))


# Inputs of MatMulNBits in their order; zero points default to the middle of the range.
_QUANTIZED = ("q", "q8", "scale", "zero")


def _matmul_nbits(
    graph: GraphWriter,
    x: str,
    weight: list[str],
    shape: tuple[int, int, int],
    accuracy: int,
    bits: int = 4,
) -> str:
    """Return x [rows, in] times quantized weights of `shape` (out, in, group): [rows, out]."""
    out_features, in_features, group = shape
    return graph.node(
        "MatMulNBits", x, *weight, domain=MICROSOFT, N=out_features, K=in_features,
        bits=bits, block_size=group, accuracy_level=accuracy,
    )  # fmt: skip


def _widened(graph: GraphWriter, linear: StoredLinear) -> str:
    weight = graph.weight(linear.name, linear.tensors["weight"])
    return graph.node("Cast", weight, to=TensorProto.FLOAT)


def _bias(graph: GraphWriter, linear: StoredLinear) -> str:
    return graph.weight(f"{linear.name}.bias", linear.tensors["bias"])


def _store_quantized(
    file: WeightFile, name: str, linears: Sequence[QuantizedLinear]
) -> StoredLinear:
    check_group_size(linears[0].group_size, name)
    if any(linear.prequant_scale is not None for linear in linears):
        raise VilaDeployError(
            "has a pre-quantization scale, which backend onnxruntime does not take",
            where=name,
            fix="fold it into the layer before",
        )
    assert len({linear.group_size for linear in linears}) == 1
    q = torch.cat([linear.q for linear in linears])
    out_features, in_features = q.shape
    scale = float32(torch.cat([linear.scale for linear in linears])).reshape(-1)
    zero = torch.cat([linear.zero for linear in linears])
    size = linears[0].group_size
    if linears[0].bits == BITS:
        values = pack_nibbles(q).reshape(out_features, -1, size // 2)
        tensors = {"q": file.append(values), "scale": file.append(scale)}
        tensors["zero"] = file.append(pack_nibbles(zero).reshape(-1))
    else:
        # The kernel has no 5 bits; in a byte they are the same values.
        tensors = {"q8": file.append(q.reshape(out_features, -1, size).numpy())}
        tensors["scale"] = file.append(scale)
        tensors["zero"] = file.append(zero.reshape(-1).numpy())
    bias = merged_bias(linears)
    if bias is not None:
        tensors["bias"] = file.append(float32(bias))
    bytes_per_step = sum(tensor.size_bytes for tensor in tensors.values())
    return StoredLinear(
        name, out_features, in_features, linears[0].group_size, tensors, bytes_per_step
    )


def _side_by_side(name: str, parts: list[StoredLinear]) -> StoredLinear:
    """Return linears of one input as one whose outputs are theirs, side by side."""
    first = parts[0]
    return replace(
        first,
        name=name,
        out_features=sum(part.out_features for part in parts),
        tensors={},
        bytes_per_step=sum(part.bytes_per_step for part in parts),
        parts=tuple(parts),
    )


def _store_int8(file: WeightFile, name: str, weight: Tensor) -> StoredLinear:
    """Round `weight` [out, in] to int8, a scale for each group, which MatMulNBits needs anyway."""
    out_features, in_features = weight.shape
    group_size = head_group_size(in_features)
    linear = round_int8(weight.reshape(-1, group_size), name)
    values = (linear.q.view(torch.uint8) ^ 128).reshape(out_features, -1, group_size)
    tensors = {"q8": file.append(values.numpy()), "scale": file.append(float32(linear.scale))}
    size = sum(tensor.size_bytes for tensor in tensors.values())
    return StoredLinear(name, out_features, in_features, group_size, tensors, size)


def check_group_size(group_size: int, where: str) -> None:
    """Raise VilaDeployError if onnxruntime has no kernel for `group_size`."""
    if group_size not in GROUP_SIZES:
        raise VilaDeployError(
            f"group size {group_size} is not one of {', '.join(map(str, GROUP_SIZES))}",
            where=where,
            fix="run vila-quantize with one of these as --group-size",
        )


def _identity(graph: GraphWriter, size: int) -> list[str]:
    """Return the identity matrix as 4-bit weights with scale 1 and zero point 0."""
    q = pack_nibbles(torch.eye(size, dtype=torch.uint8)).reshape(size, 1, size // 2)
    return [
        graph.constant(q, f"identity_{size}.q"),
        graph.constant(np.ones(size, np.float32), f"identity_{size}.scale"),
        graph.constant(np.zeros(size, np.uint8), f"identity_{size}.zero"),
    ]
