"""The session contract, on the adapter over today's one-sequence sessions."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

from tests.support.session_contract import check_session
from tests.support.tiny import make_checkpoint
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.engine.sampling import SamplingParams
from vila_deploy.engine.session import OneSlot, choices_of
from vila_deploy.model.vila import ReferenceSession
from vila_deploy.runtime.generate import generate
from vila_deploy.utils.errors import VilaDeployError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("session") / "c", max_length=24)


def test_one_slot_keeps_the_contract(root: Path) -> None:
    one, other = (ReferenceSession(open_checkpoint(root)) for _ in range(2))
    check_session(OneSlot(one), other, tolerance=1e-4)


def test_a_full_slot_takes_no_token(root: Path) -> None:
    session = OneSlot(ReferenceSession(open_checkpoint(root)))
    session.prefill(0, session.embed_tokens([5] * session.max_seq_len))
    with pytest.raises(VilaDeployError, match="25 tokens don't fit into the 24 positions"):
        session.decode([0], [5])
    assert session.length(0) == 24


def test_what_a_session_decided_is_read_through_its_slot(root: Path) -> None:
    class Decided(ReferenceSession):
        choices = MappingProxyType({"kernel_launch": {"mode": "separate"}})

    checkpoint = open_checkpoint(root)
    assert choices_of(OneSlot(ReferenceSession(checkpoint))) == {}
    assert choices_of(OneSlot(Decided(checkpoint)))["kernel_launch"]["mode"] == "separate"


class DrawsOnDevice(ReferenceSession):
    """Answers 1, 2, 3 by itself, whatever the logits."""

    def stream(self, stop_token_ids: Collection[int], sampling: SamplingParams) -> Iterator[int]:
        yield from [1, 2, 3][: sampling.max_new_tokens]


def test_tokens_come_from_the_device_where_it_chooses_them(root: Path) -> None:
    plain, device = (
        OneSlot(kind(open_checkpoint(root))) for kind in (ReferenceSession, DrawsOnDevice)
    )
    assert plain.stream(0, (), SamplingParams()) is None
    embeds = plain.embed_tokens([3, 5])
    assert list(generate(device, embeds, (), SamplingParams(2))) == [1, 2]
    logits = plain.prefill(0, embeds)
    (first,) = generate(plain, embeds, (), SamplingParams(1))
    assert first == int(logits.argmax())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; give a number at least 1"),
        ({"temperature": float("nan")}, "temperature is nan; give a number between 0 and 100"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 0.0}, "top_p is 0.0; give a number above 0, at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"seed": -1}, "seed is -1; give a number at least 0"),
        ({"top_k": -1}, "top_k is -1; give a number at least 0"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; give a number above 0, at most 100"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty is nan"),
    ],
)
def test_sampling_out_of_range_is_one_line(values: dict[str, float], message: str) -> None:
    with pytest.raises(VilaDeployError) as raised:
        SamplingParams(**values)  # type: ignore[arg-type]
    assert message in str(raised.value)


def test_logits_are_not_shared(root: Path) -> None:
    """A caller may keep what it was given while the session goes on."""
    session = OneSlot(ReferenceSession(open_checkpoint(root)))
    logits = session.prefill(0, session.embed_tokens([3]))
    copy = logits.copy()
    session.decode([0], [5])
    np.testing.assert_array_equal(logits, copy)
