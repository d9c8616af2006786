"""What differs between engines in the one LLM graph: how its building blocks are spelled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from vila_deploy.formats.quantized_linear import QuantizedLinear
from vila_deploy.graph.writer import GraphWriter, StoredTensor, WeightFile


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
    """Heads of a layer and the values that every layer's attention takes."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    cos: str
    sin: str


class Dialect(Protocol):
    """Emits the building blocks of a decoder; hidden states are [tokens, channels] float32."""

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

    def linear(self, graph: GraphWriter, x: str, linear: StoredLinear) -> str: ...

    def head(self, graph: GraphWriter, x: str, linear: StoredLinear) -> str:
        """[1, hidden] → logits [1, vocab]; its weight is never quantized."""
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

    def cache(self, graph: GraphWriter, shape: AttentionShape, num_layers: int) -> None:
        """Declares the graph's inputs and outputs for the key/value cache."""
        ...
