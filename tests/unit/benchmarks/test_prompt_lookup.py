"""Prompt-lookup decoding gives the tokens of plain greedy decoding in fewer steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gpu.prompt_lookup import accepted, decode, guess
from tests.support.native_cases import pack_llm
from tests.support.tiny import make_checkpoint
from vila_deploy.backends.native.decode_step import Cache, DecodeStep, StepConfig
from vila_deploy.backends.native.prompts import Prompts
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.kernels.capability import INTERPRETER
from vila_deploy.kernels.tile_config import TOKENS


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ([1, 2, 3, 4, 5, 1, 2, 3], [4, 5, 1, 2]),
        ([7, 2, 3, 9, 9, 2, 3, 8, 4, 3], [8, 4, 3]),  # only one token in common, the last place
        ([5, 1, 2, 6, 3, 1, 2, 7, 5, 1, 2], [6, 3, 1, 2]),  # the longest end, not the last place
        ([1, 2, 3], []),
        ([4, 4], [4]),
        ([4], []),
        ([], []),
    ],
)
def test_guesses_are_what_followed_the_last_place(text: list[int], expected: list[int]) -> None:
    assert guess(text, 4) == expected


def test_only_proven_tokens_are_accepted() -> None:
    assert accepted([5, 6, 7], [5, 6, 9, 1]) == [5, 6, 9]
    assert accepted([5, 6, 7], [4, 6, 7, 1]) == [4]
    assert accepted([5], [5, 8]) == [5, 8]
    assert accepted([], [3, 3, 3]) == [3]


def test_same_tokens_as_greedy_decoding(tmp_path: Path) -> None:
    """Whether guesses are right or wrong, and to the end of the cache, where none has room."""
    root = make_checkpoint(tmp_path / "c", quantized=True, kv_heads=2, layers=1)
    checkpoint = open_checkpoint(root)
    sizes, prompt, max_seq_len, count = checkpoint.config.llm, [5, 9, 17, 5, 9], 14, 9
    llm = pack_llm(sizes, checkpoint.llm, max_seq_len)
    cache = Cache(sizes, max_seq_len, "cpu")
    config = StepConfig(sizes, max_seq_len, INTERPRETER, "cpu")
    step, wide = DecodeStep(config, llm, cache), DecodeStep(config, llm, cache, TOKENS)

    def begin() -> int:
        """Fill the cache with the prompt, and return the first token behind it."""
        Prompts(config, llm, cache, step).append(llm.table[prompt].float(), 0)
        cache.position.fill_(len(prompt))
        return int(step.token)

    first, expected = begin(), []
    for _ in range(count):
        step()
        expected.append(int(step.token))
    right, wrong = [*prompt, first, *expected], [*prompt, first, expected[0] + 1, 1, 2, 3]
    for text, most in (([*right, *prompt], 2), ([*wrong, *prompt], count)):
        begin()
        tokens, steps = decode(step, wide, cache, text, count)
        assert tokens == expected
        assert steps <= most
        assert int(cache.position) == max_seq_len
        assert int(step.token) == expected[-1]
