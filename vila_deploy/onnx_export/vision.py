"""Write the vision encoder: tower and projector in one graph, or in two for S2."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.variants import PROJECTOR_NORM_EPSILON
from vila_deploy.checkpoint.weight_source import WeightSource
from vila_deploy.onnx_export.cpu_modules import CpuModuleEmitter
from vila_deploy.onnx_export.graph_writer import OPSET, GraphWriter, WeightFile
from vila_deploy.onnx_export.towers import ModuleEmitter, tower
from vila_deploy.utils.progress import Advance


@dataclass(frozen=True)
class VisionGraphOptions:
    """Opset of a vision graph, its types and its operators.

    Args:
        half: multiply in float16.
        int8: store the matrices of the tower's layers in int8.
        max_matrix_bytes: see ModuleEmitter.
        cpu: use onnxruntime's own operators for the CPU, in which int8 matrices are multiplied by
            int8 activations.
        extents: see CpuModuleEmitter.
    """

    opset: int
    half: bool
    int8: bool = False
    max_matrix_bytes: int | None = None
    cpu: bool = False
    extents: frozenset[str] = frozenset()

    def emitter(self, graph: GraphWriter, weights: WeightSource, file: WeightFile) -> ModuleEmitter:
        if self.cpu:
            return CpuModuleEmitter(graph, weights, file, self.int8, self.extents)
        return ModuleEmitter(graph, weights, file, self.half, self.int8, self.max_matrix_bytes)


FLOAT32 = VisionGraphOptions(OPSET, half=False)


def build_vision_graph(
    config: VilaConfig,
    tower_weights: WeightSource,
    projector: WeightSource | None,
    file: WeightFile,
    advance: Advance,
    options: VisionGraphOptions = FLOAT32,
) -> GraphWriter:
    """Return the graph from pixels [tiles, 3, size, size] to features [tiles, tokens, hidden].

    Both are float32.

    Args:
        projector: None leaves it out: features are then the tower's, [tiles, patches, channels].
    """
    graph, vision = GraphWriter(options.opset), config.vision
    size = vision.image_size
    pixels = graph.input("pixels", np.float32, ["tiles", 3, size, size])
    emitter = options.emitter(graph, tower_weights, file)
    x = tower(emitter, pixels, vision, config.vision_layers_used, advance)
    shape: list[int | str] = ["tiles", vision.grid**2, vision.hidden_size]
    if projector is not None:
        x = _project(options.emitter(graph, projector, file), x, config)
        shape = ["tiles", config.tokens_per_block, config.llm.hidden_size]
        advance("projector")
    graph.output(graph.node("Identity", x, output="features"), np.float32, shape)
    return graph


def build_projector_graph(
    config: VilaConfig,
    projector: WeightSource,
    file: WeightFile,
    advance: Advance,
    options: VisionGraphOptions = FLOAT32,
) -> GraphWriter:
    """Return the graph of the projector alone, which follows the S2 features of a tower.

    features [blocks, patches, channels of all scales] → tokens [blocks, tokens, hidden], float32.
    """
    graph = GraphWriter(options.opset)
    shape: list[int | str] = ["blocks", config.feature_side**2, config.feature_channels]
    features = graph.input("features", np.float32, shape)
    tokens = _project(options.emitter(graph, projector, file), features, config)
    shape = ["blocks", config.tokens_per_block, config.llm.hidden_size]
    graph.output(graph.node("Identity", tokens, output="tokens"), np.float32, shape)
    advance("projector")
    return graph


def _project(emitter: ModuleEmitter, x: str, config: VilaConfig) -> str:
    """Emit the steps of the projector's row in PROJECTOR_TYPES."""
    emitter.graph.scope("projector")
    kind = config.projector
    for index, step in enumerate(kind.steps):
        prefix = kind.prefix(index)
        if step == "downsample":
            x = _downsample(emitter.graph, x, config)
        elif step == "gelu":
            x = emitter.graph.node("Gelu", x, approximate="none")
        elif step == "norm":
            x = emitter.norm(x, prefix, PROJECTOR_NORM_EPSILON)
        else:
            x = emitter.linear(x, prefix)
    return x


def _downsample(graph: GraphWriter, x: str, config: VilaConfig) -> str:
    """Concatenate window × window neighbours in the channels; an odd grid is zero-padded."""
    window, side, channels = config.projector.window, config.feature_side, config.feature_channels
    pad = -side % window
    x = graph.node("Reshape", x, graph.integers(0, side, side, channels))
    if pad:
        x = graph.node("Pad", x, graph.integers(0, 0, 0, 0, 0, pad, pad, 0))
    out = (side + pad) // window
    x = graph.node("Reshape", x, graph.integers(-1, out, window, out, window, channels))
    outer = [1, 3] if config.token_order == "row" else [3, 1]
    x = graph.node("Transpose", x, perm=[0, *outer, 2, 4, 5])
    return graph.node("Reshape", x, graph.integers(0, out * out, channels * window**2))
