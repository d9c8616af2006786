"""A library that is missing, too old or without the GPU: one line each, before any work."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.commands import assert_one_line, invoke, succeed
from tests.support.tiny import make_checkpoint
from vila_deploy.backends.llamacpp import library


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What seems to be installed: `version`, None for nothing, and `module`."""
    state: dict[str, Any] = {"version": "0.3.36", "module": fake_library(["CPU"])}

    def version(name: str) -> str:
        if name != library.PACKAGE:
            return metadata.version(name)
        if state["version"] is None:
            raise metadata.PackageNotFoundError(name)
        return str(state["version"])

    monkeypatch.setattr(library, "version", version)
    library.load_library.cache_clear()
    monkeypatch.setitem(sys.modules, "llama_cpp", state["module"])
    yield state
    library.load_library.cache_clear()


def fake_library(kinds: list[str], gpus: int = 0) -> Any:
    """A package llama_cpp that was compiled for `kinds` and finds `gpus` of the last kind."""

    class Ggml:
        def __getattr__(self, name: str) -> Any:
            calls = {
                "ggml_backend_reg_count": lambda: len(kinds),
                "ggml_backend_reg_get": lambda index: index,
                "ggml_backend_reg_name": lambda index: kinds[index].encode(),
                "ggml_backend_dev_count": lambda: gpus,
                "ggml_backend_dev_get": lambda index: index,
                "ggml_backend_dev_type": lambda _: 1,
                "ggml_backend_dev_description": lambda _: b"A GPU",
                "ggml_backend_dev_backend_reg": lambda _: len(kinds) - 1,
                "ggml_backend_dev_memory": lambda *_: None,
            }
            return _Callable(calls[name])

    parameters = type(
        "llama_context_params",
        (ctypes.Structure,),
        {"_fields_": [(name, ctypes.c_int) for name in library.CONTEXT_FIELDS]},
    )
    return SimpleNamespace(
        __version__="0.3.36",
        llama_context_params=parameters,
        llama_log_callback=lambda function: function,
        llama_log_set=lambda *_: None,
        llama_backend_init=lambda: None,
        llama_cpp=SimpleNamespace(_lib=Ggml()),
        **{name: None for name in library.FUNCTIONS},
    )


class _Callable:
    """A function whose types can be declared."""

    def __init__(self, function: Any):
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("engines")
    root = make_checkpoint(folder / "c", quantized=True, layers=1)
    for target in ("cpu", "vulkan", "rtx4090"):
        options = ("--target", target, "--backend", "llamacpp", "-o", folder / target)
        succeed("vila-build-engine", root, *options)
    return {target: folder / target for target in ("cpu", "vulkan", "rtx4090")}


def assert_refused(engine: Path, *words: str) -> None:
    line = assert_one_line(invoke("vila-chat", engine, "-p", "Hi"))
    assert all(word in line for word in words), line


def test_missing(installed: dict[str, Any], engines: dict[str, Path]) -> None:
    installed["version"] = None
    assert_refused(engines["cpu"], "needs llama-cpp-python, which is not installed", "pip install")


def test_too_old(
    installed: dict[str, Any], engines: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed["version"] = "0.2.90"
    assert_refused(engines["cpu"], "llama-cpp-python 0.2.90 is too old", "--upgrade")
    # A build of one's own that says a newer version.
    installed["version"] = "0.4"
    module = fake_library(["CPU"])
    del module.llama_memory_seq_cp
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    assert_refused(engines["cpu"], "0.4 is too old")


def test_broken(
    installed: dict[str, Any], engines: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # None makes the import fail.
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    assert_refused(engines["cpu"], "can't be loaded", "install it again")


@pytest.mark.parametrize(
    ("target", "kinds", "words"),
    [
        ("vulkan", ["CPU"], ("compiled for CPU, not for Vulkan", "GGML_VULKAN=on")),
        ("rtx4090", ["CPU", "Vulkan"], ("for CPU, Vulkan, not for CUDA", "GGML_CUDA=on")),
        ("vulkan", ["CPU", "Vulkan"], ("finds no GPU that Vulkan can use",)),
    ],
)
def test_without_the_gpu(
    installed: dict[str, Any],
    engines: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    kinds: list[str],
    words: tuple[str, ...],
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", fake_library(kinds))
    assert_refused(engines[target], f"target {target}", *words)
