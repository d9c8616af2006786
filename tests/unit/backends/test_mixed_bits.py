"""Linears in several numbers of bits are refused in a line by all that hold only 4."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.commands import assert_one_line, invoke
from tests.support.mixed_bits import make_mixed_checkpoint
from vila_deploy.backends.registry import get_backend
from vila_deploy.engine.target import load_targets
from vila_deploy.formats.base import BITS
from vila_deploy.formats.registry import FORMATS

# A target of each backend that takes linears in 4 bits only.
TARGETS = {
    backend: target.name
    for target in load_targets().values()
    for backend in target.backends
    if get_backend(backend).linear_bits == (BITS,)
}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With weights that can't be read, so that only what is refused before any work is."""
    root = make_mixed_checkpoint(tmp_path_factory.mktemp("made"), symmetric=True)
    for file in root.rglob("*.safetensors"):
        file.unlink()
    return root


def test_targets_have_all_these_backends() -> None:
    assert {"native", "tensorrt", "tensorrt-llm", "edge-llm"} == set(TARGETS)


@pytest.mark.parametrize("plan", [False, True])
@pytest.mark.parametrize("backend", TARGETS)
def test_backends_refuse_them_before_any_work(
    backend: str, plan: bool, mixed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "engine"
    words = ["--plan"] if plan else ["-o", out]
    done = invoke(
        "vila-build-engine", mixed, "--target", TARGETS[backend], "--backend", backend, *words
    )  # fmt: skip
    line = assert_one_line(done)
    assert f"backend {backend} takes linears in 4 bits, this checkpoint has some in 8" in line
    assert "--target cpu" in line
    assert not out.exists()


@pytest.mark.parametrize("format", [n for n, row in FORMATS.items() if row.packing.widths == (4,)])
def test_formats_refuse_them_before_any_work(format: str, mixed: Path, tmp_path: Path) -> None:
    out = tmp_path / "converted"
    line = assert_one_line(invoke("vila-convert", mixed, "--to", format, "-o", out))
    assert "found 8 bits" in line
    assert "gguf (4, 5 and 8)" in line
    assert not out.exists()


def test_vllm_refuses_them_before_it_starts(mixed: Path) -> None:
    done = invoke("vila-serve", mixed, "--backend", "vllm", "--plan")
    assert "several numbers of bits, and vLLM joins some to one" in assert_one_line(done)
