"""Several sequences decoded together: each one's own logits and tokens, bit for bit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.support.native_cases import TOLERANCE, built
from tests.support.session_contract import check_session
from tests.support.tiny import make_checkpoint
from vila_deploy.backends.native import loading, open_session
from vila_deploy.backends.native.session import NativeSession
from vila_deploy.backends.native.slotted_session import SlottedSession
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.engine.manifest import Manifest
from vila_deploy.engine.sampling import SamplingParams
from vila_deploy.model.vila import ReferenceSession
from vila_deploy.utils.errors import VilaDeployError

Engine = tuple[Path, Manifest]
MAX_SEQ_LEN = 24


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    root = tmp_path_factory.mktemp("slotted")
    checkpoint = open_checkpoint(make_checkpoint(root / "c", heads=2, kv_heads=1, layers=1))
    with pytest.MonkeyPatch.context() as patch:
        return root / "engine", built(root / "engine", checkpoint, patch, MAX_SEQ_LEN)


@pytest.fixture(scope="module")
def lone(engine: Engine) -> Iterator[NativeSession]:
    session = open_session(*engine).sequence  # type: ignore[attr-defined]
    yield session
    session.close()


def prompts(count: int) -> list[list[int]]:
    """Prompts of different lengths."""
    return [[3 + index, *range(20, 22 + index)] for index in range(count)]


def alone(lone: NativeSession, prompt: list[int], steps: int) -> tuple[list[int], np.ndarray]:
    """Return the greedy answer to a prompt and the logits of each token."""
    lone.truncate(0)
    rows = [lone.prefill(lone.embed_tokens(prompt))]
    for _ in range(steps):
        rows.append(lone.decode(int(rows[-1].argmax())))
    return [int(row.argmax()) for row in rows], np.stack(rows)


@pytest.mark.skipif(not os.environ.get("SLOTS_CONTRACT"), reason="long; a part of make test-ptx")
def test_it_keeps_the_contract(engine: Engine) -> None:
    session = open_session(*engine, slots=2)
    check_session(session, ReferenceSession(open_checkpoint(engine[0].parent / "c")), TOLERANCE)
    session.close()


def test_two_answer_as_each_would_alone_and_a_third_takes_the_place_of_one(
    engine: Engine, lone: NativeSession
) -> None:
    session = SlottedSession(*engine, 2)
    first, second, third = prompts(3)
    expected, logits = alone(lone, first, 2)
    for slot, prompt in ((1, second), (0, first)):
        session.prefill(slot, session.embed_tokens(prompt))
    found = [session.first_token(0, SamplingParams())]
    tokens, rows = session.next_tokens([1, 0], [30, found[0]], logits_of=[1])
    np.testing.assert_array_equal(rows, logits[1:2])
    found.append(tokens[1])
    session.keep(1, 0)
    prefilled = session.prefill(1, session.embed_tokens(third))
    rows = session.decode([0, 1], [found[-1], int(prefilled.argmax())])
    assert [*found, int(rows[0].argmax())] == expected
    np.testing.assert_array_equal(rows[0], logits[-1])
    np.testing.assert_array_equal(np.stack([prefilled, rows[1]]), alone(lone, third, 1)[1])


def test_what_does_not_fit_is_refused_in_one_line(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "free_memory_bytes", lambda device: 1 << 20)
    with pytest.raises(VilaDeployError, match=r"caches of 64 slots take .* are free") as error:
        open_session(*engine, slots=64)
    assert "ask for fewer slots" in str(error.value)
