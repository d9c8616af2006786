"""The vision tower in int8: kept small, and computing what the dequantized weights compute."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from tests.support import native_cases
from tests.support.module_precision_cases import rounded as rounded_to
from tests.support.paths import TINY_VILA
from tests.support.plans import plan_engine
from tests.support.tiny import make_checkpoint
from vila_deploy.backends.native import build as build_module
from vila_deploy.backends.native import files, open_session
from vila_deploy.backends.native.memory import EMBEDDINGS, VISION
from vila_deploy.backends.native.tower import Int8Linear, load_encoder, tower_tensors
from vila_deploy.builder.memory_plan import EnginePlan
from vila_deploy.builder.smoothed_tower import smoothed_tower
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.checkpoint.presets import preset
from vila_deploy.checkpoint.tensor_schema import tower_tensor_specs
from vila_deploy.cli.build_engine import main
from vila_deploy.engine.manifest import Limits, load_manifest
from vila_deploy.engine.memory import MemoryRow
from vila_deploy.engine.precision import ModulePrecision
from vila_deploy.engine.target import get_target
from vila_deploy.formats.module_dtypes import is_tower_linear
from vila_deploy.model.vision import VisionEncoder

INT8 = ModulePrecision(vision="int8")


@dataclass(frozen=True)
class Changed:
    """A WeightSource with other tensors under some names."""

    source: Any
    other: Mapping[str, torch.Tensor]

    def tensor(self, name: str) -> torch.Tensor:
        return self.other[name] if name in self.other else self.source.tensor(name)

    def linear(self, prefix: str) -> Any:
        return self.tensor(f"{prefix}.weight")


def dequantized(checkpoint: Any) -> Changed:
    """The tower with its layers' matrices rounded by the test's own arithmetic."""
    tensors = {t.name: t.shape for t in tower_tensor_specs(checkpoint.config)}
    matrices = [name for name, shape in tensors.items() if is_tower_linear(name, shape)]
    assert len(matrices) >= 4
    other = {
        name: torch.from_numpy(rounded_to(checkpoint.vision.tensor(name), "int8", 127)).float()
        for name in matrices
    }
    return Changed(checkpoint.vision, other)


def pixels_of(checkpoint: Any, tiles: int = 2) -> np.ndarray:
    size = checkpoint.config.vision.image_size
    return np.random.default_rng(0).standard_normal((tiles, 3, size, size), np.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tower", ["siglip", "clip", "internvit"])
def test_output_is_bit_for_bit_that_of_the_dequantized_weights(
    tmp_path: Path, tower: str, dtype: torch.dtype
) -> None:
    size = {"image": 56} if tower == "internvit" else {}
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "c", tower=tower, **size))
    config, projector = checkpoint.config, checkpoint.projector
    kept = dict(tower_tensors(config, checkpoint.vision, projector, "int8"))
    pixels = torch.from_numpy(pixels_of(checkpoint)).to(dtype)
    found = load_encoder(kept, config, dtype)(pixels)
    expected = VisionEncoder(config, dequantized(checkpoint), projector, dtype)(pixels)
    assert torch.equal(found, expected)
    plain = VisionEncoder(config, checkpoint.vision, projector, dtype)(pixels)
    assert not torch.equal(found, plain)


def test_engine_keeps_int8_in_file_and_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole on the device, and streamed from the host's memory: the same bits."""
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "c", layers=1, vision_layers=5))
    card, features = replace(get_target("h100"), memory_bytes=1), []
    for name, target in (("all", None), ("few", card)):
        manifest = native_cases.built(
            tmp_path / name, checkpoint, monkeypatch, 24, INT8, target=target
        )
        session = open_session(tmp_path / name, manifest).sequence
        layers = session._vision.tower.encoder.layers
        small = [module for module in layers.modules() if isinstance(module, Int8Linear)]
        assert len(small) == 6 * len(layers)
        assert all(module.q.dtype == torch.int8 for module in small)
        assert not any(isinstance(module, torch.nn.Linear) for module in layers.modules())
        hooks = {len(layer._forward_pre_hooks) for layer in layers}
        assert hooks == {int(target is not None)}
        features.append(session.encode_images(pixels_of(checkpoint)))
    assert np.array_equal(*features)
    # The file is what the plan says of the tower, and the projector in float16.
    stored = load_file(tmp_path / "all" / files.VISION)
    plan = plan_engine(
        checkpoint.config, get_target("h100"), "native", "fp16", Limits(1, 24, 24), INT8
    )
    sizes = {part.name: part.bytes for part in plan.items.values()}
    held = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    assert abs(held - sizes["vision tower"] - sizes["projector"]) <= 1


