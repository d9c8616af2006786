"""How kernels follow each other: stored in an engine, read when it is opened, the same tokens."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.support.native_cases import built
from tests.support.paths import TINY_VILA
from tests.support.tiny import make_checkpoint
from vila_deploy.backends.native import build as build_module
from vila_deploy.backends.native import files
from vila_deploy.backends.native.session import NativeSession
from vila_deploy.builder import build_engine
from vila_deploy.checkpoint import Checkpoint, open_checkpoint
from vila_deploy.cli.build_engine import main
from vila_deploy.kernels.launch_mode import AUTOMATIC, LAUNCH_MODES, PREFERRED, LaunchMode
from vila_deploy.utils.errors import VilaDeployError

PROMPT, NEW_TOKENS = [5, 9, 17, 30], 8
# Seconds each in Triton's interpreter: make test tries one, make test-ptx the rest.
MODES = [*LAUNCH_MODES] if os.environ.get("LAUNCH_MODES") else ["fused-merged-attention"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Three layers, of which the first two can be fused with what follows."""
    root = tmp_path_factory.mktemp("native") / "c"
    return open_checkpoint(make_checkpoint(root, quantized=True, kv_heads=2, layers=3))


@pytest.fixture
def tokens_of(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str | None], tuple[list[int], NativeSession]]:
    """Builds an engine with a launch mode, opens it and decodes."""

    def decode(name: str | None) -> tuple[list[int], NativeSession]:
        folder = tmp_path / str(name)
        session = NativeSession(
            folder, built(folder, checkpoint, monkeypatch, 16, kernel_launch=name)
        )
        session.prefill(session.embed_tokens(PROMPT))
        return session.decode_greedy(NEW_TOKENS), session

    return decode


def test_every_launch_mode_gives_the_same_tokens(
    tokens_of: Callable[[str | None], tuple[list[int], Any]],
) -> None:
    expected, default = tokens_of(None)
    assert len(set(expected)) > 1
    separate = [launch.name for launch in default._step.launches]
    assert "attention_merge_kernel" in separate
    for name in MODES:
        tokens, session = tokens_of(name)
        assert tokens == expected, name
        mode = session._config.launch_mode
        assert mode == LAUNCH_MODES[name]
        kernels = [launch.name for launch in session._step.launches]
        assert ("fused_layer_kernel" in kernels) == mode.fuse_layers
        assert ("attention_merge_kernel" in kernels) == (not mode.merge_attention)
        assert name != "separate" or kernels == separate


def build(out: Path, *flags: str) -> Result:
    arguments = [TINY_VILA, "-o", out, "--max-seq-len", "64", *flags]
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_command_stores_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(build_module, "compile_engine", lambda *args: asked.append(args) or [])
    done = build(tmp_path / "engine", "--target", "h200", "--kernel-launch", "pdl")
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "engine" / files.MODEL).read_text())["kernel_launch"] == "pdl"
    assert asked[0][-1] == (LAUNCH_MODES["pdl"],)


def test_left_out_it_stays_open_and_both_ways_compile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(build_module, "compile_engine", lambda *args: asked.append(args) or [])
    for name, target in (("new", "h200"), ("old", "a100")):
        flags = ("--target", target, "--backend", "native")
        assert build(tmp_path / name, *flags).exit_code == 0
        stored = json.loads((tmp_path / name / files.MODEL).read_text())["kernel_launch"]
        assert stored == AUTOMATIC
    assert [compiled[-1] for compiled in asked] == [
        (LaunchMode(), LAUNCH_MODES[PREFERRED]), (LaunchMode(),),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--target", "rtx4090", "--backend", "native"), "compute capability 9.0, this is 8.9"),
        (("--target", "cpu"), "--kernel-launch is for backend native, not for onnxruntime"),
    ],
)
def test_where_there_is_none_it_is_refused_in_one_line(
    tmp_path: Path, flags: tuple[str, ...], message: str
) -> None:
    done = build(tmp_path / "engine", "--kernel-launch", "pdl", *flags)
    assert done.exit_code == 1
    assert message in done.output
    assert done.output.count("\n") == 1
    assert not (tmp_path / "engine").exists()


def test_python_refuses_an_unknown_one_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(VilaDeployError, match=r"--kernel-launch 'fast' is unknown; give one of"):
        build_engine(TINY_VILA, tmp_path / "engine", "h200", kernel_launch="fast")
    assert not (tmp_path / "engine").exists()
