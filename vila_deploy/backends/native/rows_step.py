"""One decoding step of several sequences: a row each, with a cache of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vila_deploy.backends.native.decode_step import DecodeStep, StepConfig
from vila_deploy.backends.native.slot_caches import SlotCaches
from vila_deploy.backends.native.weights import PackedLlm
from vila_deploy.kernels.argmax import argmax
from vila_deploy.kernels.attention import rope_attention
from vila_deploy.kernels.launch import Launch
from vila_deploy.kernels.sample import sample_rows
from vila_deploy.kernels.tile_config import TOKENS

NO_SLOT = -1


class RowsStep(DecodeStep):
    """`launches` append a token to each row's slot and leave the next one in `token` [rows].

    Products read each weight once for all rows. Rows don't change each other's bits, nor do they
    depend on the number of rows. Rows without a slot are left out where they would cost more.
    `sampled` also draws the tokens of slots that have a temperature.

    Args:
        rows: 1 to 8.
    """

    def __init__(self, config: StepConfig, llm: PackedLlm, caches: SlotCaches, rows: int = 1):
        self._caches = caches
        super().__init__(config, llm, caches.sequence(0), rows)

    def set_rows(
        self, slots: Sequence[int], positions: Sequence[int], tokens: Sequence[int]
    ) -> None:
        """Set the first rows: where each token belongs; the others have no sequence."""
        inputs = torch.zeros(3, TOKENS, dtype=torch.int32)
        inputs[2] = NO_SLOT
        inputs[:, : len(slots)] = torch.tensor([tokens, positions, slots])
        self._inputs.copy_(inputs)

    def _allocate_inputs(self, tokens: int) -> None:
        # One tensor takes one copy; rows of 8 lie at multiples of 16 bytes.
        self._inputs = torch.zeros(3, TOKENS, dtype=torch.int32, device=self._config.device)
        self._inputs[2] = NO_SLOT
        self.token, self.position, self.slot = self._inputs[:, :tokens]
        self._advances = True

    def _sampled_launches(self) -> tuple[Launch, ...]:
        return (*self.launches, *self._with_pdl([self._sample(step=False)]))

    def _argmax(self, *, step: bool) -> Launch:
        return argmax(self._best, self._index, self.token, None, self.position, step=step)

    def _sample(self, *, step: bool) -> Launch:
        # The position has moved on already.
        caches = self._caches
        return sample_rows(
            self.logits, caches.uniform, caches.settings, self.token, self.position, self.slot
        )

    def _attention(self, index: int) -> tuple[Launch, ...]:
        llm, config = self._llm, self._config
        keys, values, scales = self._caches.layer(index)
        return rope_attention(
            self._qkv, (llm.cos, llm.sin), keys, values, self.position, self._attended,
            self._scratch, config.capability, scales,
            merged=config.launch_mode.merge_attention, slot=self.slot,
        )  # fmt: skip
