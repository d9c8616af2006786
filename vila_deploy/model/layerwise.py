"""Run many packed sequences through the decoder with one layer in memory at a time."""

from __future__ import annotations

import itertools
import mmap
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vila_deploy.checkpoint.llm_config import LlmConfig
from vila_deploy.model.llm import rotary
from vila_deploy.utils.device import CPU
from vila_deploy.utils.limits import SPILL_BYTES

MLP_TOKENS_AT_A_TIME = 2048


@dataclass(frozen=True)
class Chunk:
    """Some whole sequences: where their tokens are among all, and how many each has."""

    tokens: slice
    lengths: tuple[int, ...]


@dataclass
class PackedHiddenStates:
    """Hidden states of many sequences end to end, without padding (varlen packing).

    Args:
        hidden: float32 [tokens, hidden].
        chunks: whole sequences that are computed together.
        cos, sin: rotary tables [1, longest, head_dim] on `device`.
        device: where layers are computed; `hidden` may be on the host.
        scratch: folder for matrices that are too large for memory; None: everything is in memory.
        batch_equal_lengths: whether neighbouring sequences of one length go through attention
            together; the results are the same within rounding.
    """

    hidden: Tensor
    chunks: tuple[Chunk, ...]
    cos: Tensor
    sin: Tensor
    device: torch.device = CPU
    scratch: Path | None = None
    batch_equal_lengths: bool = False

    @classmethod
    def on_device(
        cls,
        config: LlmConfig,
        embeds: list[Tensor],
        device: torch.device = CPU,
        max_chunk_tokens: int | None = None,
    ) -> PackedHiddenStates:
        """Pack the embeddings [tokens, hidden] of each sequence on `device`; empty the list.

        Args:
            max_chunk_tokens: of a chunk of several sequences; by default all are one chunk.
        """
        lengths = tuple(map(len, embeds))
        hidden = torch.cat(embeds).to(device)
        embeds.clear()
        chunks = _chunks_of_at_most(lengths, max_chunk_tokens or len(hidden))
        return cls(hidden, tuple(chunks), *_rotary_tables(config, lengths, device), device)

    @classmethod
    def on_host(
        cls,
        config: LlmConfig,
        embeds: list[Tensor],
        scratch: Path,
        device: torch.device,
        chunk_tokens: int,
    ) -> PackedHiddenStates:
        """Pack the embeddings [tokens, hidden] of each sequence on the host; empty the list.

        Args:
            chunk_tokens: a chunk ends with the sequence that brings it to so many tokens.
        """
        lengths = tuple(map(len, embeds))
        hidden = activation_matrix(sum(lengths), config.hidden_size, scratch)
        torch.cat(embeds, out=hidden)
        embeds.clear()
        chunks = tuple(_chunks_of_at_least(lengths, chunk_tokens))
        tables = _rotary_tables(config, lengths, device)
        return cls(hidden, chunks, *tables, device, scratch, batch_equal_lengths=True)

    def copy(self) -> PackedHiddenStates:
        """Return the same sequences with hidden states of their own."""
        return replace(self, hidden=self.matrix(self.hidden.shape[1]).copy_(self.hidden))

    def matrix(self, columns: int) -> Tensor:
        """Return an empty [tokens, columns] on the host, in memory or in a file."""
        return activation_matrix(len(self.hidden), columns, self.scratch)

    def load(self, chunk: Chunk, matrix: Tensor | None = None) -> Tensor:
        """Return a chunk's rows of `matrix`, by default `hidden`, on `device`; a view if there."""
        return (self.hidden if matrix is None else matrix)[chunk.tokens].to(self.device)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence."""
        return tuple(length for chunk in self.chunks for length in chunk.lengths)

    def attention(
        self,
        module: nn.Module,
        inputs: Tensor,
        lengths: tuple[int, ...],
        weights: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Return causal self-attention within each sequence, of normed inputs [tokens, hidden].

        Args:
            lengths: of the sequences in `inputs`.
            weights: parameters of `module` to use instead of its own, which are not changed.
        """
        # SDPA without a mask is causal; the eager form would need a mask, and ten times as long.
        module.config._attn_implementation = "sdpa"  # type: ignore[union-attr]
        outputs: Tensor | None = None
        begin = 0
        for length, count in self._batches(lengths):
            tokens = slice(begin, begin + count * length)
            arguments = {
                "hidden_states": inputs[tokens].unflatten(0, (count, length)),
                "position_embeddings": (self.cos[:, :length], self.sin[:, :length]),
                "attention_mask": None,
            }
            output = functional_call(module, dict(weights or {}), (), arguments)[0].flatten(0, 1)
            if outputs is None:
                outputs = output.new_empty(len(inputs), output.shape[1])
            outputs[tokens] = output
            begin = tokens.stop
        assert outputs is not None
        return outputs

    def _batches(self, lengths: tuple[int, ...]) -> Iterator[tuple[int, int]]:
        """Yield (length, how many sequences of that length are computed together)."""
        for length, run in itertools.groupby(lengths):
            count = len(list(run))
            yield from [(length, count)] if self.batch_equal_lengths else [(length, 1)] * count

    def o_proj_inputs(self, layer: nn.Module, hidden: Tensor, chunk: Chunk) -> Tensor:
        """Return the inputs of o_proj [tokens, heads · head_dim] for a chunk of hidden states."""
        attention = layer.get_submodule("self_attn")
        normed = layer.get_submodule("input_layernorm")(hidden)
        with _without(attention, "o_proj"):
            return self.attention(attention, normed, chunk.lengths)

    @torch.inference_mode()
    def advance(self, layer: nn.Module) -> None:
        """Replace the hidden states by the outputs of decoder layer `layer`."""
        module = layer.get_submodule
        for chunk in self.chunks:
            hidden = self.load(chunk)
            normed = module("input_layernorm")(hidden)
            hidden = hidden + self.attention(module("self_attn"), normed, chunk.lengths)
            normed = module("post_attention_layernorm")(hidden)
            self.hidden[chunk.tokens] = hidden + mlp(module("mlp"), normed)


