"""The public API: listed, lazily imported, and the same as the commands."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import vila_deploy

HEAVY = ("torch", "onnxruntime", "transformers", "numpy", "PIL")


def imported_by(code: str) -> set[str]:
    """Return the names of HEAVY that a new Python has imported after `code`."""
    probe = f"{code}\nimport json, sys; print(json.dumps([n for n in {HEAVY} if n in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert imported_by("import vila_deploy") == set()
    assert imported_by("import torch") >= {"torch"}, "the probe sees what is imported"


@pytest.mark.parametrize("name", ["quantize", "build_engine", "SamplingParams"])
def test_naming_a_function_does_not_import_torch(name: str) -> None:
    assert not imported_by(f"from vila_deploy import {name}") & {"torch", "onnxruntime"}


@pytest.mark.parametrize(
    "first", ["from vila_deploy import quantize", "import vila_deploy.quantize.options"]
)
def test_quantize_is_a_function_whatever_is_imported_first(first: str) -> None:
    """The package of that name is there too."""
    code = (
        f"{first}\nimport vila_deploy\nfrom vila_deploy import quantize\n"
        "import vila_deploy.quantize.options as options\n"
        "assert callable(quantize) and vila_deploy.quantize is quantize and options.ALGORITHMS"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_all_lists_what_is_there() -> None:
    assert set(vila_deploy.__all__) <= set(dir(vila_deploy))
    for name in vila_deploy.__all__:
        assert getattr(vila_deploy, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = vila_deploy.nothing
