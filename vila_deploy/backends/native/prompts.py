"""Prompts of any length, in pieces that are padded to a few lengths: a CUDA graph for each."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from vila_deploy.backends.native.decode_step import Cache, DecodeStep, StepConfig
from vila_deploy.backends.native.memory import PREFILL_TOKENS, prompt_lengths
from vila_deploy.backends.native.prompt_pass import PromptBuffers, PromptPass
from vila_deploy.backends.native.slot_caches import SlotCaches
from vila_deploy.backends.native.weights import PackedLlm
from vila_deploy.kernels.aot import distinct
from vila_deploy.kernels.launch import Launch
from vila_deploy.kernels.linear import DenseProduct


class Prompts:
    """Append prompts to caches, and leave the logits behind their last token in a step.

    Args:
        step: whose `finish` computes logits and the greedy token.
    """

    def __init__(
        self, config: StepConfig, llm: PackedLlm, caches: Cache | SlotCaches, step: DecodeStep
    ):
        self._config, self._llm, self._caches, self._step = config, llm, caches, step
        self._lengths = prompt_lengths(config.max_seq_len)
        self._passes: dict[int, PromptPass] = {}
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._finish: torch.cuda.CUDAGraph | None = None
        self._last = torch.zeros(config.llm.hidden_size, device=config.device)

    @cached_property
    def _buffers(self) -> PromptBuffers:
        return PromptBuffers(self._config, self._llm, self._lengths[-1])

    def capture(self) -> None:
        """Record a CUDA graph for every length; they share their memory, as one runs at a time.

        Logits are left by launches until `capture_finish`.
        """
        self._load()
        pool = torch.cuda.graph_pool_handle()
        for tokens in reversed(self._lengths):
            self._graphs[tokens] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graphs[tokens], pool=pool):
                self._pass(tokens)()

    def capture_finish(self, step: DecodeStep) -> None:
        """Leave logits in `step` from now on, by a CUDA graph."""
        self._step = step
        step.finish(self._last)
        torch.cuda.synchronize()
        self._finish = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._finish):
            step.finish(self._last)

    def _load(self) -> None:
        """Run each kernel once, as none can be loaded during a capture; no cache changes."""
        self._buffers.span.zero_()  # no tokens
        calls = [call for tokens in self._lengths for call in self._pass(tokens).first_layer]
        for launch in distinct(call for call in calls if isinstance(call, Launch)):
            launch()
        for call in calls:
            if isinstance(call, DenseProduct):
                call()
        torch.cuda.synchronize()

    def append(self, embeds: Tensor, start: int, slot: int = 0, *, more: bool = False) -> None:
        """Append `embeds` [tokens, hidden] to `slot` from position `start` on.

        Args:
            more: the prompt goes on: no logits.
        """
        for first in range(0, len(embeds), PREFILL_TOKENS):
            piece = embeds[first : first + PREFILL_TOKENS]
            self._append(piece, start + first, slot)
        if more:
            return
        self._last.copy_(self._buffers.residual[len(piece) - 1])
        if self._finish is None:
            self._step.finish(self._last)
        else:
            self._finish.replay()

    def _append(self, piece: Tensor, start: int, slot: int) -> None:
        count, buffers = len(piece), self._buffers
        buffers.residual[:count].copy_(piece)
        buffers.span.copy_(torch.tensor([start, start + count, slot], dtype=torch.int32))
        tokens = next(length for length in self._lengths if length >= count)
        if tokens in self._graphs:
            self._graphs[tokens].replay()
        else:
            self._pass(tokens)()

    def _pass(self, tokens: int) -> PromptPass:
        if tokens not in self._passes:
            parts = self._config, self._llm, self._caches, self._buffers
            self._passes[tokens] = PromptPass(*parts, tokens)
        return self._passes[tokens]
