"""Emit graphs for tensorrt-rtx and TensorRT from 10.15: attention and cache as operators."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from vila_deploy.onnx_export.dialects.base import AttentionShape, cache_names
from vila_deploy.onnx_export.dialects.tensorrt import (
    TensorRtDialect,
    merge_heads,
    split_heads,
    to_half,
)
from vila_deploy.onnx_export.graph_writer import GraphWriter

MASK = "mask"


class TensorRt10_15Dialect(TensorRtDialect):
    """Emit RMSNormalization, RotaryEmbedding, TensorScatter and Attention of opset 24.

    Each layer has a cache [batch, kv_heads, max_seq_len, head_dim] for keys and one for values:
    past_key_0 is an input, present_key_0 an output, and both may be the same memory.

    Args:
        decomposable: let TensorRT compute an Attention with several kernels
            (`IAttention::setDecomposable`, from 10.14 on): without it, TensorRT fails where no
            single kernel fits the shapes. Only TensorRT reads such a graph.
        max_matrix_bytes: see TensorRtDialect.
    """

    opset: ClassVar[int] = 24

    def __init__(self, decomposable: bool = False, *, max_matrix_bytes: int | None = None) -> None:
        super().__init__(max_matrix_bytes)
        self._attention_attributes: dict[str, Any] = {"TRT_decomposable": 1} if decomposable else {}

    def norm(self, graph: GraphWriter, x: str, weight: str, epsilon: float) -> str:
        return to_half(graph, graph.node("RMSNormalization", x, weight, axis=-1, epsilon=epsilon))

    def cache(
        self, graph: GraphWriter, shape: AttentionShape, num_layers: int, tokens: int | str
    ) -> None:
        super().cache(graph, shape, num_layers, tokens)
        dims: list[int | str] = ["batch", shape.num_kv_heads, shape.max_seq_len, shape.head_dim]
        for layer in range(num_layers):
            for name in cache_names(layer):
                graph.input(f"past_{name}", np.float16, dims)
                graph.output(f"present_{name}", np.float16, dims)
        # A query attends to keys at its own position and before it.
        keys = graph.constant(np.arange(shape.max_seq_len, dtype=np.int64), "places")
        queries = graph.node("Unsqueeze", "positions", graph.integers(1, 3))
        graph.node("GreaterOrEqual", queries, keys, output=MASK)
        first = graph.node("Gather", "positions", graph.integers(0), axis=1)
        graph.node("Reshape", first, graph.integers(-1), output="write_indices")

    def attention(self, graph: GraphWriter, qkv: str, shape: AttentionShape, layer: int) -> str:
        wide, value = split_heads(graph, qkv, shape)
        rotated = graph.node("RotaryEmbedding", wide, shape.cos, shape.sin, "positions")
        names = [graph.new_name("query"), graph.new_name("key")]
        sizes = graph.integers(shape.num_heads, shape.num_kv_heads)
        query, key = graph.nodes("Split", to_half(graph, rotated), sizes, outputs=names, axis=1)
        present = [
            graph.node(
                "TensorScatter", f"past_{name}", update, "write_indices",
                output=f"present_{name}", axis=2,
            )
            for name, update in zip(cache_names(layer), (key, value), strict=True)
        ]  # fmt: skip
        attended = graph.node(
            "Attention",
            query,
            *present,
            MASK,
            scale=shape.head_dim**-0.5,
            **self._attention_attributes,
        )
        return merge_heads(graph, attended, shape)

    def finish(self, graph: GraphWriter, num_layers: int) -> None:
        """Add nothing: each layer has updated its own cache."""
