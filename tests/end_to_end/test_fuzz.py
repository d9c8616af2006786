"""300 random mutations of a small checkpoint: a result or one line, never a traceback or a hang."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.commands import assert_one_line, invoke, run
from tests.support.mutate import mutate
from tests.support.tiny import make_checkpoint

MUTATIONS = 300
THROUGH_THE_SHELL = 2
LIMIT_S = 20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("fuzz") / "checkpoint", layers=1)


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def hang(signum: int, frame: object) -> None:
        raise AssertionError(f"took more than {seconds} s")

    previous = signal.signal(signal.SIGALRM, hang)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


@pytest.mark.parametrize("block", range(6))
def test_mutated_checkpoint_gives_a_result_or_one_line(
    checkpoint: Path, tmp_path: Path, block: int
) -> None:
    outcomes = {0: 0, 1: 0}
    for seed in range(block * MUTATIONS // 6, (block + 1) * MUTATIONS // 6):
        root, out = tmp_path / "checkpoint", tmp_path / "out"
        shutil.copytree(checkpoint, root, symlinks=True)
        what = mutate(root, random.Random(seed))
        if seed % 2:
            command, flags = "vila-build-engine", ["--target", "cpu"]
        else:
            command, flags = "vila-quantize", ["--algorithm", "rtn"]
        with time_limit(LIMIT_S):
            done = invoke(command, root, "-o", out, *flags)
        if done.returncode:
            assert_one_line(done)
            assert not out.exists(), (seed, what)
        outcomes[done.returncode] += 1
        shutil.rmtree(root)
        shutil.rmtree(out, ignore_errors=True)
        assert list(tmp_path.iterdir()) == [], (seed, what)
    # Mutations that never break anything, or always do, would prove little.
    assert outcomes[1] > 10


@pytest.mark.parametrize("seed", range(1000, 1000 + THROUGH_THE_SHELL))
def test_mutated_checkpoint_through_the_shell(checkpoint: Path, tmp_path: Path, seed: int) -> None:
    root = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, root, symlinks=True)
    mutate(root, random.Random(seed))
    done = run("vila-build-engine", root, "--target", "cpu", "-o", tmp_path / "out")
    if done.returncode:
        assert_one_line(done)
