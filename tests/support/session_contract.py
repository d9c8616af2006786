"""Check a Session against a reference: every promise of vila_deploy.engine.session.Session."""

from __future__ import annotations

import numpy as np
import pytest

from vila_deploy.engine.session import SequenceSession, Session
from vila_deploy.utils.errors import VilaDeployError


def check_session(session: Session, reference: SequenceSession, tolerance: float) -> None:
    """Assert that `session`, empty and of at least 24 positions, keeps the contract.

    Args:
        reference: the same model.
        tolerance: largest difference of logits, as a share of their spread.
    """
    prompt, rest = reference.embed_tokens([3, 5, 7, 11, 13]), reference.embed_tokens([17, 19])
    np.testing.assert_array_equal(session.embed_tokens([3, 5]), reference.embed_tokens([3, 5]))

    def logits_of(*tokens: int) -> np.ndarray:
        reference.truncate(0)
        rows = [reference.decode(token) for token in tokens]
        return np.stack(rows)

    def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() < tolerance * expected.std()

    expected = logits_of(3, 5, 7, 11, 13, 17, 19, 23)
    for slot in range(session.slots):
        assert session.length(slot) == 0
        assert_close(session.prefill(slot, prompt), expected[4])
        assert_close(session.prefill(slot, rest, all_logits=True), expected[5:7])
        assert session.length(slot) == 7
    every = list(range(session.slots))
    found = session.decode(every, [23] * len(every))
    assert_close(found, np.stack([expected[7]] * len(every)))

    # What is kept serves as the beginning of another sequence.
    session.keep(0, 5)
    assert session.length(0) == 5
    assert_close(session.prefill(0, session.embed_tokens([29])), logits_of(3, 5, 7, 11, 13, 29)[5])
    session.keep(0, 6)
    assert session.length(0) == 6, "keeping all changes nothing"
    assert_close(session.decode([0], [31]), logits_of(3, 5, 7, 11, 13, 29, 31)[6:])
    assert [session.length(slot) for slot in every[1:]] == [8] * len(every[1:])
    session.keep(0, 0)
    assert session.length(0) == 0
    assert_close(session.prefill(0, prompt, all_logits=True), expected[:5])

    check_refusals(session)
    assert_close(session.decode([0], [17]), expected[5:6])


def check_refusals(session: Session) -> None:
    """Assert that bad calls, after a prefill of 5 tokens into slot 0, change nothing."""
    room = session.max_seq_len - 5
    too_long = session.embed_tokens([3] * (room + 1))
    for all_logits in (False, True):
        with pytest.raises(VilaDeployError, match="don't fit into the"):
            session.prefill(0, too_long, all_logits=all_logits)
        with pytest.raises(VilaDeployError, match="the prompt is empty"):
            session.prefill(0, too_long[:0], all_logits=all_logits)
    for tokens in (-1, 6):
        with pytest.raises(ValueError, match="slot 0 holds 5 tokens"):
            session.keep(0, tokens)
    for slot in (-1, session.slots):
        with pytest.raises(ValueError, match="slots"):
            session.length(slot)
        with pytest.raises(ValueError, match="slots"):
            session.prefill(slot, too_long[:1])
    with pytest.raises(ValueError, match="slots"):
        session.decode([0, 0], [3, 3])
    with pytest.raises(ValueError):  # noqa: PT011  as many tokens as slots
        session.decode([0], [3, 3])
    assert session.length(0) == 5
