"""The accuracy impact of quantized modules, against the same measured with PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from tests.support.module_precision_cases import Replaced, rounded, with_head
from tests.support.tiny import make_checkpoint
from vila_deploy.builder.accuracy_impact import AccuracyImpact, measure_accuracy_impact
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.cli.build_engine import main
from vila_deploy.data.examples import load_held_out
from vila_deploy.engine.manifest import load_manifest
from vila_deploy.engine.precision import ModulePrecision
from vila_deploy.eval.data import EvaluationData
from vila_deploy.model.towers import VisionTower
from vila_deploy.model.vila import ReferenceSession
from vila_deploy.processing.images import preprocess

TEXT = "The ferry leaves at nine.\n\nNobody had seen the letter that lay under the old clock."


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    (tmp_path / "texts.txt").write_text(TEXT, "utf-8")
    return tmp_path / "texts.txt"


def by_torch(plain: Any, other: Any, checkpoint: Any, texts: Path) -> tuple[float, float]:
    """Mean KL and share of equal argmax over the same predicted places."""
    data = EvaluationData(checkpoint, load_held_out(texts), own=True)
    kl, same = [], []
    for index, embeds in enumerate(data.embeds(checkpoint)):
        chosen = data.predicted(index)
        p, q = (ReferenceSession(each).llm(embeds)[chosen].double() for each in (plain, other))
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        kl.append((log_p.exp() * (log_p - log_q)).sum(-1))
        same.append(p.argmax(-1) == q.argmax(-1))
    return float(torch.cat(kl).mean()), float(torch.cat(same).double().mean())


@pytest.mark.parametrize("dialect", ["onnxruntime", "standard", "primitive"])
def test_head_s_impact_is_what_pytorch_finds(tmp_path: Path, texts: Path, dialect: str) -> None:
    root = make_checkpoint(tmp_path / "c", quantized=True, hidden=192, heads=6, kv_heads=2)
    checkpoint = open_checkpoint(root)
    found = measure_accuracy_impact(
        checkpoint, ModulePrecision(lm_head="int4"), dialect, texts, tmp_path
    )
    kl, same = by_torch(checkpoint, with_head(checkpoint, "int4", 0), checkpoint, texts)
    assert kl > 1e-4
    assert found.kl_mean == pytest.approx(kl, rel=0.02)
    assert found.top1_agreement == pytest.approx(same, abs=0.02)
    assert (found.own_data, found.images) == (True, 0)
    finer = measure_accuracy_impact(
        checkpoint, ModulePrecision(lm_head="int8"), dialect, texts, tmp_path
    )
    assert 0 < finer.kl_mean < found.kl_mean / 20
    assert [path.name for path in tmp_path.glob(".accuracy-*")] == []


def test_tower_s_impact_goes_through_the_llm(tmp_path: Path) -> None:
    """The built-in images; texts do not change."""
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "c"))
    (tmp_path / "one.jsonl").write_text(
        json.dumps({"text": "What is this?", "answer": "A red circle.", "image": "red.png"}),
        "utf-8",
    )
    from PIL import Image

    Image.radial_gradient("L").convert("RGB").save(tmp_path / "red.png")
    data = tmp_path / "one.jsonl"
    found = measure_accuracy_impact(
        checkpoint, ModulePrecision(vision="int8"), "standard", data, tmp_path
    )
    vision: Any = checkpoint.vision
    names = [name for name in vision.names() if ".layers." in name and name.endswith("weight")]
    matrices = {name: vision.tensor(name) for name in names if vision.tensor(name).ndim == 2}
    exact = {n: torch.from_numpy(rounded(m, "int8", 127)).float() for n, m in matrices.items()}
    other = SimpleNamespace(
        config=checkpoint.config,
        llm=checkpoint.llm,
        vision=Replaced(vision, exact),
        projector=checkpoint.projector,
        layout=checkpoint.layout,
    )
    logits = []
    for each in (checkpoint, other):
        held_out: Any = EvaluationData(each, load_held_out(data), own=True)  # type: ignore[arg-type]
        (embeds,) = held_out.embeds(each)
        rows = ReferenceSession(each).llm(embeds)[held_out.predicted(0)]  # type: ignore[arg-type]
        logits.append(rows.double().log_softmax(-1))
    expected = float((logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean())
    assert (found.images, found.tokens) == (1, len(logits[0]))
    # float16 arithmetic of the tower is part of both sides and not of the reference's.
    assert 0.3 * expected < found.kl_mean < 3 * expected
    states = [hidden_states(each, data) for each in (checkpoint, other)]
    errors = [float((b - a).norm() / a.norm()) for a, b in zip(*states, strict=True)]
    assert found.tower_layer_errors == pytest.approx(errors, rel=0.3)
    assert found.image_feature_error is not None
    assert 0.3 * errors[-1] < found.image_feature_error < 3 * errors[-1]


def hidden_states(checkpoint: Any, data: Path) -> list[torch.Tensor]:
    """Behind each layer of the reference's tower, of the first image in `data`."""
    config, found = checkpoint.config, []
    tower = VisionTower(config.vision, config.vision_layers_used, checkpoint.vision)
    for layer in tower.encoder.get_submodule("layers").children():
        layer.register_forward_hook(
            lambda module, given, output: found.append(
                output[0] if isinstance(output, tuple) else output
            )
        )
    (image,) = load_held_out(data)[0].images
    (pixels,) = preprocess([image.load()], config.image, config.tiling, alone=False)
    with torch.inference_mode():
        tower(torch.from_numpy(pixels.tiles[:1]))
    return found


