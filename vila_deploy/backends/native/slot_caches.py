"""Key/value caches of several sequences, one a slot."""

from __future__ import annotations

import torch

from vila_deploy.backends.native.decode_step import Cache, zero_vectors
from vila_deploy.checkpoint.llm_config import LlmConfig
from vila_deploy.engine.precision import FP16
from vila_deploy.kernels.rope_kv import Scales


class SlotCaches:
    """Keys and values, float16 [layers, slots, kv_heads, max_seq_len, dim], or int8 with scales.

    `settings` and `uniform` say how each slot's tokens are chosen, as `sample_rows` takes them.
    """

    def __init__(
        self, config: LlmConfig, max_seq_len: int, slots: int, device: str, dtype: str = FP16
    ):
        shape = (config.num_layers, slots, config.num_kv_heads, max_seq_len, config.head_dim)
        self.keys, self.values, self.scales = zero_vectors(shape, device, dtype)
        self.uniform = torch.zeros(slots, max_seq_len + 1, device=device)
        self.settings = torch.zeros(slots, 2, device=device)

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor, Scales | None]:
        """Return keys, values and their scales of a layer, [slots, kv_heads, …]."""
        scales = None if self.scales is None else (self.scales[0, index], self.scales[1, index])
        return self.keys[index], self.values[index], scales

    def sequence(self, slot: int) -> Cache:
        """Return the cache of one slot, over the same memory."""
        scales = None if self.scales is None else self.scales[:, :, slot]
        return Cache.of_vectors(self.keys[:, slot], self.values[:, slot], scales)

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy the first `tokens` positions of a slot to another."""
        for vectors in (self.keys, self.values):
            vectors[:, target, :, :tokens] = vectors[:, source, :, :tokens]
        if self.scales is not None:
            self.scales[:, :, target, :, :tokens] = self.scales[:, :, source, :, :tokens]
