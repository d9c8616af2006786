"""The native backend on a real GPU; run `pytest tests/gpu` by itself."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
TINY_VILA = REPOSITORY / "examples" / "tiny-vila" / "checkpoint"
NEW_TOKENS, RUNS = 64, 10
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU")


@pytest.fixture(autouse=True)
def _compiled_kernels() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("this process runs kernels in Triton's interpreter; run tests/gpu by itself")


@pytest.fixture(scope="module")
def target() -> str:
    """The target of this device's compute capability."""
    from vila_deploy.engine.target import load_targets

    here = ".".join(map(str, torch.cuda.get_device_capability()))
    names = [name for name, row in load_targets().items() if row.compute_capability == here]
    if not names:
        pytest.skip(f"no target has compute capability {here}")
    return names[0]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, target: str) -> Iterator[tuple[Any, Any]]:
    """tiny-vila as it was trained: the engine on this GPU, and the reference on the CPU."""
    from vila_deploy.backends import open_engine
    from vila_deploy.build import BuildOptions, build_engine
    from vila_deploy.checkpoint import open_checkpoint
    from vila_deploy.model.vila import ReferenceSession

    folder = tmp_path_factory.mktemp("native") / "engine"
    build_engine(TINY_VILA, folder, BuildOptions(target, backend="native", max_seq_len=256))
    with open_engine(folder) as engine:
        yield engine.session, ReferenceSession(open_checkpoint(TINY_VILA))


def prompt(session: Any) -> np.ndarray:
    return session.embed_tokens([1, 5, 9, 30, 31, 5, 9])


def test_every_kernel_equals_its_reference(tmp_path: Path) -> None:
    sys.path.insert(0, str(REPOSITORY))
    from benchmarks.gpu.checks import check_all
    from benchmarks.gpu.environment import Run

    major, minor = torch.cuda.get_device_capability()
    assert check_all(Run("cuda", 10 * major + minor, 600.0, tmp_path / "rows.jsonl"))


def test_same_tokens_as_the_reference(pair: tuple[Any, Any]) -> None:
    session, reference = pair
    for each in pair:
        each.reset()
    logits, expected = session.prefill(prompt(session)), reference.prefill(prompt(reference))
    for _ in range(NEW_TOKENS):
        token = int(expected.argmax())
        assert int(logits.argmax()) == token
        logits, expected = session.decode(token), reference.decode(token)


def test_ten_runs_give_equal_bytes_and_guessing_the_same_tokens(pair: tuple[Any, Any]) -> None:
    session, _ = pair
    seen = set()
    for _ in range(RUNS):
        session.reset()
        logits = session.prefill(prompt(session))
        tokens = session.decode_greedy(NEW_TOKENS)
        seen.add((logits.tobytes(), tuple(tokens), session.decode(7).tobytes()))
    assert len(seen) == 1
    session.reset()
    session.prefill(prompt(session))
    assert session.decode_lookup(NEW_TOKENS, [1, 5, 9, 30, 31, 5, 9])[0] == tokens