def test_command_builds_and_measures_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tiny-vila, on one image; graphs with the same rounded tower measure it."""
    from PIL import Image

    monkeypatch.setattr(build_module, "compile_engine", lambda *_: [])
    Image.radial_gradient("L").convert("RGB").save(tmp_path / "red.png")
    row = {"text": "What is this?", "answer": "A red circle.", "image": "red.png"}
    (tmp_path / "one.jsonl").write_text(json.dumps(row), "utf-8")
    arguments = [
        str(TINY_VILA), "--target", "h100", "--max-seq-len", "128", "--vision", "int8",
        "-o", str(tmp_path / "engine"), "--eval", str(tmp_path / "one.jsonl"),
    ]  # fmt: skip
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    manifest = load_manifest(tmp_path / "engine")
    assert (manifest.backend, manifest.module_precision) == ("native", INT8)
    assert manifest.accuracy_impact is not None
    assert manifest.accuracy_impact["images"] == 1
    assert 0 < manifest.accuracy_impact["kl_mean"] < 0.01
    checkpoint = open_checkpoint(TINY_VILA)
    pixels = pixels_of(checkpoint, 1)
    found = open_session(tmp_path / "engine", manifest).encode_images(pixels)
    parts = checkpoint.config, checkpoint.vision, checkpoint.projector
    tower = SimpleNamespace(config=parts[0], vision=smoothed_tower(*parts, tmp_path))
    source = dequantized(tower)
    specs = tower_tensor_specs(checkpoint.config)
    others = {t.name: source.tensor(t.name) for t in specs if t.name not in source.other}
    stored = {name: tensor.half().float() for name, tensor in others.items()}
    expected = VisionEncoder(parts[0], Changed(source, stored), checkpoint.projector)
    assert np.array_equal(found, expected(torch.from_numpy(pixels)).numpy())


@pytest.mark.parametrize(
    "flags", [["--kv-cache", "int8"], ["--lm-head", "int8", "--vision", "int8"]]
)
def test_what_only_this_backend_keeps_so_is_not_measured(tmp_path: Path, flags: list[str]) -> None:
    arguments = [
        str(TINY_VILA), "--target", "h100", "-o", str(tmp_path / "engine"),
        "--eval", "shipped", *flags,
    ]  # fmt: skip
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 1
    assert f"no other has its {flags[0]} int8" in done.output
    assert done.output.count("\n") == 1


def planned(vision: str) -> EnginePlan:
    module_precision = ModulePrecision(vision=vision, lm_head="int4")
    card, limits = get_target("rtx4090"), Limits(1, 2048, 2048)
    return plan_engine(
        preset("VILA1.5-40b", "int4"), card, "native", "int4", limits, module_precision
    )


def tensor_bytes(shape: tuple[int, ...], *, small: bool) -> int:
    """float16, or int8 with a float16 for each output."""
    return math.prod(shape) + 2 * shape[0] if small else 2 * math.prod(shape)


def test_plan_of_40b_on_24_gb_says_what_it_saves() -> None:
    plain, small = planned("fp16"), planned("int8")
    assert small.in_host_memory == plain.in_host_memory == (EMBEDDINGS, VISION)
    tensors = [(t.name, t.shape) for t in tower_tensor_specs(preset("VILA1.5-40b", "int4"))]
    for plan in (plain, small):
        held = 0
        for name, shape in tensors:
            matrix = ".layers." in name and len(shape) == 2
            times = (2 if ".layers.0." in name else 0) if ".layers." in name else 1
            held += times * tensor_bytes(shape, small=matrix and plan is small)
        assert plan.items[MemoryRow.VISION].bytes == held
    assert small.device_bytes < plain.device_bytes
    crossing = [
        float(plan.steps[-1].name.split("; ")[1].split(" GB")[0]) for plan in (plain, small)
    ]
    assert crossing == [11.1, 5.5]
    assert plain.steps[-1].memory_bytes - small.steps[-1].memory_bytes == pytest.approx(
        5.53e9, 0.01
    )
