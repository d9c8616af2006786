"""The choice between an int8 and a float16 vision tower, which is made while building."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.support.tiny import make_checkpoint
from vila_deploy.backends.onnxruntime import build as build_module
from vila_deploy.backends.onnxruntime import vision
from vila_deploy.backends.onnxruntime.backend import OnnxRuntimeBackend
from vila_deploy.builder import build_engine
from vila_deploy.builder.resolve import BuildOptions, resolve_build
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.checkpoint.presets import preset
from vila_deploy.engine.manifest import Manifest, load_manifest
from vila_deploy.engine.precision import DefaultChoice
from vila_deploy.runtime.open_engine import open_engine

default_dtype = OnnxRuntimeBackend.default_dtype


@pytest.fixture(autouse=True)
def int8_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    def choice(self: object, module: str, *_: object) -> DefaultChoice:
        return DefaultChoice("int8", "smaller") if module == "vision" else DefaultChoice("fp16")

    monkeypatch.setattr(OnnxRuntimeBackend, "default_dtype", choice)


def built(folder: Path, vision: str = "auto", **tiny: object) -> Manifest:
    root = make_checkpoint(folder / "checkpoint", quantized=True, **tiny)
    build_engine(root, folder / "engine", "cpu", vision=vision)
    return load_manifest(folder / "engine")


def sizes(folder: Path) -> int:
    return (folder / "engine" / "vision" / "model.data").stat().st_size


def test_int8_is_taken_where_features_stay_close(tmp_path: Path) -> None:
    manifest = built(tmp_path)
    assert manifest.module_precision.vision == "int8"
    assert manifest.defaults["vision"].startswith("changes features by ")
    assert not (tmp_path / "engine" / vision.SCRATCH).exists()
    with open_engine(tmp_path / "engine") as engine:
        pixels = np.zeros((2, 3, 42, 42), np.float32)
        assert np.isfinite(engine.session.encode_images(pixels)).all()


S2: dict[str, object] = {
    "image": 70,
    "scales": 2,
    "root_config": {"s2": True, "s2_scales": "70,140", "s2_max_split_size": 70},
    "preprocessor_config": {"size": {"height": 140, "width": 140}},
}


@pytest.mark.parametrize("tiny", [{}, S2], ids=["one scale", "s2"])
def test_float16_is_taken_where_they_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: dict[str, object]
) -> None:
    monkeypatch.setattr(build_module, "FEATURE_ERROR_BOUND", 1e-6)
    manifest = built(tmp_path / "auto", **tiny)
    assert manifest.module_precision.vision == "fp16"
    assert "int8 would change features by" in manifest.defaults["vision"]
    asked = built(tmp_path / "asked", "int8", **tiny)
    assert asked.module_precision.vision == "int8"
    assert "vision" not in asked.defaults
    assert sizes(tmp_path / "asked") < sizes(tmp_path / "auto")


def test_without_memory_to_check_it_float16_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vision, "available_memory_bytes", lambda: 1000)
    manifest = built(tmp_path / "auto")
    assert manifest.module_precision.vision == "fp16"
    assert "too little memory" in manifest.defaults["vision"]
    assert built(tmp_path / "asked", "int8").module_precision.vision == "int8"


def test_random_weights_are_not_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer of a check would mean nothing, and it takes longer than all else of a build."""
    monkeypatch.setattr(build_module, "write_vision", lambda *_: pytest.fail("was checked"))
    root = make_checkpoint(tmp_path / "checkpoint", quantized=True)
    build = resolve_build(root, BuildOptions("cpu"))
    checkpoint, folder = build.checkpoint, tmp_path / "engine"
    folder.mkdir()
    request = replace(build.request, random_weights=True)
    built_here = build_module.build(folder, build.config, checkpoint.weights, request)
    assert built_here.chosen["vision"].value == "int8"
    assert "was not measured" in built_here.chosen["vision"].reason


def test_int8_is_the_default_of_towers_that_it_makes_faster(tmp_path: Path) -> None:
    small = open_checkpoint(make_checkpoint(tmp_path / "small")).config
    choice = default_dtype(OnnxRuntimeBackend(), "vision", small, "int4")
    assert choice.value == "fp16"
    assert "so small a tower" in choice.reason
    large = preset("VILA1.5-3b", "int4")
    assert default_dtype(OnnxRuntimeBackend(), "vision", large, "int4").value == "int8"
