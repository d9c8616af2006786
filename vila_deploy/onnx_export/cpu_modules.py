"""Emit towers and projectors with onnxruntime's own operators for the CPU."""

from __future__ import annotations

import numpy as np

from vila_deploy.checkpoint.vision_config import VisionConfig
from vila_deploy.checkpoint.weight_source import WeightSource
from vila_deploy.formats.int8_linear import round_int8
from vila_deploy.formats.module_dtypes import is_tower_linear
from vila_deploy.onnx_export.arrays import float32
from vila_deploy.onnx_export.graph_writer import MICROSOFT, GraphWriter, WeightFile
from vila_deploy.onnx_export.towers import ModuleEmitter

# A row of zeros is divided by this instead of its largest magnitude.
LEAST_EXTENT = 1e-30


class CpuModuleEmitter(ModuleEmitter):
    """Emit the layers of one module of a checkpoint, in float32.

    Args:
        int8: multiply in int8 in a tower's layers: weights with a scale for each output,
            activations with one for each row. This reads a quarter of the bytes and takes less
            than half of the time.
        extents: names of a tower's norms whose largest magnitudes [channels] become outputs of the
            graph, called as `extent_name` says.
    """

    def __init__(
        self,
        graph: GraphWriter,
        weights: WeightSource,
        file: WeightFile,
        int8: bool = False,
        extents: frozenset[str] = frozenset(),
    ):
        super().__init__(graph, weights, file)
        self._int8_products, self._extents = int8, extents

    def linear(self, x: str, prefix: str, bias: bool = True) -> str:
        name = f"{prefix}.weight"
        if not (
            self._int8_products and is_tower_linear(name, tuple(self.weights.tensor(name).shape))
        ):
            return super().linear(x, prefix, bias)
        graph, rounded = self.graph, round_int8(self.weights.tensor(name), name)
        q = graph.weight(name, self.file.append(rounded.q.T.numpy()))
        scale = graph.weight(f"{name}.scale", self.file.append(float32(rounded.scale)))
        # The operator has one scale for the whole tensor: rows are brought to one extent first, so
        # that a few tokens of large values, which trained towers have, don't coarsen the others.
        extent = graph.node("ReduceMax", graph.node("Abs", x), graph.integers(-1), keepdims=1)
        extent = graph.node("Max", extent, graph.constant(np.array(LEAST_EXTENT, np.float32)))
        rows = graph.node("Div", x, extent)
        y = graph.node("DynamicQuantizeMatMul", rows, q, scale, domain=MICROSOFT)
        y = graph.node("Mul", y, extent)
        return graph.node("Add", y, self.vector(f"{prefix}.bias")) if bias else y

    def norm(self, x: str, prefix: str, epsilon: float) -> str:
        return self._observed(super().norm(x, prefix, epsilon), prefix)

    def rms_norm(self, x: str, prefix: str, epsilon: float) -> str:
        return self._observed(super().rms_norm(x, prefix, epsilon), prefix)

    def _observed(self, normed: str, prefix: str) -> str:
        if prefix in self._extents:
            graph, name = self.graph, extent_name(prefix)
            axes = graph.integers(0, 1)
            graph.node("ReduceMax", graph.node("Abs", normed), axes, keepdims=0, output=name)
            graph.output(name, np.float32, ["channels"])
        return normed

    def attention(self, query: str, key: str, value: str, config: VisionConfig) -> str:
        return self.graph.node(
            "MultiHeadAttention", query, key, value, domain=MICROSOFT, num_heads=config.num_heads
        )


def extent_name(norm: str) -> str:
    """Return the graph's output with the largest magnitudes behind the norm called `norm`."""
    return f"extent:{norm}"
