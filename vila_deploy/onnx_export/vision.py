"""The vision encoder: a tower and a projector, in one graph or in two."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.variants import PROJECTOR_NORM_EPSILON
from vila_deploy.checkpoint.weight_source import WeightSource
from vila_deploy.onnx_export.graph_writer import OPSET, GraphWriter, WeightFile
from vila_deploy.onnx_export.towers import ModuleEmitter, tower
from vila_deploy.utils.progress import Advance


@dataclass(frozen=True)
class Style:
    """Opset of a graph, whether it multiplies in float16, and whether its layers are in int8."""

    opset: int
    half: bool
    int8: bool = False


FLOAT32 = Style(OPSET, half=False)


def build_vision_graph(
    config: VilaConfig,
    tower_weights: WeightSource,
    projector: WeightSource | None,
    file: WeightFile,
    advance: Advance,
    style: Style = FLOAT32,
) -> GraphWriter:
    """pixels [tiles, 3, size, size] → features [tiles, tokens, hidden], both float32.

    Args:
        projector: None leaves it out: features are then the tower's, [tiles, patches, channels].
    """
    graph, vision = GraphWriter(style.opset), config.vision
    size = vision.image_size
    pixels = graph.input("pixels", np.float32, ["tiles", 3, size, size])
    emitter = ModuleEmitter(graph, tower_weights, file, style.half, style.int8)
    x = tower(emitter, pixels, vision, config.vision_layers_used, advance)
    shape: list[int | str] = ["tiles", vision.grid**2, vision.hidden_size]
    if projector is not None:
        x = _project(ModuleEmitter(graph, projector, file, style.half), x, config)
        shape = ["tiles", config.tokens_per_block, config.llm.hidden_size]
        advance("projector")
    graph.output(graph.node("Identity", x, output="features"), np.float32, shape)
    return graph


def build_projector_graph(
    config: VilaConfig,
    projector: WeightSource,
    file: WeightFile,
    advance: Advance,
    style: Style = FLOAT32,
) -> GraphWriter:
    """features [blocks, patches, channels of all scales] → tokens [blocks, tokens, hidden]."""
    graph = GraphWriter(style.opset)
    shape: list[int | str] = ["blocks", config.feature_side**2, config.feature_channels]
    features = graph.input("features", np.float32, shape)
    tokens = _project(ModuleEmitter(graph, projector, file, style.half), features, config)
    shape = ["blocks", config.tokens_per_block, config.llm.hidden_size]
    graph.output(graph.node("Identity", tokens, output="tokens"), np.float32, shape)
    advance("projector")
    return graph


def _project(emitter: ModuleEmitter, x: str, config: VilaConfig) -> str:
    """The steps of the projector's row in PROJECTOR_TYPES."""
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
    """window × window neighbours side by side, an odd grid zero-padded."""
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
