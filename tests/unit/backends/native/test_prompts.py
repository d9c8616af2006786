"""Prompts in pieces that are padded to a few lengths."""

from __future__ import annotations

from itertools import pairwise

from vila_deploy.backends.native.memory import PREFILL_TOKENS, PROMPT_LENGTHS, prompt_lengths


def test_lengths_end_with_the_first_that_holds_every_piece() -> None:
    assert prompt_lengths(1) == [1]
    assert prompt_lengths(96) == [1, 16, 32, 64, 96]
    assert prompt_lengths(97)[-1] == 128
    assert prompt_lengths(5000) == list(PROMPT_LENGTHS)
    assert PROMPT_LENGTHS[-1] == PREFILL_TOKENS
    assert all(longer <= 1.5 * length for length, longer in pairwise(PROMPT_LENGTHS[3:]))
