"""The vision encoder: SigLIP up to the selected layer, then the projector; standard operators."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.graph.tensors import float16, float32
from vila_deploy.graph.writer import GraphWriter, WeightFile
from vila_deploy.model.projector import NORM_EPSILON
from vila_deploy.model.weights import WeightSource
from vila_deploy.progress import Advance

GELU = {"gelu_pytorch_tanh": "tanh", "gelu": "none"}


class _Part:
    """Emits the layers of one part of the checkpoint; matrices are stored in float16."""

    def __init__(self, graph: GraphWriter, weights: WeightSource, file: WeightFile):
        self.graph, self.weights, self.file = graph, weights, file

    def vector(self, name: str) -> str:
        return self.graph.weight(name, self.file.append(float32(self.weights.tensor(name))))

    def widened(self, name: str, transpose: bool = False) -> str:
        """A matrix kept in float16 and widened once, when the session is made."""
        array = float16(self.weights.tensor(name), name)
        stored = self.file.append(array.T if transpose else array)
        return self.graph.node("Cast", self.graph.weight(name, stored), to=TensorProto.FLOAT)

    def linear(self, x: str, prefix: str) -> str:
        product = self.graph.node("MatMul", x, self.widened(f"{prefix}.weight", transpose=True))
        return self.graph.node("Add", product, self.vector(f"{prefix}.bias"))

    def norm(self, x: str, prefix: str, epsilon: float) -> str:
        scale, bias = self.vector(f"{prefix}.weight"), self.vector(f"{prefix}.bias")
        return self.graph.node("LayerNormalization", x, scale, bias, axis=-1, epsilon=epsilon)


def build_vision_graph(
    config: VilaConfig,
    tower: WeightSource,
    projector: WeightSource,
    file: WeightFile,
    advance: Advance,
) -> GraphWriter:
    """pixels [images, 3, size, size] → features [images, tokens, hidden], both float32."""
    graph, vision = GraphWriter(), config.vision
    size = vision.image_size
    pixels = graph.input("pixels", np.float32, ["images", 3, size, size])
    shape: list[int | str] = ["images", config.tokens_per_image, config.llm.hidden_size]
    graph.output("features", np.float32, shape)
    part = _Part(graph, tower, file)
    x = _embeddings(part, pixels, config)
    for index in range(config.vision_layers_used):
        graph.scope(f"layer_{index}")
        x = _layer(part, x, config, f"vision_model.encoder.layers.{index}")
        advance(f"vision layer {index}")
    graph.scope("projector")
    _project(_Part(graph, projector, file), x, config)
    advance("projector")
    return graph


def _embeddings(part: _Part, pixels: str, config: VilaConfig) -> str:
    """Patches as [images, patches, channels], with their learned positions added."""
    graph, vision = part.graph, config.vision
    prefix = "vision_model.embeddings"
    patches = graph.node(
        "Conv", pixels, part.widened(f"{prefix}.patch_embedding.weight"),
        part.vector(f"{prefix}.patch_embedding.bias"), strides=[vision.patch_size] * 2,
    )  # fmt: skip
    flat = graph.node("Reshape", patches, graph.integers(0, vision.hidden_size, -1))
    rows = graph.node("Transpose", flat, perm=[0, 2, 1])
    return graph.node("Add", rows, part.widened(f"{prefix}.position_embedding.weight"))


def _layer(part: _Part, x: str, config: VilaConfig, prefix: str) -> str:
    """x + attention(norm(x)), then + mlp(norm(·))."""
    graph, vision = part.graph, config.vision
    normed = part.norm(x, f"{prefix}.layer_norm1", vision.layer_norm_eps)
    x = graph.node("Add", x, _attention(part, normed, config, f"{prefix}.self_attn"))
    normed = part.norm(x, f"{prefix}.layer_norm2", vision.layer_norm_eps)
    inner = part.linear(normed, f"{prefix}.mlp.fc1")
    active = graph.node("Gelu", inner, approximate=GELU[vision.hidden_act])
    return graph.node("Add", x, part.linear(active, f"{prefix}.mlp.fc2"))


def _attention(part: _Part, x: str, config: VilaConfig, prefix: str) -> str:
    graph, heads = part.graph, config.vision.num_heads
    head_dim = config.vision.hidden_size // heads
    split = graph.integers(0, 0, heads, head_dim)

    def by_head(name: str, order: list[int]) -> str:
        rows = graph.node("Reshape", part.linear(x, f"{prefix}.{name}_proj"), split)
        return graph.node("Transpose", rows, perm=order)

    query, key = by_head("q", [0, 2, 1, 3]), by_head("k", [0, 2, 3, 1])
    scale = graph.constant(np.array(head_dim**-0.5, np.float32))
    scores = graph.node("Mul", graph.node("MatMul", query, key), scale)
    shares = graph.node("Softmax", scores, axis=-1)
    mixed = graph.node("MatMul", shares, by_head("v", [0, 2, 1, 3]))
    rows = graph.node("Transpose", mixed, perm=[0, 2, 1, 3])
    joined = graph.node("Reshape", rows, graph.integers(0, 0, heads * head_dim))
    return part.linear(joined, f"{prefix}.out_proj")


def _project(part: _Part, x: str, config: VilaConfig) -> str:
    """The steps of the projector's row in PROJECTOR_TYPES."""
    kind = config.projector
    for index, step in enumerate(kind.steps):
        prefix = kind.prefix(index)
        if step == "downsample":
            x = _downsample(part.graph, x, config)
        elif step == "gelu":
            x = part.graph.node("Gelu", x, approximate="none")
        elif step == "norm":
            x = part.norm(x, prefix, NORM_EPSILON)
        else:
            x = part.linear(x, prefix)
    return part.graph.node("Identity", x, output="features")


def _downsample(graph: GraphWriter, x: str, config: VilaConfig) -> str:
    """window × window neighbours side by side, an odd grid zero-padded."""
    window, grid, channels = config.projector.window, config.vision.grid, config.vision.hidden_size
    pad = -grid % window
    x = graph.node("Reshape", x, graph.integers(0, grid, grid, channels))
    if pad:
        x = graph.node("Pad", x, graph.integers(0, 0, 0, 0, 0, pad, pad, 0))
    out = (grid + pad) // window
    x = graph.node("Reshape", x, graph.integers(-1, out, window, out, window, channels))
    outer = [1, 3] if config.token_order == "row" else [3, 1]
    x = graph.node("Transpose", x, perm=[0, *outer, 2, 4, 5])
    return graph.node("Reshape", x, graph.integers(0, out * out, channels * window**2))
