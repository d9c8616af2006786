"""How graphs are loaded on different processors."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from vila_deploy.backends.onnxruntime import inference


@pytest.mark.parametrize(
    ("machine", "flags", "careful"),
    [
        ("x86_64", "fma avx2", True),
        ("x86_64", "avx2 avx512f", True),
        ("AMD64", None, True),
        ("x86_64", "avx2 avx512f avx512_vnni", False),
        ("x86_64", "avx2 avx_vnni", False),
        ("aarch64", "asimd", False),
    ],
)
def test_int8_products_must_not_overflow_where_there_is_no_vnni(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: str, flags: str | None, careful: bool
) -> None:
    info = tmp_path / "cpuinfo"
    if flags is not None:
        info.write_text(f"processor : 0\nflags\t\t: fpu {flags}\n")
    monkeypatch.setattr(inference, "CPU_INFO", info)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert inference.vision_options() == (inference.NO_OVERFLOW if careful else {})