def after_attention(layer: nn.Module, hidden: Tensor, o_proj_inputs: Tensor) -> Tensor:
    """Return the hidden states between attention and feed-forward block."""
    return hidden + layer.get_submodule("self_attn.o_proj")(o_proj_inputs)


def down_proj_inputs(layer: nn.Module, hidden: Tensor) -> Tensor:
    """Return the inputs of down_proj [tokens, intermediate] for hidden states behind attention."""
    module = layer.get_submodule("mlp")
    normed = layer.get_submodule("post_attention_layernorm")(hidden)
    with _without(module, "down_proj"):
        return module(normed)


def after_mlp(layer: nn.Module, hidden: Tensor, down_proj_inputs: Tensor) -> Tensor:
    """Return the hidden states behind the layer."""
    return hidden + layer.get_submodule("mlp.down_proj")(down_proj_inputs)


def mlp(module: nn.Module, inputs: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
    """Return the feed-forward block on [tokens, hidden], in parts that bound its activations.

    Args:
        weights: parameters of `module` to use instead of its own, which are not changed.
    """
    parts = inputs.split(MLP_TOKENS_AT_A_TIME)
    return torch.cat([functional_call(module, dict(weights or {}), (part,)) for part in parts])


def activation_matrix(rows: int, columns: int, scratch: Path | None) -> Tensor:
    """Return an empty float32 [rows, columns], in a file if it is larger than SPILL_BYTES.

    Args:
        scratch: folder of the file; None: it is in memory, whatever its size.

    Raises:
        OSError: the disk is full.
    """
    size = rows * columns * 4
    if size <= SPILL_BYTES or scratch is None:
        return torch.empty(rows, columns)
    # The file has no name: it goes when the tensor goes, however the program ends.
    with tempfile.TemporaryFile(dir=scratch) as file:
        # Reserved now, a full disk is an error here; later it would be a SIGBUS.
        os.posix_fallocate(file.fileno(), 0, size)
        mapped = mmap.mmap(file.fileno(), size)
    return torch.frombuffer(mapped, dtype=torch.float32).view(rows, columns)


@contextmanager
def _without(module: nn.Module, linear_name: str) -> Iterator[None]:
    """Make `module` return the inputs of its last linear while this is open."""
    linear = getattr(module, linear_name)
    setattr(module, linear_name, nn.Identity())
    try:
        yield
    finally:
        setattr(module, linear_name, linear)


def _rotary_tables(
    config: LlmConfig, lengths: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    cos, sin = rotary(config, torch.arange(max(lengths)))
    return cos.to(device), sin.to(device)


def _chunks_of_at_most(lengths: tuple[int, ...], max_tokens: int) -> Iterator[Chunk]:
    """Yield chunks of at most `max_tokens`; a longer sequence is a chunk alone."""
    begin, chunk_lengths = 0, list[int]()
    for length in lengths:
        if chunk_lengths and sum(chunk_lengths) + length > max_tokens:
            yield Chunk(slice(begin, begin + sum(chunk_lengths)), tuple(chunk_lengths))
            begin, chunk_lengths = begin + sum(chunk_lengths), []
        chunk_lengths.append(length)
    yield Chunk(slice(begin, begin + sum(chunk_lengths)), tuple(chunk_lengths))


def _chunks_of_at_least(lengths: tuple[int, ...], min_tokens: int) -> Iterator[Chunk]:
    """Yield chunks that end with the sequence that brings them to `min_tokens`."""
    begin, chunk_lengths = 0, list[int]()
    for index, length in enumerate(lengths):
        chunk_lengths.append(length)
        if sum(chunk_lengths) >= min_tokens or index == len(lengths) - 1:
            yield Chunk(slice(begin, begin + sum(chunk_lengths)), tuple(chunk_lengths))
            begin, chunk_lengths = begin + sum(chunk_lengths), []
