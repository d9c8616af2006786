"""Emit graphs for TensorRT 10.3, that of JetPack 6: only operators that its parser has."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from onnx import TensorProto

from vila_deploy.onnx_export.dialects.base import AttentionShape, cache_names
from vila_deploy.onnx_export.dialects.tensorrt import (
    TensorRtDialect,
    merge_heads,
    split_heads,
    to_half,
)
from vila_deploy.onnx_export.graph_writer import GraphWriter

MASKED_SCORE = np.array(-1e30, np.float32)
NEW_CACHE = "new_cache"


class TensorRt10_3Dialect(TensorRtDialect):
    """Emit operators of opset 21; the graph reads the cache in place and never copies it.

    Inputs past_key_0, past_value_0, … [batch, kv_heads, max_seq_len, head_dim] are zero or earlier
    tokens. The caller writes output new_cache [2 · layers, batch, kv_heads, tokens, head_dim], keys
    and values of each layer in turn, into them at `positions` before the next pass.
    """

    opset: ClassVar[int] = 21

    def norm(self, graph: GraphWriter, x: str, weight: str, epsilon: float) -> str:
        square = graph.node("Mul", x, x)
        mean = graph.node("ReduceMean", square, graph.integers(-1), keepdims=1)
        raised = graph.node("Add", mean, graph.constant(np.array(epsilon, np.float32)))
        normed = graph.node("Div", x, graph.node("Sqrt", raised))
        return to_half(graph, graph.node("Mul", normed, weight))

    def cache(
        self, graph: GraphWriter, shape: AttentionShape, num_layers: int, tokens: int | str
    ) -> None:
        super().cache(graph, shape, num_layers, tokens)
        dims: list[int | str] = ["batch", shape.num_kv_heads, shape.max_seq_len, shape.head_dim]
        for layer in range(num_layers):
            for name in cache_names(layer):
                graph.input(f"past_{name}", np.float16, dims)
        new: list[int | str] = [2 * num_layers, "batch", shape.num_kv_heads, tokens, shape.head_dim]
        graph.output(NEW_CACHE, np.float16, new)
        self._rotary_rows(graph, shape)
        self._masks(graph, shape)

    def _rotary_rows(self, graph: GraphWriter, shape: AttentionShape) -> None:
        """Gather cos and sin of the positions, [batch, 1, tokens, head_dim / 2]."""
        for name, table in (("cos", shape.cos), ("sin", shape.sin)):
            rows = graph.node("Gather", table, "positions", axis=0)
            graph.node("Unsqueeze", rows, graph.integers(1), output=f"rows.{name}")

    def _masks(self, graph: GraphWriter, shape: AttentionShape) -> None:
        """Emit the masks of cached keys [batch, 1, 1, max_seq_len] and of new keys.

        The latter is [batch, 1, group · tokens, tokens], for the `group` query heads of each key.
        """
        positions = graph.constant(np.arange(shape.max_seq_len, dtype=np.int64), "places")
        first = graph.node("Gather", "positions", graph.integers(0), axis=1)
        start = graph.node("Unsqueeze", first, graph.integers(1, 2))
        graph.node("Greater", start, positions, output="mask.past")
        group = shape.num_heads // shape.num_kv_heads
        queries = "positions"
        if group > 1:
            queries = graph.node("Concat", *["positions"] * group, axis=1)
        queries = graph.node("Unsqueeze", queries, graph.integers(1, 3))
        keys = graph.node("Unsqueeze", "positions", graph.integers(1, 2))
        graph.node("GreaterOrEqual", queries, keys, output="mask.new")

    def attention(self, graph: GraphWriter, qkv: str, shape: AttentionShape, layer: int) -> str:
        wide, value = split_heads(graph, qkv, shape)
        names = [graph.new_name("query"), graph.new_name("key")]
        sizes = graph.integers(shape.num_heads, shape.num_kv_heads)
        query, key = graph.nodes("Split", _rotate(graph, wide), sizes, outputs=names, axis=1)
        scale = graph.constant(np.array(shape.head_dim**-0.5, np.float32))
        query, key = to_half(graph, graph.node("Mul", query, scale)), to_half(graph, key)
        for name, new in zip(cache_names(layer), (key, value), strict=True):
            graph.node("Unsqueeze", new, graph.integers(0), output=f"new_{name}")
        # Query heads that share a key are rows of one matrix, so that no key is copied.
        rows = graph.node(
            "Reshape", query, graph.integers(0, shape.num_kv_heads, -1, shape.head_dim)
        )
        past = [f"past_{name}" for name in cache_names(layer)]
        scores = graph.node(
            "Concat",
            _scores(graph, rows, past[0], "mask.past"),
            _scores(graph, rows, key, "mask.new"),
            axis=-1,
        )
        weights = to_half(graph, graph.node("Softmax", scores, axis=-1))
        size, end = shape.max_seq_len, np.iinfo(np.int64).max
        weighted_values = [
            graph.node(
                "MatMul",
                graph.node(
                    "Slice",
                    weights,
                    graph.integers(start),
                    graph.integers(stop),
                    graph.integers(-1),
                ),
                values,
            )
            for start, stop, values in ((0, size, past[1]), (size, end, value))
        ]
        attended = graph.node("Add", *weighted_values)
        heads = graph.integers(0, shape.num_heads, -1, shape.head_dim)
        return merge_heads(graph, graph.node("Reshape", attended, heads), shape)

    def finish(self, graph: GraphWriter, num_layers: int) -> None:
        names = [f"new_{name}" for layer in range(num_layers) for name in cache_names(layer)]
        graph.node("Concat", *names, axis=0, output=NEW_CACHE)


def _rotate(graph: GraphWriter, x: str) -> str:
    """Return the rotary embedding of halves: (a · cos − b · sin) | (b · cos + a · sin)."""
    names = [graph.new_name("first"), graph.new_name("second")]
    a, b = graph.nodes("Split", x, outputs=names, axis=-1, num_outputs=2)

    def times(half: str, table: str) -> str:
        return graph.node("Mul", half, f"rows.{table}")

    left = graph.node("Sub", times(a, "cos"), times(b, "sin"))
    right = graph.node("Add", times(b, "cos"), times(a, "sin"))
    return graph.node("Concat", left, right, axis=-1)


def _scores(graph: GraphWriter, rows: str, keys: str, mask: str) -> str:
    """Return rows · keysᵀ in float32, MASKED_SCORE where `mask` is false."""
    transposed = graph.node("Transpose", keys, perm=[0, 1, 3, 2])
    product = graph.node("Cast", graph.node("MatMul", rows, transposed), to=TensorProto.FLOAT)
    return graph.node("Where", mask, product, graph.constant(MASKED_SCORE))
