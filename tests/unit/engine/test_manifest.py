"""Manifests and targets: what is written is read back, and nothing altered is accepted."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.old_engines import old_engine
from tests.support.tiny import make_checkpoint
from vila_deploy.checkpoint.config import load_config
from vila_deploy.engine.local_target import target_name
from vila_deploy.engine.manifest import (
    CHECKSUM,
    Limits,
    Manifest,
    PendingStep,
    load_manifest,
    unlisted_files,
    write_manifest,
)
from vila_deploy.engine.model_info import ModelInfo
from vila_deploy.engine.target import get_target, load_targets
from vila_deploy.processing.tokenizer import load_tokenizer
from vila_deploy.runtime.open_engine import open_engine
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.files import canonical_json


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    return Manifest(
        name="tiny",
        target="cpu",
        backend="onnxruntime",
        precision="int4",
        weights="trained",
        weight_bytes_per_token=1 << 40,
        checkpoint_fingerprint="ab" * 32,
        limits=Limits(1, 128, 256),
        model=ModelInfo.from_config(load_config(checkpoint), load_tokenizer(checkpoint / "llm")),
        versions={"onnxruntime": "1.0"},
        activations="int8",
        defaults={"activations": "the fastest"},
    )


@pytest.fixture
def engine(tmp_path: Path, manifest: Manifest) -> Path:
    folder = tmp_path / "engine"
    (folder / "llm").mkdir(parents=True)
    (folder / "llm" / "model.onnx").write_bytes(bytes(range(256)))
    (folder / "empty").touch()
    write_manifest(folder, manifest)
    return folder


def test_round_trip(engine: Path, manifest: Manifest) -> None:
    assert load_manifest(engine) == manifest
    assert manifest.model.stop_token_ids == (2,)


@pytest.mark.parametrize(
    ("backend", "precision", "activations"),
    [("onnxruntime", "int4", "int8x2"), ("onnxruntime", "fp16", None), ("native", "int4", None)],
)
def test_older_manifests_without_activations(
    tmp_path: Path, manifest: Manifest, backend: str, precision: str, activations: str | None
) -> None:
    """Engines for the CPU had two int8 terms; where there is no choice, no key is written."""
    older = replace(manifest, backend=backend, precision=precision, activations=None, defaults={})
    write_manifest(tmp_path, older)
    assert (
        not {"activations", "defaults"}
        & json.loads((tmp_path / "manifest.json").read_text("utf-8")).keys()
    )
    assert load_manifest(tmp_path) == replace(older, activations=activations)


def test_every_byte_of_the_manifest_is_guarded(engine: Path) -> None:
    path = engine / "manifest.json"
    whole = path.read_bytes()
    for position in range(0, len(whole), 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(VilaDeployError, match=r"manifest\.json"):
            load_manifest(engine)
    path.write_bytes(whole + b"\n")
    with pytest.raises(VilaDeployError, match="was altered"):
        load_manifest(engine)


def test_altered_missing_and_foreign_files_are_named(engine: Path, tmp_path: Path) -> None:
    model = engine / "llm" / "model.onnx"
    data = model.read_bytes()
    for altered in (data[:-1] + b"x", data[:-1], data + b"x"):
        model.write_bytes(altered)
        with pytest.raises(VilaDeployError, match=r"llm/model\.onnx"):
            load_manifest(engine)
    model.unlink()
    with pytest.raises(VilaDeployError, match=r"llm/model\.onnx: is missing"):
        load_manifest(engine)
    model.write_bytes(data)
    (engine / "llm" / "more.onnx").touch()
    with pytest.raises(VilaDeployError, match=r"more\.onnx: is not part"):
        load_manifest(engine)


@pytest.mark.parametrize(
    "name",
    [
        ".gitattributes", "README.md", "notes/run-3/answers.txt", ".DS_Store", "llm/.DS_Store",
        "._manifest.json", "llm/._model.onnx", ".git/HEAD", ".cache/huggingface/download/x.lock",
        "llm/.nfs0000001", "Thumbs.db", "llm/Thumbs.db", "LICENSE", "tokenizer/.gitkeep",
        "model.onnx",
    ],
)  # fmt: skip
def test_foreign_files_beside_the_engines_are_no_corruption(
    engine: Path, manifest: Manifest, name: str
) -> None:
    before = (engine / "manifest.json").read_bytes()
    foreign = engine / name
    foreign.parent.mkdir(parents=True, exist_ok=True)
    foreign.write_text("x")
    assert load_manifest(engine) == manifest
    write_manifest(engine, manifest, without=unlisted_files(engine))
    assert (engine / "manifest.json").read_bytes() == before
    model = engine / "llm" / "model.onnx"
    model.write_bytes(model.read_bytes()[::-1])
    with pytest.raises(VilaDeployError, match=r"llm/model\.onnx: was altered"):
        load_manifest(engine)


@pytest.mark.parametrize("name", ["llm/prefill.onnx", "tokenizer/added_tokens.json", "llm/a/b.npy"])
def test_files_that_an_engine_would_read_are_refused(engine: Path, name: str) -> None:
    (engine / name).parent.mkdir(exist_ok=True)
    (engine / name).write_text("{}")
    with pytest.raises(VilaDeployError, match=f"{name}: is not part of this engine"):
        load_manifest(engine)


def test_an_engine_of_links_is_read(engine: Path, manifest: Manifest, tmp_path: Path) -> None:
    (engine / "llm" / "model.onnx").rename(tmp_path / "blob")
    (engine / "llm" / "model.onnx").symlink_to(tmp_path / "blob")
    (tmp_path / "link").symlink_to(engine)
    assert load_manifest(tmp_path / "link") == manifest
    (engine / "llm").rename(tmp_path / "llm")
    (engine / "llm").symlink_to(tmp_path / "llm")
    assert load_manifest(engine) == manifest


def test_other_format_version_and_unfinished_engines_are_refused(
    engine: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(engine / "llm")
    (engine / "manifest.json").unlink()
    step = PendingStep("llm", "compile llm.onnx")
    write_manifest(engine, replace(manifest, pending_steps=(step,)))
    with (
        pytest.raises(VilaDeployError, match=r"compile llm\.onnx.*on the device"),
        open_engine(engine),
    ):
        pass
    monkeypatch.setattr("vila_deploy.engine.manifest.FORMAT_VERSION", 1)
    with pytest.raises(VilaDeployError, match="version 2, this vila-deploy reads 1 to 1"):
        load_manifest(engine)


def test_targets_are_complete() -> None:
    assert {"a100", "rtx4090", "orin", "orin-nano", "h100", "h200", "cpu"} <= load_targets().keys()
    assert get_target("orin").compute_capability == "8.7"
    assert get_target("cpu").memory_bytes is None
    with pytest.raises(VilaDeployError, match="choose from a100"):
        get_target("toaster")


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("A100", "a100"), ("Orin-Nano", "orin-nano"), ("orin_nano", "orin-nano"), ("CPU", "cpu"),
        ("RTX 4090", "rtx4090"), ("ORIN", "orin"), ("orin32gb", "orin-32gb"),
    ],
)  # fmt: skip
def test_targets_are_found_in_any_case(written: str, name: str) -> None:
    assert get_target(written).name == name
    assert target_name(written) == (name, "")


@pytest.mark.parametrize("name", ["", "-", "a10", "a1000", "orin nano 8gb", "авто"])
def test_other_targets_are_unknown(name: str) -> None:
    with pytest.raises(VilaDeployError, match="unknown target"):
        target_name(name)


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("tiny-cpu-int4", []),
        ("tiny-orin-int4", ["vision", "llm"]),
        ("tiny-a100-llm-int4-symmetric", ["vision", "llm"]),
    ],
)
def test_manifests_of_format_version_1_are_read(tmp_path: Path, name: str, ids: list[str]) -> None:
    engine = old_engine(tmp_path / "engine", name)
    content = json.loads((engine / "manifest.json").read_text("utf-8"))
    manifest = load_manifest(engine)
    assert content["format_version"] == 1
    assert [step.title for step in manifest.pending_steps] == content["needs"]
    assert [step.id for step in manifest.pending_steps] == ids
    assert manifest.module_precision.to_json() == content["components"]
    # Written again it is of this version, and means the same.
    write_manifest(engine, manifest)
    assert load_manifest(engine) == manifest
    again = json.loads((engine / "manifest.json").read_text("utf-8"))
    assert again["format_version"] == 2
    assert again["needs"] == [vars(step) for step in manifest.pending_steps]
    assert again.get("activations") == ("int8x2" if name == "tiny-cpu-int4" else None)
    model, old_model = again.pop("model"), content.pop("model")
    assert model.pop("generation") == "vila1.5"
    assert model.pop("video")["num_frames"] == old_model.pop("num_video_frames")
    assert old_model.pop("image_end") == ""
    assert model == old_model
    changed = {"format_version", "manifest_sha256", "needs", "activations"}
    assert {k: v for k, v in again.items() if k not in changed} == {
        k: v for k, v in content.items() if k not in changed
    }


def write_altered(engine: Path, **changes: Any) -> None:
    """Change keys of a manifest, whose checksum is right again."""
    file = engine / "manifest.json"
    content = json.loads(file.read_text("utf-8"))
    content.pop(CHECKSUM)
    content |= changes
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    file.write_text(canonical_json({**content, CHECKSUM: digest}), "utf-8")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("needs", [7]),
        ("needs", {"a": 1}),
        ("needs", "llm"),
        ("needs", [{"id": "llm"}]),
        ("needs", [{"id": "llm", "title": 7}]),
        ("needs", [{"id": "../../home", "title": "delete what lies there"}]),
        ("needs", ["compile the moon"]),
        ("files", []),
        ("files", {"a": 7}),
        ("files", {"a": {"sha256": 7, "size_bytes": 1}}),
        ("files", {"a": {"sha256": "", "size_bytes": -1}}),
        ("files", {"../a": {"sha256": "", "size_bytes": 1}}),
    ],
)
def test_a_manifest_made_by_hand_is_one_line(engine: Path, key: str, value: Any) -> None:
    write_altered(engine, **{key: value})
    with pytest.raises(VilaDeployError, match=f"manifest.json: {key}"):
        load_manifest(engine)
