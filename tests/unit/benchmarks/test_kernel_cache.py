"""Compiled kernels brought to another machine: whole, or named as broken."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from benchmarks.gpu.environment import Run
from benchmarks.gpu.kernel_cache import pack_cache, unpack_cache
from benchmarks.gpu.preflight import take_kernels
from vila_deploy.kernels.capability import INTERPRETER


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of two kernels, packed; Triton's own folder has another version of one of them."""
    cache = tmp_path / "one" / "cache"
    for name in "ab":
        (cache / name).mkdir(parents=True)
        (cache / name / "kernel.cubin").write_text("compiled")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    run = Run("cpu", INTERPRETER, 600.0, tmp_path / "rows.jsonl")
    pack_cache(run)
    assert [row["kind"] for row in run.rows] == ["packed"]
    assert not list(tmp_path.glob("*.part"))
    other = tmp_path / "other" / "cache"
    (other / "a").mkdir(parents=True)
    (other / "a" / "kernel.cubin").write_text("there before")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(other))
    return tmp_path / "cache.tar.xz"


def kernels(folder: Path) -> dict[str, str]:
    return {path.parent.name: path.read_text() for path in folder.rglob("kernel.cubin")}


def test_kernels_come_to_those_that_are_there(packed: Path) -> None:
    assert unpack_cache(packed) is None
    other = packed.parent / "other"
    assert kernels(other / "cache") == {"a": "there before", "b": "compiled"}
    assert [path.name for path in other.iterdir()] == ["cache"], "nothing else is left"


def test_a_broken_file_brings_nothing_and_is_named(packed: Path) -> None:
    content = packed.read_bytes()
    for broken in (content[:-40], b"no cache", b""):
        packed.write_bytes(broken)
        (warning,) = take_kernels(packed.parent, packed.parent / "x" / "rows.jsonl")
        assert warning.startswith(f"{packed}: ")
        assert "compiled again" in warning
        assert kernels(packed.parent / "other") == {"a": "there before"}


def test_nothing_is_written_outside(packed: Path) -> None:
    with tarfile.open(packed, "w:xz") as made:
        made.addfile(tarfile.TarInfo("cache/../../outside"))
    warning = unpack_cache(packed)
    assert warning is not None
    assert "outside" in warning
    assert not list(packed.parent.rglob("outside"))
