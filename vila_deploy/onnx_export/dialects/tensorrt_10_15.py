"""The dialect of tensorrt-rtx and TensorRT from 10.15: attention and cache as single operators."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from vila_deploy.onnx_export.dialects.base import AttentionShape
from vila_deploy.onnx_export.dialects.tensorrt import (
    TensorRtDialect,
    cache_names,
    heads_of,
    side_by_side,
    to_half,
)
from vila_deploy.onnx_export.graph_writer import GraphWriter

MASK = "mask"


class TensorRt10_15Dialect(TensorRtDialect):
    """Opset 24: RMSNormalization, RotaryEmbedding, TensorScatter and Attention.

    Each layer has a cache [batch, kv_heads, max_seq_len, head_dim] for keys and one for values:
    past_key_0 goes in, present_key_0 comes out, and both may be the same memory.
    """

    opset: ClassVar[int] = 24
    # Of each Attention beside those of ONNX.
    own_attributes: ClassVar[dict[str, Any]] = {}

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
        # A key may be seen by the queries at its own place and behind it.
        keys = graph.constant(np.arange(shape.max_seq_len, dtype=np.int64), "places")
        queries = graph.node("Unsqueeze", "positions", graph.integers(1, 3))
        graph.node("GreaterOrEqual", queries, keys, output=MASK)
        first = graph.node("Gather", "positions", graph.integers(0), axis=1)
        graph.node("Reshape", first, graph.integers(-1), output="write_indices")

    def attention(self, graph: GraphWriter, qkv: str, shape: AttentionShape, layer: int) -> str:
        wide, value = heads_of(graph, qkv, shape)
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
            "Attention", query, *present, MASK, scale=shape.head_dim**-0.5, **self.own_attributes
        )
        return side_by_side(graph, attended, shape)

    def finish(self, graph: GraphWriter, num_layers: int) -> None:
        """Nothing: each layer has written its own part of the cache."""


class DecomposableDialect(TensorRt10_15Dialect):
    """For TensorRT, which fails where it has no single kernel for an Attention's shapes, unless
    that may be put together from several (`IAttention::setDecomposable`, from 10.14 on)."""

    own_attributes: ClassVar[dict[str, Any]] = {"TRT_decomposable": 1}
