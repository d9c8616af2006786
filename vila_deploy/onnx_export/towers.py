"""Emit vision towers up to the selected layer, in operators of ONNX itself."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto

from vila_deploy.checkpoint.vision_config import VisionConfig
from vila_deploy.checkpoint.weight_source import WeightSource
from vila_deploy.formats.int8_linear import round_int8
from vila_deploy.formats.module_dtypes import is_tower_linear
from vila_deploy.onnx_export.arrays import float16, float32
from vila_deploy.onnx_export.graph_writer import GraphWriter, WeightFile
from vila_deploy.onnx_export.matrix_pieces import column_ranges
from vila_deploy.utils.progress import Advance

GELU = {"gelu_pytorch_tanh": "tanh", "gelu": "none"}
QUICK_GELU_SLOPE = 1.702


class ModuleEmitter:
    """Emit the layers of one module of a checkpoint; matrices are stored in float16.

    Args:
        half: multiply in float16, as GPUs do; hidden states between layers stay float32.
        int8: store the matrices of a tower's layers in int8, which are multiplied as float16.
        max_matrix_bytes: larger float16 matrices are cut into pieces of columns.
    """

    def __init__(
        self,
        graph: GraphWriter,
        weights: WeightSource,
        file: WeightFile,
        half: bool = False,
        int8: bool = False,
        max_matrix_bytes: int | None = None,
    ):
        self.graph, self.weights, self.file, self.half = graph, weights, file, half
        self.max_matrix_bytes = max_matrix_bytes
        assert half or not int8
        self.int8 = int8

    def vector(self, name: str) -> str:
        return self.graph.weight(name, self.file.append(float32(self.weights.tensor(name))))

    def stored(self, name: str, transpose: bool = False) -> str:
        array = float16(self.weights.tensor(name), name)
        return self.graph.weight(name, self.file.append(array.T if transpose else array))

    def widened(self, name: str, transpose: bool = False) -> str:
        """Return a matrix stored in float16 and cast to float32 once, when the session is made."""
        return self.graph.node("Cast", self.stored(name, transpose), to=TensorProto.FLOAT)

    def narrowed(self, x: str) -> str:
        """Return `x` in the type of products: float16 if `half`, else as it is."""
        return self.graph.node("Cast", x, to=TensorProto.FLOAT16) if self.half else x

    def product(self, op: str, *factors: str, **attributes: Any) -> str:
        """Return `op` of factors in the type of products, cast to float32."""
        y = self.graph.node(op, *factors, **attributes)
        return self.graph.node("Cast", y, to=TensorProto.FLOAT) if self.half else y

    def factor(self, name: str, transpose: bool = False) -> str:
        """Return a matrix of weights in the type of products."""
        return self.stored(name, transpose) if self.half else self.widened(name, transpose)

    def matrix(self, name: str) -> str:
        """Return a linear's weight [in, out] in the type of products, int8 dequantized."""
        weight = self.weights.tensor(name)
        if not (self.int8 and is_tower_linear(name, tuple(weight.shape))):
            return self.factor(name, transpose=True)
        rounded = round_int8(weight, name)
        q = self.graph.weight(name, self.file.append(rounded.q.T.numpy()))
        scale = self.graph.weight(f"{name}.scale", self.file.append(rounded.scale.numpy()))
        return self.graph.node("DequantizeLinear", q, scale, axis=1)

    def matrices(self, name: str) -> list[str]:
        """Return the pieces of a linear's weight [in, out], mostly one."""
        weight = self.weights.tensor(name)
        ranges = column_ranges(len(weight), 2 * weight.shape[1], self.max_matrix_bytes)
        if len(ranges) == 1:
            return [self.matrix(name)]
        columns = float16(weight, name).T
        return [
            self.graph.weight(f"{name}.{first}", self.file.append(columns[:, first:end]))
            for first, end in ranges
        ]

    def linear(self, x: str, prefix: str, bias: bool = True) -> str:
        factor = self.narrowed(x)
        pieces = [self.product("MatMul", factor, m) for m in self.matrices(f"{prefix}.weight")]
        y = pieces[0] if len(pieces) == 1 else self.graph.node("Concat", *pieces, axis=-1)
        return self.graph.node("Add", y, self.vector(f"{prefix}.bias")) if bias else y

    def norm(self, x: str, prefix: str, epsilon: float) -> str:
        scale, bias = self.vector(f"{prefix}.weight"), self.vector(f"{prefix}.bias")
        return self.graph.node("LayerNormalization", x, scale, bias, axis=-1, epsilon=epsilon)

    def rms_norm(self, x: str, prefix: str, epsilon: float) -> str:
        """Return x / sqrt(mean(x²) + ε) · weight; this opset has no operator for it."""
        graph = self.graph
        square = graph.node("Mul", x, x)
        mean = graph.node("ReduceMean", square, graph.integers(-1), keepdims=1)
        raised = graph.node("Add", mean, graph.constant(np.array(epsilon, np.float32)))
        root = graph.node("Sqrt", raised)
        return graph.node("Mul", graph.node("Div", x, root), self.vector(f"{prefix}.weight"))

    def attention(self, query: str, key: str, value: str, config: VisionConfig) -> str:
        """Return full attention over [tiles, tokens, channels], head by head."""
        graph = self.graph
        heads, head_dim = config.num_heads, config.hidden_size // config.num_heads
        split = graph.integers(0, 0, heads, head_dim)

        def by_head(rows: str, order: list[int]) -> str:
            halves = graph.node("Reshape", self.narrowed(rows), split)
            return graph.node("Transpose", halves, perm=order)

        # Scaled first, so that float16 products stay in range.
        scaled = graph.node("Mul", query, graph.constant(np.array(head_dim**-0.5, np.float32)))
        scores = self.product("MatMul", by_head(scaled, [0, 2, 1, 3]), by_head(key, [0, 2, 3, 1]))
        weights = self.narrowed(graph.node("Softmax", scores, axis=-1))
        mixed = self.product("MatMul", weights, by_head(value, [0, 2, 1, 3]))
        rows = graph.node("Transpose", mixed, perm=[0, 2, 1, 3])
        return graph.node("Reshape", rows, graph.integers(0, 0, heads * head_dim))


