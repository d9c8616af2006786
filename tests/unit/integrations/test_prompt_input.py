"""What vLLM and SGLang are given of a chat: tokens, places and pixels, without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.openai_messages import as_openai
from tests.support.tiny import flatten, make_checkpoint
from tests.support.vllm_cases import CASES, picture, questions
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.integrations import served_model
from vila_deploy.integrations.places import PLACE_MARKER, largest_place, with_places
from vila_deploy.integrations.prompt_input import PromptInput, plain_messages
from vila_deploy.integrations.served_model import ServedModel, read_served_model
from vila_deploy.model.vila import ReferenceSession
from vila_deploy.processing.images import place_features
from vila_deploy.runtime.prompt import prepare_prompt
from vila_deploy.utils.errors import VilaDeployError


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def served(case: str, tmp_path: Path) -> ServedModel:
    return read_served_model(make_checkpoint(tmp_path / "c", **CASES[case]))


def test_places_have_the_tokens_and_features_of_our_own_prompt(
    case: str, served: ServedModel
) -> None:
    session = ReferenceSession(open_checkpoint(served.layout.root, served.config))
    for messages in questions(case):
        prompt = prepare_prompt(messages, served.info, served.tokenizer)
        ids, places = with_places(prompt)
        assert ids.count(PLACE_MARKER) == len(places)
        assert len(ids) - len(places) + sum(place.tokens for place in places) == len(prompt)
        expected = [
            features
            for image in prompt.images
            for features in place_features(
                session.encode_images(image.pixels.tiles, image.pixels.grid), image.pixels
            )
        ]
        assert len(expected) == len(places)
        for place, features in zip(places, expected, strict=True):
            encoded = session.encode_images(place.pixels.tiles, place.pixels.grid)
            (found,) = place_features(encoded, place.pixels)
            assert found.shape[0] == place.tokens
            np.testing.assert_allclose(found, features, atol=1e-5)


def test_the_largest_place_is_no_smaller_than_any(case: str, served: ServedModel) -> None:
    largest = largest_place(served.info)
    for messages in questions(case):
        _, places = with_places(prepare_prompt(messages, served.info, served.tokenizer))
        for place in places:
            assert place.tokens <= largest.tokens


def test_a_chat_becomes_the_prompt_of_vila_serve(case: str, served: ServedModel) -> None:
    maker = PromptInput(served, 2048, max_images=16)
    for messages in questions(case):
        expected = with_places(prepare_prompt(messages, served.info, served.tokenizer))
        ids, places = maker.chat(as_openai(messages))
        assert ids == expected[0]
        assert [place.key for place in places] == [place.key for place in expected[1]]
    maker.close()


def test_equal_keys_mean_equal_pixels(tmp_path: Path) -> None:
    """Of tiles one, alone and among others: vLLM keeps features under their key."""
    served = read_served_model(make_checkpoint(tmp_path / "c", **CASES["NVILA-Lite: tiles"]))
    image, other = picture(0, (300, 90)), picture(1, (300, 90))
    seen: dict[str, np.ndarray] = {}
    for images in ([image], [image, other], [other], [other, image, image]):
        messages = questions("")[0][0].__class__("user", (*images, "what"))
        _, places = with_places(prepare_prompt([messages], served.info, served.tokenizer))
        for place in places:
            known = seen.setdefault(place.key, place.pixels.tiles)
            assert np.array_equal(known, place.pixels.tiles)
    assert len(seen) > 4, "tiles of both, and each whole"


IMAGE = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/a.png"}}
REFUSED: dict[str, tuple[Any, str]] = {
    "a placeholder in the text": ("what is <image> here", "holds <image>"),
    "VILA's name for a video": ("<vila/video> what", "holds <vila/video>"),
    "an address": ([IMAGE, {"type": "text", "text": "x"}], "fetches no images"),
    "a file": (
        [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}], "no data: URI",
    ),
    "an unknown kind of part": ([{"type": "input_audio", "input_audio": {}}], "content"),
    "too many images": (as_openai(questions("")[2])[0]["content"] * 2, "at most 3"),
    "no image": (
        [{"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}}],
        "not an image",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path) -> None:
    maker = PromptInput(read_served_model(make_checkpoint(tmp_path / "c")), 512, max_images=3)
    content, message = REFUSED[name]
    with pytest.raises(VilaDeployError, match=message):
        maker.chat([{"role": "user", "content": content}])
    maker.close()


def test_lists_that_can_be_read_once(tmp_path: Path) -> None:
    messages = as_openai(questions("")[2])
    once = [{**message, "content": iter(message["content"])} for message in messages]
    assert plain_messages(once) == messages


def test_bare_text(tmp_path: Path) -> None:
    served = read_served_model(make_checkpoint(tmp_path / "c"))
    maker = PromptInput(served, 512, max_images=3)
    assert maker.text("the") == served.tokenizer.bos_ids + served.tokenizer.encode("the")
    with pytest.raises(VilaDeployError, match="holds <image>"):
        maker.text("the <image>")
    maker.close()


def test_where_the_weights_lie(tmp_path: Path) -> None:
    folders = make_checkpoint(tmp_path / "three")
    assert read_served_model(folders).weight_pattern == "llm/*.safetensors"
    (file,) = (folders / "llm").glob("*.safetensors")
    file.rename(file.with_name("pytorch_model.bin"))
    with pytest.raises(VilaDeployError, match=r"pytorch_model.bin is a pickle.* is never read"):
        _ = read_served_model(folders).weight_pattern
    (folders / "llm" / "pytorch_model.bin").rename(folders / "llm" / "ggml-model-Q8_0.gguf")
    with pytest.raises(VilaDeployError, match="holds the LLM as GGUF"):
        _ = read_served_model(folders).weight_pattern
    (folders / "llm" / "ggml-model-Q8_0.gguf").unlink()
    with pytest.raises(VilaDeployError, match=r"model\.safetensors: is missing"):
        _ = read_served_model(folders).weight_pattern
    tower = "openai/clip-vit-large-patch14-336"
    one = make_checkpoint(tmp_path / "one", projector="linear", root_config={
        "mm_hidden_size": 1024, "mm_vision_select_feature": "patch",
    })  # fmt: skip
    assert read_served_model(flatten(one, tower)).weight_pattern == "*.safetensors"


def test_a_format_that_vllm_does_not_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_checkpoint(tmp_path / "c", quantized=True)
    assert read_served_model(root).quantization is not None
    monkeypatch.setattr(served_model, "READABLE", ("compressed-tensors",))
    with pytest.raises(VilaDeployError, match="AutoAWQ GEMM, which vLLM doesn't read"):
        read_served_model(root)