def test_command_writes_it_into_the_manifest(tmp_path: Path, texts: Path) -> None:
    root, out = make_checkpoint(tmp_path / "c", quantized=True), tmp_path / "engine"
    arguments = [str(root), "--target", "cpu", "-o", str(out), "--eval", str(texts)]
    done = CliRunner().invoke(main, [*arguments, "--lm-head", "int4"])
    assert done.exit_code == 0, done.output
    assert "Against fp16 modules and float32 activations: mean KL" in done.stdout
    impact = AccuracyImpact(**dict(load_manifest(out).accuracy_impact or {}))
    assert impact.tokens > 10
    assert 0 < impact.kl_mean <= impact.kl_p99
    assert np.isfinite(impact.kl_p99)
    assert {path.name for path in out.iterdir()} >= {"manifest.json", "llm", "vision"}
    assert not list(out.glob(".accuracy*"))


def test_int8_tower_of_a_cpu_is_measured(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "c", quantized=True))
    asked = ModulePrecision(vision="int8")
    impact = measure_accuracy_impact(checkpoint, asked, "onnxruntime", None, tmp_path)
    assert impact.images > 0
    assert 0 < impact.kl_mean < 1e-2
    assert len(impact.tower_layer_errors) == checkpoint.config.vision_layers_used
    assert all(0 < error < 0.05 for error in impact.tower_layer_errors)


def test_int8_cache_of_a_cpu_is_measured(tmp_path: Path, texts: Path) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "c", quantized=True))
    asked = ModulePrecision(kv_cache="int8")
    impact = measure_accuracy_impact(checkpoint, asked, "onnxruntime", texts, tmp_path)
    assert 0 < impact.kl_mean < 0.1


def test_one_int8_term_is_measured_too(tmp_path: Path, texts: Path) -> None:
    """The whole of activations and head, and not less than the head alone; two terms are exact."""
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "c", quantized=True))
    kl = {
        (head, activations): measure_accuracy_impact(
            checkpoint, ModulePrecision(lm_head=head), "onnxruntime", texts, tmp_path, activations
        ).kl_mean
        for head, activations in (
            ("fp16", "int8"), ("int8", "int8"), ("int8", "int8x2"), ("int8", "fp32"),
        )
    }  # fmt: skip
    assert kl["int8", "int8x2"] == kl["int8", "fp32"] > 0
    assert kl["fp16", "int8"] > 0
    assert kl["int8", "int8"] > max(kl["fp16", "int8"], kl["int8", "fp32"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--target", "cpu"], "nothing to measure"),
        (["--target", "a100", "--backend", "tensorrt-llm"], "nothing to measure"),
    ],
)
def test_what_can_t_be_measured_is_refused_before_any_work(
    tmp_path: Path, flags: list[str], words: str
) -> None:
    root = make_checkpoint(tmp_path / "c")
    done = CliRunner().invoke(
        main, [str(root), "-o", str(tmp_path / "e"), "--eval", "shipped", *flags]
    )
    assert done.exit_code == 1
    assert words in done.output
    assert done.output.count("\n") == 1
