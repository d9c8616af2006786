"""The first generation's flat layout: the same model as three folders, and what it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.support.first_generation import FIELDS, make_first_generation, shrink_clip
from tests.support.tiny import make_checkpoint
from vila_deploy.builder.build import build_engine
from vila_deploy.builder.resolve import BuildOptions
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.engine.precision import ALL_FP16
from vila_deploy.engine.sampling import SamplingParams
from vila_deploy.engine.session import OneSlot
from vila_deploy.formats.base import QuantScheme
from vila_deploy.model.vila import ReferenceSession
from vila_deploy.quantize.options import QuantizeOptions
from vila_deploy.quantize.pipeline import quantize
from vila_deploy.runtime.conversation import Conversation
from vila_deploy.runtime.open_engine import open_engine
from vila_deploy.utils.errors import VilaDeployError


@pytest.fixture(autouse=True)
def small_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_clip(monkeypatch)


def pixels() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((1, 3, 70, 70), np.float32)


def test_it_is_the_same_model(tmp_path: Path) -> None:
    whole = open_checkpoint(make_checkpoint(tmp_path / "three", **FIELDS))
    flat = open_checkpoint(make_first_generation(tmp_path / "flat"))
    assert flat.config == whole.config
    expected = ReferenceSession(whole)
    found = ReferenceSession(flat)
    features = found.encode_images(pixels())
    np.testing.assert_array_equal(features, expected.encode_images(pixels()))
    embeds = np.concatenate([found.embed_tokens([1, 5]), features[0], found.embed_tokens([9])])
    np.testing.assert_array_equal(found.prefill(embeds), expected.prefill(embeds))


@pytest.mark.parametrize("algorithm", ["rtn", "awq"])
def test_quantized_it_has_three_folders_and_answers(algorithm: str, tmp_path: Path) -> None:
    root = make_first_generation(tmp_path / "flat")
    texts = tmp_path / "texts.txt"
    texts.write_text("the king saw the red house on the hill.\n\n" * 8, "utf-8")
    quantize(root, tmp_path / "q", QuantizeOptions(QuantScheme(64), algorithm, texts))
    config = json.loads((tmp_path / "q" / "llm" / "config.json").read_text())
    assert not [key for key in config if key.startswith("mm_")]
    with safe_open(tmp_path / "q" / "vision_tower" / "model.safetensors", "pt") as file:
        assert "vision_model.pre_layrnorm.weight" in file.keys()  # noqa: SIM118  not a dict
    # One int8 term, an int8 head and tower round what the reference doesn't.
    options = BuildOptions("cpu", module_precision=ALL_FP16, activations="int8x2")
    build_engine(tmp_path / "q", tmp_path / "e", options)
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (30, 50, 3), np.uint8))
    with open_engine(tmp_path / "e") as engine:
        reference = OneSlot(ReferenceSession(open_checkpoint(tmp_path / "q")))
        tokens = []
        for session in (engine.session, reference):
            assert engine.tokenizer is not None
            chat = Conversation(session, engine.tokenizer, engine.model, engine.max_input_len)
            tokens.append(chat.ask("What?", [image], SamplingParams(16)).tokens)
    assert tokens[0] == tokens[1]


def test_fp16_engine_from_one_folder(tmp_path: Path) -> None:
    root = make_first_generation(tmp_path / "flat")
    manifest = build_engine(root, tmp_path / "e", BuildOptions("cpu"))
    assert manifest.model.image.mode == "pad"
    assert manifest.model.max_tokens_per_image == 25


def change(key: str, value: Any) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        file = root / "config.json"
        values = json.loads(file.read_text("utf-8"))
        values[key] = value
        file.write_text(json.dumps({k: v for k, v in values.items() if v is not None}), "utf-8")

    return apply


def without_tower(root: Path) -> None:
    for file in root.glob("*.safetensors"):
        save_file({n: t for n, t in load_file(file).items() if "vision_tower" not in n}, file)
    index = root / "model.safetensors.index.json"
    values = json.loads(index.read_text("utf-8"))
    kept = {n: f for n, f in values["weight_map"].items() if "vision_tower" not in n}
    values["weight_map"] = kept
    index.write_text(json.dumps(values), "utf-8")


def no_weights(root: Path) -> None:
    for file in root.glob("*.safetensors*"):
        file.unlink()
    (root / "vila-7b-w4-g128-v2.pt").write_bytes(b"")


CASES: dict[str, tuple[Callable[[Path], None], str]] = {
    "tower unknown": (
        change("mm_vision_tower", "openai/clip-vit-base-patch32"),
        r"mm_vision_tower: unknown vision tower 'openai/clip-vit-base-patch32'; .*patch14-336",
    ),
    "tower no name": (change("mm_vision_tower", 336), r"mm_vision_tower: must be a string"),
    "projector unknown": (change("mm_projector_type", "mlp3x_gelu"), r"unknown projector 'mlp3x"),
    "projector another": (change("mm_projector_type", "linear"), r"tensor layers\.weight is miss"),
    "no heads": (change("num_attention_heads", 0), r"num_attention_heads: must be an integer"),
    "no vocabulary": (change("vocab_size", None), r"vocab_size: is missing"),
    "width of another tower": (change("mm_hidden_size", 1024), r"mm_hidden_size: 1024 differs"),
    "class token kept": (
        change("mm_vision_select_feature", "cls_patch"), r"mm_vision_select_feature: 'cls_patch'",
    ),
    "markers": (change("mm_use_im_start_end", True), r"mm_use_im_start_end: markers"),
    "no tower": (without_tower, r"tensor vision_model\.\S+ is missing"),
    "4-bit pickle": (no_weights, r"model\.safetensors: is missing, .*download the whole"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_flat_refuses(case: str, tmp_path: Path) -> None:
    damage, message = CASES[case]
    root = make_first_generation(tmp_path / "c")
    damage(root)
    with pytest.raises(VilaDeployError) as caught:
        open_checkpoint(root)
    assert re.search(message, str(caught.value))
    assert "\n" not in str(caught.value)
