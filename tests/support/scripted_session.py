"""A session that says what it was told to say, for tests of what lies above engines."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class ScriptedSession:
    """Answers with the given tokens, whatever it is asked; its features are all ones.

    `prompt` is the first channel of all that was prefilled and kept, `prefills` the lengths.
    """

    def __init__(self, script: Sequence[int], vocab: int = 384, max_seq_len: int = 400):
        self.script, self.vocab, self.max_seq_len = list(script), vocab, max_seq_len
        self.position, self.step = 0, 0
        self.prompt = np.empty(0, np.float32)
        self.prefills: list[int] = []
        self.encoded = 0

    def truncate(self, tokens: int) -> None:
        assert 0 <= tokens <= self.position
        self.position, self.prompt, self.step = tokens, self.prompt[:tokens], 0

    def encode_images(self, pixels: np.ndarray, grid: object = None) -> np.ndarray:
        self.encoded += len(pixels)
        return np.ones((len(pixels), 4, 128), np.float32)

    def embed_tokens(self, tokens: Sequence[int]) -> np.ndarray:
        return np.repeat(np.array(tokens, np.float32)[:, None], 128, 1)

    def prefill(self, embeds: np.ndarray) -> np.ndarray:
        self.position += len(embeds)
        self.prompt = np.concatenate([self.prompt, embeds[:, 0]])
        self.prefills.append(len(embeds))
        self.step = 0
        return self._next()

    def decode(self, token: int) -> np.ndarray:
        assert token == self.script[self.step - 1]
        self.position += 1
        self.prompt = np.append(self.prompt, np.float32(token))
        return self._next()

    def close(self) -> None:
        pass

    def _next(self) -> np.ndarray:
        logits = np.zeros(self.vocab, np.float32)
        logits[self.script[self.step]] = 1.0
        self.step += 1
        return logits
