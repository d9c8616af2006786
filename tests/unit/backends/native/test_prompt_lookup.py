"""Prompt-lookup decoding gives the tokens of plain greedy decoding in fewer steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.native_cases import built
from tests.support.tiny import make_checkpoint
from vila_deploy.backends.native import open_session
from vila_deploy.backends.native.prompt_lookup import accepted, guess
from vila_deploy.checkpoint import open_checkpoint


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


def test_same_tokens_as_greedy_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether guesses are right or wrong, and to the end of the cache, where none has room."""
    checkpoint = open_checkpoint(
        make_checkpoint(tmp_path / "c", quantized=True, kv_heads=2, layers=1)
    )
    prompt, slots, count = [5, 9, 17, 5, 9], 14, 9
    session = open_session(
        tmp_path / "engine", built(tmp_path / "engine", checkpoint, monkeypatch, slots)
    ).sequence
    embeds = session.embed_tokens(prompt)
    first = int(session.prefill(embeds).argmax())
    expected = session.decode_greedy(count)
    assert len(expected) == count
    right, wrong = [*prompt, first, *expected], [*prompt, first, expected[0] + 1, 1, 2, 3]
    for text, most in (([*right, *prompt], 2), ([*wrong, *prompt], count)):
        session.truncate(0)
        session.prefill(embeds)
        found, steps = session.decode_lookup(count, text)
        assert found == expected
        assert steps <= most
        assert session.position == int(session._cache.position) == slots
