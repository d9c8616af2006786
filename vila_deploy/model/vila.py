"""The reference VILA in PyTorch: the session that every engine is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from vila_deploy.checkpoint import Checkpoint
from vila_deploy.model.llm import LanguageModel
from vila_deploy.model.vision import VisionEncoder
from vila_deploy.utils.arrays import Floats


class ReferenceSession:
    """Runs a checkpoint as it is, 4-bit layers dequantized, in `dtype` on the CPU.

    Implements `vila_deploy.engine.session.SequenceSession`.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32):
        config = checkpoint.config
        self.dtype = dtype
        self.llm = LanguageModel(config.llm, checkpoint.llm, dtype)
        self.vision = VisionEncoder(config, checkpoint.vision, checkpoint.projector, dtype)
        self.max_seq_len = config.llm.max_position_embeddings
        self.position = 0
        self._cache: Any = DynamicCache()

    def encode_images(self, pixels: Floats, grid: tuple[int, int] | None = None) -> Floats:
        return self.vision(torch.from_numpy(pixels).to(self.dtype), grid).float().numpy()

    def embed_tokens(self, tokens: Sequence[int]) -> Floats:
        ids = torch.tensor(list(tokens), dtype=torch.int64)
        return self.llm.embed_tokens[ids].float().numpy()

    def prefill(self, embeds: Floats) -> Floats:
        return self.prefill_all(embeds)[-1]

    def prefill_all(self, embeds: Floats) -> Floats:
        """Append [tokens, hidden] to the cache and return the logits of each, [tokens, vocab]."""
        tokens = torch.from_numpy(np.ascontiguousarray(embeds)).to(self.dtype)
        logits = self.llm(tokens, self._cache, self.position)
        self.position += len(tokens)
        return logits.float().numpy()

    def decode(self, token: int) -> Floats:
        return self.prefill(self.embed_tokens([token]))

    def truncate(self, tokens: int) -> None:
        if not tokens:
            self._cache = DynamicCache()
        elif tokens < self.position:
            self._cache.crop(tokens - self.position)
        self.position = tokens

    def close(self) -> None:
        self.truncate(0)
