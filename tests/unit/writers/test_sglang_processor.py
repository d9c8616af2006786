"""The processor, config and chat template beside a checkpoint for SGLang, against our own."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoConfig, AutoTokenizer, Qwen2Config, SiglipVisionConfig

from tests.support.sglang_cases import LITE, S2, make_nvila
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.engine.model_info import ModelInfo
from vila_deploy.processing.tokenizer import load_tokenizer
from vila_deploy.runtime.prompt import Message, Part, Prompt, prepare_prompt
from vila_deploy.writers.convert import convert
from vila_deploy.writers.sglang_code.processing_vila import NVILAProcessor

CASES = {"lite": LITE, "s2": S2}
# Width and height in tiles: 1, 2 and 6 tiles, 7 in one column, and all of several images.
SHAPES = {
    "one": [(1, 1)],
    "two": [(2, 1)],
    "six": [(3, 2)],
    "column": [(1, 7)],
    "several": [(1, 1), (2, 1)],
    "none": [],
}


@pytest.fixture(scope="module", params=CASES)
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    make_nvila(folder / "three", **CASES[request.param])
    convert(folder / "three", folder / "one", ["sglang"])
    return folder


@pytest.fixture(scope="module")
def processor(folders: Path) -> NVILAProcessor:
    return NVILAProcessor.from_pretrained(str(folders / "one"))


def model_of(folders: Path) -> ModelInfo:
    config = open_checkpoint(folders / "three").config
    return ModelInfo.from_config(config, load_tokenizer(folders / "three" / "llm"))


def ours(folders: Path, content: tuple[Part, ...]) -> Prompt:
    tokenizer = load_tokenizer(folders / "three" / "llm")
    return prepare_prompt([Message("user", content)], model_of(folders), tokenizer)


def filled(prompt: Prompt, image: int) -> list[int]:
    """Token ids with `image` in the places of images."""
    ids = list(prompt.chunks[0])
    counts = [count for each in prompt.images for count in each.token_counts]
    for count, chunk in zip(counts, prompt.chunks[1:], strict=True):
        ids += [image] * count + list(chunk)
    return ids


def pixels_of(prompt: Prompt) -> NDArray[np.float32]:
    return np.concatenate([image.pixels.tiles for image in prompt.images])


def theirs(processor: NVILAProcessor, content: list[dict[str, Any]], **media: Any) -> Any:
    text = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False
    )
    return processor(text=[text], padding=True, **media)


@pytest.mark.parametrize("shape", SHAPES)
def test_prompts_and_pixels_are_ours(folders: Path, processor: Any, shape: str) -> None:
    tile, random = model_of(folders).tiling.tile, np.random.default_rng(0)
    images = [
        Image.fromarray(random.integers(0, 255, (h * tile + 1, w * tile + 3, 3), dtype=np.uint8))
        for w, h in SHAPES[shape]
    ]
    question = "What is\n\nit?\n"
    expected = ours(folders, (question, *images))
    parts = [{"type": "text", "text": question}, *({"type": "image"} for _ in images)]
    found = theirs(processor, parts, images=images)
    assert found["input_ids"].tolist() == [filled(expected, processor.image_token_id)]
    if images:
        np.testing.assert_array_equal(found["pixel_values"].numpy(), pixels_of(expected))
    grids = [image.pixels.grid for image in expected.images if image.pixels.grid]
    assert found.get("block_sizes", []) == grids


def test_images_between_texts_stay_there(folders: Path, processor: Any) -> None:
    images = [Image.new("RGB", (30, 20), color) for color in ("red", "blue")]
    content = ("First", images[0], "then", "and", images[1], "?")
    parts = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
        for part in content
    ]
    expected = filled(ours(folders, content), processor.image_token_id)
    assert theirs(processor, parts, images=images)["input_ids"].tolist() == [expected]


def test_frames_of_a_video(folders: Path, processor: Any) -> None:
    frames = [Image.new("RGB", (50, 40), (25 * index, 0, 0)) for index in range(10)]
    chosen = [frames[round(index)] for index in np.linspace(0, 9, 8)]
    expected = ours(folders, (chosen, "What happens?"))
    parts = [{"type": "video"}, {"type": "text", "text": "What happens?"}]
    arrays = [np.asarray(frame) for frame in frames]
    found = theirs(processor, parts, videos=[arrays], do_sample_frames=True, num_frames=8)
    assert found["input_ids"].tolist() == [filled(expected, processor.video_token_id)]
    np.testing.assert_array_equal(found["pixel_values_videos"].numpy(), pixels_of(expected))


def test_a_wrong_number_of_markers_is_refused(processor: Any) -> None:
    with pytest.raises(ValueError, match="has 2 <image> and 0 <vila/video> for 0 images"):
        processor(text="<image> <image>")


def test_a_conversation_is_rendered_as_ours(folders: Path, processor: Any) -> None:
    messages = [Message("system", ("Be brief.",)), Message("user", ("Hi",))]
    messages += [Message("assistant", ("Hello",)), Message("user", ("Bye",))]
    tokenizer = load_tokenizer(folders / "three" / "llm")
    expected = prepare_prompt(messages, model_of(folders), tokenizer)
    rows = [{"role": m.role, "content": m.content[0]} for m in messages]
    text = processor.tokenizer.apply_chat_template(rows, tokenize=False)
    assert processor.tokenizer.encode(text, add_special_tokens=False) == list(expected.token_ids)


def test_transformers_loads_the_folder(folders: Path) -> None:
    config = AutoConfig.from_pretrained(folders / "one", trust_remote_code=True)
    written = json.loads((folders / "one" / "config.json").read_text())
    assert type(config).__name__ == written["auto_map"]["AutoConfig"].partition(".")[2]
    assert isinstance(config.text_config, Qwen2Config)
    assert isinstance(config.vision_config, SiglipVisionConfig)
    assert config.vision_config.hidden_size == 1152
    tokenizer = AutoTokenizer.from_pretrained(folders / "one", trust_remote_code=True)
    for name in ("image_token", "video_token"):
        token = getattr(tokenizer, name)
        assert tokenizer.convert_tokens_to_ids(token) == getattr(config, f"{name}_id")


def test_code_beside_a_checkpoint_needs_nothing_of_ours(folders: Path) -> None:
    files = sorted((folders / "one").glob("*.py"))
    assert [file.name for file in files] == ["configuration_vila.py", "processing_vila.py"]
    for file in files:
        nodes = list(ast.walk(ast.parse(file.read_text())))
        imported = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        imported |= {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names}
        assert not [name for name in imported if name and name.startswith("vila")]


def test_code_of_the_folder_is_kept(folders: Path, tmp_path: Path) -> None:
    convert(folders / "one", tmp_path / "again", ["sglang"])
    for file in (folders / "one").iterdir():
        if file.name != "SHA256SUMS":
            assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name
