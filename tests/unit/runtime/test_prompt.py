"""Messages become prompts: roles, parts in their order, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.tiny import make_checkpoint
from vila_deploy.checkpoint.config import load_config
from vila_deploy.engine.model_info import ModelInfo
from vila_deploy.processing.chat_template import PROMPT_TEMPLATES, render
from vila_deploy.processing.tokenizer import Tokenizer, load_tokenizer
from vila_deploy.runtime.prompt import Message, Part, Prompt, prepare_prompt, prepare_text
from vila_deploy.utils.errors import VilaDeployError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(make_checkpoint(tmp_path_factory.mktemp("prompt") / "c") / "llm")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> ModelInfo:
    root: Path = make_checkpoint(tmp_path_factory.mktemp("model") / "c")
    return ModelInfo.from_config(load_config(root), tokenizer)


def image(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 9, 3), np.uint8))


def user(*content: Part) -> Message:
    return Message("user", content)


def assistant(text: str) -> Message:
    return Message("assistant", (text,))


def text_of(prompt: Prompt, tokenizer: Tokenizer) -> str:
    return "<image>".join(tokenizer.decode(chunk) for chunk in prompt.chunks)


def rendered(tokenizer: Tokenizer, question: str, *turns: tuple[str, str], **system: str) -> str:
    text = render(PROMPT_TEMPLATES["vicuna_v1"], turns, question, **system)
    return "<image>".join(tokenizer.decode(tokenizer.encode(t)) for t in text.split("<image>"))


CAT, DOG = image(1), image(2)


@pytest.mark.parametrize(
    ("content", "question"),
    [
        (("What?",), "What?"),
        ((CAT, "What?"), "<image>\nWhat?"),
        (("What?", CAT), "<image>\nWhat?"),
        ((CAT, DOG, "one", "two"), "<image>\n<image>\none\ntwo"),
        (("one", CAT, "two", DOG), "one<image>\ntwo<image>\n"),
        (("one", [CAT, DOG], "two"), "one<image>\n<image>\ntwo"),
        ((CAT, DOG, "left <image> right <image>"), "left <image> right <image>"),
        ((CAT,), "<image>\n"),
    ],
)
def test_images_take_their_places(
    model: ModelInfo, tokenizer: Tokenizer, content: tuple[Part, ...], question: str
) -> None:
    prompt = prepare_prompt([user(*content)], model, tokenizer)
    assert text_of(prompt, tokenizer) == rendered(tokenizer, question)
    assert len(prompt) == len(prompt.keys) == len(prompt.token_ids) + 4 * question.count("<image>")


def test_turns_and_system_message(model: ModelInfo, tokenizer: Tokenizer) -> None:
    messages = [
        Message("system", ("Be brief.",)),
        user(CAT, "one"),
        assistant("a cat"),
        user("two"),
        user("three"),
    ]
    prompt = prepare_prompt(messages, model, tokenizer)
    expected = rendered(tokenizer, "two\nthree", ("<image>\none", "a cat"), system="Be brief.")
    assert text_of(prompt, tokenizer) == expected
    assert "Be brief. USER:" in expected


def test_keys_tell_images_apart(model: ModelInfo, tokenizer: Tokenizer) -> None:
    def keys(*content: Part) -> tuple[Any, ...]:
        return prepare_prompt([user(*content)], model, tokenizer).keys

    assert keys(CAT, "one") == keys(image(1), "one")
    assert keys(CAT, "one") != keys(DOG, "one")
    assert keys(CAT, DOG, "one") != keys(DOG, CAT, "one")
    places = [key for key in keys(CAT, DOG, "one") if isinstance(key, tuple)]
    assert [index for _, index in places] == [0, 1, 2, 3] * 2
    assert len({digest for digest, _ in places}) == 2


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "the last message is not the user's"),
        ([user("one"), assistant("a")], "the last message is not the user's"),
        ([assistant("a"), user("one")], "role 'assistant' stands where one of role 'user'"),
        (
            [user("one"), Message("system", ("Be brief.",)), user("two")],
            "role 'system' stands where one of role 'assistant'",
        ),
        ([Message("system", (CAT,)), user("one")], "role 'system' holds an image"),
        ([Message("system", ("<image>",)), user("one")], "the text holds <image>"),
        ([user("<ima", "ge> \udcff")], "not valid UTF-8"),
        ([user("<image> what?")], "1 <image> markers for 0 images"),
        ([user(CAT, "<image> <image>")], "2 <image> markers for 1 images"),
    ],
)
def test_what_no_template_has_is_one_line(
    model: ModelInfo, tokenizer: Tokenizer, messages: list[Message], message: str
) -> None:
    with pytest.raises(VilaDeployError, match=message):
        prepare_prompt(messages, model, tokenizer)


@pytest.mark.parametrize("text", ["<image>", "a <video> b", "<image-placeholder>", "<vila/video>"])
def test_placeholders_can_be_refused(model: ModelInfo, tokenizer: Tokenizer, text: str) -> None:
    for content in ((CAT, text), (text,), ("one", CAT, text)):
        with pytest.raises(VilaDeployError, match="which marks the place of an image"):
            prepare_prompt([user(*content)], model, tokenizer, placeholders="refuse")
    with pytest.raises(VilaDeployError, match="which marks the place of an image"):
        prepare_text(text, tokenizer)


def test_a_marker_in_an_answer_asks_for_no_image(model: ModelInfo, tokenizer: Tokenizer) -> None:
    """Not even one that removing another makes."""
    messages = [user("one"), assistant("see <ima<image>ge> here"), user("two")]
    for rule in ("bind", "refuse"):
        prompt = prepare_prompt(messages, model, tokenizer, rule)  # type: ignore[arg-type]
        assert text_of(prompt, tokenizer) == rendered(tokenizer, "two", ("one", "see  here"))


def test_bare_text_has_no_template(tokenizer: Tokenizer) -> None:
    prompt = prepare_text("the rain", tokenizer)
    assert list(prompt.token_ids) == tokenizer.bos_ids + tokenizer.encode("the rain")
    assert not prompt.strip