def tower(
    emitter: ModuleEmitter, pixels: str, config: VisionConfig, layers: int, advance: Advance
) -> str:
    """Emit a tower and return its features [tiles, patches, channels], class token dropped.

    Args:
        pixels: [tiles, 3, size, size].
    """
    graph, prefix = emitter.graph, config.family.prefix
    x = _embeddings(emitter, pixels, config)
    if config.family.name == "clip":
        x = emitter.norm(x, f"{prefix}pre_layrnorm", config.layer_norm_eps)
    layer = _internvit_layer if config.family.name == "internvit" else _layer
    for index in range(layers):
        graph.scope(f"layer_{index}")
        x = layer(emitter, x, config, f"{prefix}encoder.layers.{index}")
        advance(f"vision layer {index}")
    if not config.family.has_class_token:
        return x
    end = np.iinfo(np.int64).max
    return graph.node("Slice", x, graph.integers(1), graph.integers(end), graph.integers(1))


def _embeddings(emitter: ModuleEmitter, pixels: str, config: VisionConfig) -> str:
    """Return patches, after a class token if there is one, plus their position embeddings."""
    graph, width = emitter.graph, config.hidden_size
    prefix = f"{config.family.prefix}embeddings"
    inputs = [emitter.narrowed(pixels), emitter.factor(f"{prefix}.patch_embedding.weight")]
    if config.family.name != "clip":
        # onnx-tensorrt 10.1 mistakes the kernel's size where a convolution's bias is computed.
        bias = f"{prefix}.patch_embedding.bias"
        inputs.append(emitter.stored(bias) if emitter.half else emitter.vector(bias))
    patches = emitter.product("Conv", *inputs, strides=[config.patch_size] * 2)
    flat = graph.node("Reshape", patches, graph.integers(0, width, -1))
    rows = graph.node("Transpose", flat, perm=[0, 2, 1])
    if config.family.has_class_token:
        tiles = graph.node("Shape", pixels, start=0, end=1)
        shape = graph.node("Concat", tiles, graph.integers(1, width), axis=0)
        first = graph.node("Expand", emitter.vector(f"{prefix}.class_embedding"), shape)
        rows = graph.node("Concat", first, rows, axis=1)
    suffix = "" if config.family.name == "internvit" else ".weight"
    return graph.node("Add", rows, emitter.widened(f"{prefix}.position_embedding{suffix}"))


def _layer(emitter: ModuleEmitter, x: str, config: VisionConfig, prefix: str) -> str:
    """Emit a layer of SigLIP or CLIP: x + attention(norm(x)), then + mlp(norm(·))."""
    graph = emitter.graph
    normed = emitter.norm(x, f"{prefix}.layer_norm1", config.layer_norm_eps)
    query, key, value = (emitter.linear(normed, f"{prefix}.self_attn.{n}_proj") for n in "qkv")
    attended = emitter.attention(query, key, value, config)
    mixed = emitter.linear(attended, f"{prefix}.self_attn.out_proj")
    x = graph.node("Add", x, mixed)
    normed = emitter.norm(x, f"{prefix}.layer_norm2", config.layer_norm_eps)
    return graph.node("Add", x, _mlp(emitter, normed, config, f"{prefix}.mlp"))


def _internvit_layer(emitter: ModuleEmitter, x: str, config: VisionConfig, prefix: str) -> str:
    """Emit a layer of InternViT: RMS norms, normed queries and keys, a scale on each branch."""
    graph, epsilon = emitter.graph, config.layer_norm_eps
    normed = emitter.rms_norm(x, f"{prefix}.norm1", epsilon)
    qkv = emitter.linear(normed, f"{prefix}.attn.qkv", bias=config.qkv_bias)
    names = [graph.new_name(name) for name in ("query", "key", "value")]
    query, key, value = graph.nodes("Split", qkv, outputs=names, axis=-1, num_outputs=3)
    if config.qk_norm:
        query = emitter.rms_norm(query, f"{prefix}.attn.q_norm", epsilon)
        key = emitter.rms_norm(key, f"{prefix}.attn.k_norm", epsilon)
    mixed = emitter.linear(emitter.attention(query, key, value, config), f"{prefix}.attn.proj")
    x = graph.node("Add", x, graph.node("Mul", mixed, emitter.vector(f"{prefix}.ls1")))
    normed = emitter.rms_norm(x, f"{prefix}.norm2", epsilon)
    inner = _mlp(emitter, normed, config, f"{prefix}.mlp")
    return graph.node("Add", x, graph.node("Mul", inner, emitter.vector(f"{prefix}.ls2")))


def _mlp(emitter: ModuleEmitter, x: str, config: VisionConfig, prefix: str) -> str:
    graph, inner = emitter.graph, emitter.linear(x, f"{prefix}.fc1")
    if config.hidden_act == "quick_gelu":
        slope = graph.constant(np.array(QUICK_GELU_SLOPE, np.float32))
        gate = graph.node("Sigmoid", graph.node("Mul", inner, slope))
        active = graph.node("Mul", inner, gate)
    else:
        active = graph.node("Gelu", inner, approximate=GELU[config.hidden_act])
    return emitter.linear(active, f"{prefix}.fc2")
