"""Timing several sequences at once, on an engine that holds several and on one that doesn't."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.tiny import make_checkpoint
from vila_deploy import build_engine
from vila_deploy.bench import several_sequences
from vila_deploy.bench.several_sequences import measure_several


def test_as_many_sequences_as_fit_are_timed_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_checkpoint(tmp_path / "c", layers=1)
    build_engine(checkpoint, tmp_path / "engine", "cpu", max_seq_len=80)
    found = measure_several(tmp_path / "engine", 20)
    assert found is not None
    assert found["sequences"] == 8
    assert found["decode_tokens_per_s"] > 0
    monkeypatch.setattr(several_sequences, "slots_that_fit", lambda folder, most: 1)
    assert measure_several(tmp_path / "engine", 20) is None
