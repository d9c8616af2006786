"""Answering on a CPU needs no torch: what vila-chat imports there never imports it."""

from __future__ import annotations

import subprocess
import sys
from pkgutil import iter_modules

import pytest

from vila_deploy import processing, runtime

PACKAGES = (processing, runtime)
MODULES = [
    *(f"{p.__name__}.{m.name}" for p in PACKAGES for m in iter_modules(p.__path__)),
    "vila_deploy.backends.onnxruntime.session",
    "vila_deploy.engine.manifest",
]
HEAVY = {"torch", "transformers", "onnx"}


def imported(*modules: str) -> set[str]:
    """Return which of HEAVY a fresh interpreter has imported after `modules`."""
    program = f"import sys, {', '.join(modules)}; print(*({HEAVY} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return set(result.stdout.split())


def test_processing_and_runtime_import_no_torch() -> None:
    assert len(MODULES) > 8
    assert imported(*MODULES) == set()


@pytest.mark.parametrize("module", ["onnx", "vila_deploy.model.llm"])
def test_imports_are_seen(module: str) -> None:
    assert imported(module)
