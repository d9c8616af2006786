"""Write the decoder of the language model; a dialect emits its building blocks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from onnx import TensorProto

from vila_deploy.checkpoint.llm_config import FINAL_NORM, HEAD, LlmConfig, layer_prefix
from vila_deploy.checkpoint.weight_source import WeightSource
from vila_deploy.formats.module_dtypes import FP16
from vila_deploy.onnx_export.arrays import float32
from vila_deploy.onnx_export.dialects.base import (
    AttentionShape,
    CacheScales,
    Dialect,
    StoredLinear,
    cache_names,
)
from vila_deploy.onnx_export.graph_writer import GraphWriter, StoredTensor, WeightFile
from vila_deploy.onnx_export.rotary import rotary_tables
from vila_deploy.utils.progress import Advance


@dataclass(frozen=True)
class StoredLayer:
    """A decoder layer in a WeightFile; linears that read the same input are merged."""

    input_norm: StoredTensor
    qkv: StoredLinear
    o: StoredLinear
    post_attention_norm: StoredTensor
    gate_up: StoredLinear
    down: StoredLinear

    def linears(self) -> tuple[StoredLinear, ...]:
        return self.qkv, self.o, self.gate_up, self.down


@dataclass(frozen=True)
class StoredLlm:
    """All decoder layers in a WeightFile; `cos` and `sin` are [max_seq_len, head_dim / 2].

    Args:
        cache_scales: of each layer, for an int8 cache in dialect `onnxruntime`.
    """

    layers: tuple[StoredLayer, ...]
    norm: StoredTensor
    head: StoredLinear
    cos: StoredTensor
    sin: StoredTensor
    cache_scales: tuple[CacheScales, ...] = ()

    @property
    def bytes_per_step(self) -> int:
        """Return the bytes of weights that a decoding step reads."""
        linears = [linear for layer in self.layers for linear in layer.linears()]
        norms = [n for x in self.layers for n in (x.input_norm, x.post_attention_norm)]
        return sum(linear.bytes_per_step for linear in [*linears, self.head]) + sum(
            norm.size_bytes for norm in [*norms, self.norm]
        )


def store_llm(
    config: LlmConfig,
    weights: WeightSource,
    max_seq_len: int,
    file: WeightFile,
    dialect: Dialect,
    advance: Advance,
    head_dtype: str = FP16,
) -> StoredLlm:
    """Write all weights but the embedding table, one decoder layer in memory at a time."""
    layers = []
    for index in range(config.num_layers):
        layers.append(_store_layer(config, weights, layer_prefix(index), file, dialect))
        advance(f"decoder layer {index}")
    norm = file.append(float32(weights.tensor(FINAL_NORM)))
    head = dialect.store_head(file, weights.tensor(HEAD), head_dtype)
    advance("lm_head")
    cos, sin = (file.append(float32(table)) for table in rotary_tables(config, max_seq_len))
    return StoredLlm(tuple(layers), norm, head, cos, sin)


def _store_layer(
    config: LlmConfig, weights: WeightSource, prefix: str, file: WeightFile, dialect: Dialect
) -> StoredLayer:
    def norm(name: str) -> StoredTensor:
        return file.append(float32(weights.tensor(f"{prefix}.{name}.weight")))

    def linear(block: str, *names: str) -> StoredLinear:
        merged = [weights.linear(f"{prefix}.{block}.{name}") for name in names]
        bias = None
        if config.quantization is None and config.has_bias(f"{block}.{names[0]}"):
            bias = torch.cat([weights.tensor(f"{prefix}.{block}.{name}.bias") for name in names])
        return dialect.store_linear(file, f"{prefix}.{block}.{'+'.join(names)}", merged, bias)

    return StoredLayer(
        input_norm=norm("input_layernorm"),
        qkv=linear("self_attn", "q_proj", "k_proj", "v_proj"),
        o=linear("self_attn", "o_proj"),
        post_attention_norm=norm("post_attention_layernorm"),
        gate_up=linear("mlp", "gate_proj", "up_proj"),
        down=linear("mlp", "down_proj"),
    )


def build_llm_graph(
    config: LlmConfig,
    stored: StoredLlm,
    dialect: Dialect,
    *,
    tokens: int | None,
    logits: bool,
    states: bool = False,
    last_early: bool = False,
) -> GraphWriter:
    """Return the graph over weights that `store_llm` wrote.

    Inputs: inputs_embeds [batch, tokens, hidden] and the inputs of the dialect's cache. Outputs:
    logits [batch, vocab] of the last token, and the cache with these tokens added.

    Args:
        tokens: number of tokens in a pass; None for any number.
        logits: False makes a graph that only fills the cache.
        states: output the input of the head, [tokens, hidden], not logits; for a batch of one.
        last_early: behind the last layer's attention go on with the last token alone, for logits.
    """
    graph, epsilon = GraphWriter(dialect.opset), config.rms_norm_eps
    count, hidden = tokens or "tokens", config.hidden_size
    embeds, shape = _declare(graph, config, stored, dialect, count)
    if states:
        graph.output("states", np.float32, [count, hidden])
    elif logits:
        graph.output("logits", np.float32, [dialect.batch, config.vocab_size])
    dialect.cache(graph, shape, config.num_layers, count)
    x = dialect.rows(graph, embeds, hidden)
    delta = None
    for index, layer in enumerate(stored.layers):
        graph.scope(f"layer_{index}")
        norm = graph.weight(f"layer_{index}.input_norm", layer.input_norm)
        if delta is None:
            normed = dialect.norm(graph, x, norm, epsilon)
        else:
            normed, x = dialect.add_norm(graph, x, delta, norm, epsilon)
        attended = dialect.attention(graph, dialect.linear(graph, normed, layer.qkv), shape, index)
        if not (logits or states) and index == config.num_layers - 1:
            dialect.finish(graph, config.num_layers)
            return graph
        if last_early and index == config.num_layers - 1:
            attended, x = dialect.last(graph, attended), dialect.last(graph, x)
        delta = dialect.linear(graph, attended, layer.o)
        norm = graph.weight(f"layer_{index}.post_attention_norm", layer.post_attention_norm)
        normed, x = dialect.add_norm(graph, x, delta, norm, epsilon)
        both = dialect.linear(graph, normed, layer.gate_up)
        delta = dialect.linear(graph, dialect.gated(graph, both), layer.down)
    graph.scope("head")
    assert delta is not None
    normed, _ = dialect.add_norm(graph, x, delta, graph.weight("norm", stored.norm), epsilon)
    if states:
        wide = graph.node("Cast", normed, to=TensorProto.FLOAT)
        graph.node("Reshape", wide, graph.integers(-1, hidden), output="states")
    else:
        dialect.head(graph, normed if last_early else dialect.last(graph, normed), stored.head)
    dialect.finish(graph, config.num_layers)
    return graph


def _declare(
    graph: GraphWriter,
    config: LlmConfig,
    stored: StoredLlm,
    dialect: Dialect,
    tokens: int | str,
) -> tuple[str, AttentionShape]:
    """Declare the embeddings' input and return it, with the shape of every attention."""
    embeds = graph.input("inputs_embeds", np.float32, [dialect.batch, tokens, config.hidden_size])
    scales = stored.cache_scales
    return embeds, AttentionShape(
        config.num_heads, config.num_kv_heads, config.head_dim, stored.cos.shape[0],
        graph.weight("rotary.cos", stored.cos), graph.weight("rotary.sin", stored.sin),
        tuple(
            (graph.weight(f"{key}.scale", keys), graph.weight(f"{value}.scale", values))
            for (key, value), (keys, values) in zip(
                map(cache_names, range(len(scales))), scales, strict=True
            )
        ),
    )  # fmt: skip


def build_head_graph(config: LlmConfig, head: StoredLinear, dialect: Dialect) -> GraphWriter:
    """Return the graph of the output head alone.

    states [rows, hidden] → logits [rows, vocab], float32.
    """
    graph = GraphWriter(dialect.opset)
    states = graph.input("states", np.float32, ["rows", config.hidden_size])
    graph.output("logits", np.float32, ["rows", config.vocab_size])
    dialect.head(graph, dialect.narrowed(graph, states), head)
    return graph
