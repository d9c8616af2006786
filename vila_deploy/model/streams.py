"""The calibration tokens on their way through the decoder: as it was, and as it is quantized."""

from __future__ import annotations

import itertools
import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vila_deploy.checkpoint.llm_config import LlmConfig
from vila_deploy.model.llm import rotary
from vila_deploy.utils.device import CPU
from vila_deploy.utils.limits import CHUNK_TOKENS, SPILL_BYTES


@dataclass(frozen=True)
class Chunk:
    """Some whole sequences: which tokens of all, and how many each has."""

    tokens: slice
    lengths: tuple[int, ...]


@dataclass
class Streams:
    """Hidden states [tokens, hidden] of all sequences end to end, float32.

    Args:
        exact: after the layers so far as the checkpoint has them.
        quantized: after the same layers quantized.
        chunks: in which they are computed.
        cos, sin: rotary tables [1, longest, head_dim].
        scratch: folder for what is too large for memory.
        device: of the arithmetic. The hidden states stay on the host.
    """

    exact: Tensor
    quantized: Tensor
    chunks: tuple[Chunk, ...]
    cos: Tensor
    sin: Tensor
    scratch: Path
    device: torch.device

    @classmethod
    def of(
        cls,
        config: LlmConfig,
        embeds: list[Tensor],
        scratch: Path,
        device: torch.device = CPU,
    ) -> Streams:
        """Streams from the embeddings [tokens, hidden] of each sequence, which are used up."""
        lengths = tuple(map(len, embeds))
        cos, sin = (each.to(device) for each in rotary(config, torch.arange(max(lengths))))
        exact = matrix(sum(lengths), config.hidden_size, scratch)
        torch.cat(embeds, out=exact)
        embeds.clear()
        quantized = matrix(len(exact), config.hidden_size, scratch).copy_(exact)
        return cls(exact, quantized, tuple(_chunks(lengths)), cos, sin, scratch, device)

    def matrix(self, columns: int) -> Tensor:
        """An empty [tokens, columns], in memory or in a file."""
        return matrix(len(self.exact), columns, self.scratch)

    def load(self, matrix: Tensor, chunk: Chunk) -> Tensor:
        """The rows of a chunk where the arithmetic runs; on the CPU they are a view."""
        return matrix[chunk.tokens].to(self.device)

    def heads(self, layer: nn.Module, hidden: Tensor, chunk: Chunk) -> Tensor:
        """What enters o_proj [tokens, heads · head_dim], for a chunk of hidden states."""
        attention = layer.get_submodule("self_attn")
        # Without a mask this is causal; the written-out kind would need one, and ten times as long.
        attention.config._attn_implementation = "sdpa"  # type: ignore[union-attr]
        normed = layer.get_submodule("input_layernorm")(hidden)
        parts, begin = [], 0
        with _without(attention, "o_proj"):
            for length, run in itertools.groupby(chunk.lengths):
                count = len(list(run))
                part = normed[begin : begin + count * length].unflatten(0, (count, length))
                begin += count * length
                output = attention(
                    hidden_states=part,
                    position_embeddings=(self.cos[:, :length], self.sin[:, :length]),
                    attention_mask=None,
                )[0]
                parts.append(output.flatten(0, 1))
        return torch.cat(parts)

    def pass_exact(self, layer: nn.Module) -> None:
        """Moves the exact stream on through a layer as the checkpoint has it."""
        self._pass(self.exact, layer)

    def pass_quantized(self, layer: nn.Module) -> None:
        """Moves the other on through the layer as it is stored, bit for bit as quantizing does."""
        self._pass(self.quantized, layer)

    @torch.inference_mode()
    def _pass(self, stream: Tensor, layer: nn.Module) -> None:
        for chunk in self.chunks:
            hidden = self.load(stream, chunk)
            hidden = after_attention(layer, hidden, self.heads(layer, hidden, chunk))
            stream[chunk.tokens] = after_mlp(layer, hidden, gated(layer, hidden))


def after_attention(layer: nn.Module, hidden: Tensor, heads: Tensor) -> Tensor:
    """The hidden states between attention and feed-forward block."""
    return hidden + layer.get_submodule("self_attn.o_proj")(heads)


def gated(layer: nn.Module, hidden: Tensor) -> Tensor:
    """What enters down_proj [tokens, intermediate]."""
    mlp = layer.get_submodule("mlp")
    normed = layer.get_submodule("post_attention_layernorm")(hidden)
    with _without(mlp, "down_proj"):
        return mlp(normed)


def after_mlp(layer: nn.Module, hidden: Tensor, inner: Tensor) -> Tensor:
    """The hidden states that leave the layer."""
    return hidden + layer.get_submodule("mlp.down_proj")(inner)


@contextmanager
def _without(module: nn.Module, name: str) -> Iterator[None]:
    """`module` gives what enters its last linear instead of what leaves it."""
    linear = getattr(module, name)
    setattr(module, name, nn.Identity())
    try:
        yield
    finally:
        setattr(module, name, linear)


def _chunks(lengths: tuple[int, ...]) -> Iterator[Chunk]:
    begin, kept = 0, []
    for index, length in enumerate(lengths):
        kept.append(length)
        if sum(kept) >= CHUNK_TOKENS or index == len(lengths) - 1:
            yield Chunk(slice(begin, begin + sum(kept)), tuple(kept))
            begin, kept = begin + sum(kept), []


def matrix(rows: int, columns: int, scratch: Path) -> Tensor:
    """An empty float32 [rows, columns], in memory or, if larger than SPILL_BYTES, in a file.

    Raises:
        OSError: the disk is full.
    """
    size = rows * columns * 4
    if size <= SPILL_BYTES:
        return torch.empty(rows, columns)
    # The file has no name: it goes when the tensor goes, however the program ends.
    with tempfile.TemporaryFile(dir=scratch) as file:
        # Reserved now, a full disk is an error here; later it would be a SIGBUS.
        os.posix_fallocate(file.fileno(), 0, size)
        mapped = mmap.mmap(file.fileno(), size)
    return torch.frombuffer(mapped, dtype=torch.float32).view(rows, columns)
