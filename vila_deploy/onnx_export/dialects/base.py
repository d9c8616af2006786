"""What differs between engines in the one LLM graph: how its building blocks are spelled."""

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

    `group_size` is None for a weight that is not quantized; `bytes_per_step` is what one decoding
    step reads of it, in the width in which the engine keeps it in memory.
    """

    name: str
    out_features: int
    in_features: int
    group_size: int | None
    tensors: dict[str, StoredTensor]
    bytes_per_step: int


@dataclass(frozen=True)
class AttentionShape:
    """Heads of a layer, positions of a cache, and the values that every layer's attention takes."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_seq_len: int
    cos: str
    sin: str


class Dialect(Protocol):
    """Emits the building blocks of a decoder.

    What runs from layer to layer is float32, as [tokens, channels] or [batch, tokens, channels];
    what `norm` gives and `linear` takes and gives is in the dialect's own type.
    """

    @property
    def opset(self) -> int: ...

    @property
    def batch(self) -> int | str:
        """How many sequences a graph takes at a time; a name for any number."""
        ...

    def rows(self, graph: GraphWriter, embeds: str, hidden: int) -> str:
        """inputs_embeds [batch, tokens, hidden] → hidden states."""
        ...

    def last(self, graph: GraphWriter, x: str) -> str:
        """Hidden states → those of the last token [batch, hidden]."""
        ...

    def narrowed(self, graph: GraphWriter, x: str) -> str:
        """float32 values in the type that `linear` takes."""
        ...

    def store_linear(
        self,
        file: WeightFile,
        name: str,
        parts: Sequence[Tensor | QuantizedLinear],
        bias: Tensor | None = None,
    ) -> StoredLinear:
        """Writes one linear layer whose outputs are those of `parts`, one after the other.

        Args:
            bias: of all outputs [out], for float parts; 4-bit ones hold their own.
        """
        ...

    def store_head(self, file: WeightFile, weight: Tensor, dtype: str) -> StoredLinear:
        """Writes the output head [vocabulary, hidden] in fp16, int8 or int4."""
        ...

    def linear(self, graph: GraphWriter, x: str, linear: StoredLinear) -> str: ...

    def gated(self, graph: GraphWriter, both: str) -> str:
        """silu(gate) · up, of gate and up side by side."""
        ...

    def head(self, graph: GraphWriter, x: str, linear: StoredLinear) -> str:
        """[rows, hidden] → float32 logits [rows, vocab]; one row in dialect `onnxruntime`."""
        ...

    def norm(self, graph: GraphWriter, x: str, weight: str, epsilon: float) -> str:
        """Root-mean-square normalization over the channels."""
        ...

    def add_norm(
        self, graph: GraphWriter, x: str, delta: str, weight: str, epsilon: float
    ) -> tuple[str, str]:
        """(norm(x + delta), x + delta)."""
        ...

    def attention(self, graph: GraphWriter, qkv: str, shape: AttentionShape, layer: int) -> str:
        """Rotary embedding, cache update and causal attention over q | k | v side by side."""
        ...

    def cache(
        self, graph: GraphWriter, shape: AttentionShape, num_layers: int, tokens: int | str
    ) -> None:
        """Declares the graph's inputs and outputs for positions and the key/value cache."""
        ...

    def finish(self, graph: GraphWriter, num_layers: int) -> None:
        """Adds what comes after all layers."""
        ...


def gated(graph: GraphWriter, both: str) -> str:
    """silu(gate) · up, of gate and up side by side."""
    names = [graph.new_name("gate"), graph.new_name("up")]
    gate, up = graph.nodes("Split", both, outputs=names, axis=-1, num_outputs=2)
    silu = graph.node("Mul", gate, graph.node("Sigmoid", gate))
    return graph.node("Mul", silu, up)


def pack_nibbles(levels: Tensor) -> NDArray[np.uint8]:
    """uint8 [rows, columns] of 0..15 → [rows, ceil(columns/2)], even columns in the low halves."""
    if levels.shape[1] % 2:
        levels = torch.nn.functional.pad(levels, (0, 1))
    return (levels[:, 0::2] | (levels[:, 1::2] << 4)).numpy()


def pack_turned(levels: Tensor) -> NDArray[np.uint8]:
    """`pack_nibbles` of the transpose of `levels` [rows, columns], with half as much to turn."""
    if len(levels) % 2:
        levels = torch.nn.functional.pad(levels, (0, 0, 0, 1))
    return (levels[0::2] | (levels[1::2] << 4)).T.contiguous().numpy()
