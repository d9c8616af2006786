"""Define a dialect: how one runtime's graph spells the building blocks of the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vila_deploy.formats.base import QuantizedLinear
from vila_deploy.onnx_export.graph_writer import GraphWriter, StoredTensor, WeightFile


@dataclass(frozen=True)
class StoredLinear:
    """A linear layer in a WeightFile, in the form that one dialect reads.

    `group_size` is None for a weight that is not quantized. `bytes_per_step` counts the bytes that
    a decoding step reads, in the type that the weight has in the engine's memory. `parts`, if any,
    are linears whose outputs, side by side, are this one's; `tensors` then has what applies to
    their common input.
    """

    name: str
    out_features: int
    in_features: int
    group_size: int | None
    tensors: dict[str, StoredTensor]
    bytes_per_step: int
    parts: tuple[StoredLinear, ...] = ()


# Scales of a layer's keys and values in an int8 cache, float32 [1, kv_heads, 1, head_dim] each.
CacheScales = tuple[StoredTensor, StoredTensor]


@dataclass(frozen=True)
class AttentionShape:
    """Heads and cache size of every attention, and the values `cos` and `sin` of the graph.

    Args:
        cache_scales: values of the scales of each layer's keys and values, for an int8 cache.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_seq_len: int
    cos: str
    sin: str
    cache_scales: tuple[tuple[str, str], ...] = ()


class Dialect(Protocol):
    """Emit the building blocks of a decoder.

    Hidden states between layers are float32, [batch * tokens, channels] or
    [batch, tokens, channels].
    Results of `norm` and inputs and results of `linear` have the dialect's type of activations.
    """

    @property
    def opset(self) -> int:
        """Return the version of ONNX's operators."""
        ...

    @property
    def batch(self) -> str:
        """Return the name of the dimension that counts the sequences of a pass."""
        ...

    def rows(self, graph: GraphWriter, embeds: str, hidden: int) -> str:
        """Return inputs_embeds [batch, tokens, hidden] as hidden states."""
        ...

    def last(self, graph: GraphWriter, x: str) -> str:
        """Return the hidden states of the last token [batch, hidden]."""
        ...

    def narrowed(self, graph: GraphWriter, x: str) -> str:
        """Return float32 values in the type that `linear` takes."""
        ...

    def store_linear(
        self,
        file: WeightFile,
        name: str,
        linears: Sequence[Tensor | QuantizedLinear],
        bias: Tensor | None = None,
    ) -> StoredLinear:
        """Write `linears`, which read the same input, as one: their outputs are concatenated.

        Args:
            bias: [all outputs], for float weights; a QuantizedLinear has its bias in it.
        """
        ...

    def store_head(self, file: WeightFile, weight: Tensor, dtype: str) -> StoredLinear:
        """Write the output head [vocabulary, hidden] in fp16, int8 or int4."""
        ...

    def linear(self, graph: GraphWriter, x: str, linear: StoredLinear) -> str:
        """Return x · Wᵀ + bias."""
        ...

    def gated(self, graph: GraphWriter, both: str) -> str:
        """Return silu(gate) · up, for gate and up concatenated in the channels."""
        ...

    def head(self, graph: GraphWriter, x: str, linear: StoredLinear) -> str:
        """Return float32 logits [rows, vocab] of [rows, hidden]."""
        ...

    def norm(self, graph: GraphWriter, x: str, weight: str, epsilon: float) -> str:
        """Return the root-mean-square normalization over the channels."""
        ...

    def add_norm(
        self, graph: GraphWriter, x: str, delta: str, weight: str, epsilon: float
    ) -> tuple[str, str]:
        """Return (norm(x + delta), x + delta)."""
        ...

    def attention(self, graph: GraphWriter, qkv: str, shape: AttentionShape, layer: int) -> str:
        """Rotate, update the cache and return causal attention, for q | k | v concatenated."""
        ...

    def cache(
        self, graph: GraphWriter, shape: AttentionShape, num_layers: int, tokens: int | str
    ) -> None:
        """Declare the graph's inputs and outputs for positions and the key/value cache."""
        ...

    def finish(self, graph: GraphWriter, num_layers: int) -> None:
        """Add the nodes that follow all layers."""
        ...


def gated(graph: GraphWriter, both: str) -> str:
    """Return silu(gate) · up, for gate and up concatenated in the channels."""
    names = [graph.new_name("gate"), graph.new_name("up")]
    gate, up = graph.nodes("Split", both, outputs=names, axis=-1, num_outputs=2)
    silu = graph.node("Mul", gate, graph.node("Sigmoid", gate))
    return graph.node("Mul", silu, up)


def cache_names(layer: int) -> tuple[str, str]:
    """Return the names of a layer's keys and values, without the prefix past_ or present_."""
    return f"key_{layer}", f"value_{layer}"


def merged_bias(linears: Sequence[QuantizedLinear]) -> Tensor | None:
    """Return the float16 biases of `linears`, concatenated, with zeros for those that have none."""
    if all(linear.bias is None for linear in linears):
        return None
    return torch.cat(
        [
            torch.zeros(linear.out_features).half() if linear.bias is None else linear.bias
            for linear in linears
        ]
    )


def pack_nibbles(values: Tensor) -> NDArray[np.uint8]:
    """Pack 0..15 [rows, columns] into uint8 [rows, ceil(columns / 2)], low halves first."""
    if values.shape[1] % 2:
        values = torch.nn.functional.pad(values, (0, 1))
    return (values[:, 0::2] | (values[:, 1::2] << 4)).numpy()


def pack_transposed_nibbles(values: Tensor) -> NDArray[np.uint8]:
    """Return `pack_nibbles` of the transpose of `values`; transposing packed bytes costs half."""
    if len(values) % 2:
        values = torch.nn.functional.pad(values, (0, 0, 0, 1))
    return (values[0::2] | (values[1::2] << 4)).T.contiguous().numpy()
