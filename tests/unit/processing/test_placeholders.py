"""Placeholders in questions: each takes the next image or video, in the order written."""

from __future__ import annotations

import pytest
from PIL import Image

from vila_deploy.processing.placeholders import Media, bind_placeholders
from vila_deploy.utils.errors import VilaDeployError


def picture(number: int) -> Image.Image:
    return Image.new("L", (1, 1), number)


def bound(question: str, media: list[Media], image_end: str = "") -> tuple[str, list[int]]:
    text, images = bind_placeholders(question, media, image_end)
    return text, [image.getpixel((0, 0)) for image in images]


ONE, TWO = picture(1), picture(2)
CLIP, SHORT = [picture(10), picture(11)], [picture(20)]


@pytest.mark.parametrize(
    ("question", "media", "text", "order"),
    [
        ("What?", [ONE, TWO], "<image>\n<image>\nWhat?", [1, 2]),
        ("<image>\nWhat?", [ONE], "<image>\nWhat?", [1]),
        ("<image-placeholder>\nWhat?", [ONE], "<image>\nWhat?", [1]),
        ("a <image> b <image-placeholder> c", [ONE, TWO], "a <image> b <image> c", [1, 2]),
        ("What?", [CLIP], "<image>\n<image>\nWhat?", [10, 11]),
        ("<video>\nWhat?", [CLIP], "<image>\n<image>\nWhat?", [10, 11]),
        ("<vila/video> What?", [CLIP], "<image>\n<image> What?", [10, 11]),
        ("<image> and <image>?", [CLIP], "<image> and <image>?", [10, 11]),
        ("<image> <image>", [ONE, SHORT], "<image> <image>", [1, 20]),
        ("<video> then <image>", [ONE, CLIP], "<image>\n<image> then <image>", [10, 11, 1]),
        ("<video><image><vila/video>", [ONE, SHORT, CLIP],
         "<image><image><image>\n<image>", [20, 1, 10, 11]),
        ("What?", [CLIP, ONE], "<image>\n<image>\n<image>\nWhat?", [10, 11, 1]),
        ("no media: <img> <images> <Image>", [], "no media: <img> <images> <Image>", []),
    ],
)  # fmt: skip
def test_placeholders_take_what_comes_next(
    question: str, media: list[Media], text: str, order: list[int]
) -> None:
    assert bound(question, media) == (text, order)


def test_frames_need_no_newline_where_one_follows_each_image() -> None:
    assert bound("<video>\nWhat?", [CLIP], "\n") == ("<image><image>\nWhat?", [10, 11])


@pytest.mark.parametrize(
    ("question", "media", "message"),
    [
        ("<image>", [], "1 <image> markers for 0 images"),
        ("<image-placeholder> <image>", [ONE], "2 <image> markers for 1 images"),
        ("<image>", [ONE, TWO], "1 <image> markers for 2 images"),
        ("<video>", [], "0 <image> and 1 <video> markers for 0 images and 0 videos"),
        ("<vila/video>", [ONE], "0 <image> and 1 <video> markers for 1 images and 0 videos"),
        ("<video> <video>", [CLIP], "0 <image> and 2 <video> markers for 0 images and 1 videos"),
        ("<video>", [CLIP, SHORT], "0 <image> and 1 <video> markers for 0 images and 2 videos"),
        ("<video>", [ONE, CLIP], "0 <image> and 1 <video> markers for 1 images and 1 videos"),
        ("<image>", [ONE, CLIP], "1 <image> and 0 <video> markers for 1 images and 1 videos"),
        ("<image> <video>", [CLIP], "1 <image> and 1 <video> markers for 0 images and 1 videos"),
    ],
)
def test_too_many_or_too_few_is_one_line(question: str, media: list[Media], message: str) -> None:
    with pytest.raises(VilaDeployError, match=message) as caught:
        bind_placeholders(question, media)
    assert "\n" not in str(caught.value)
    assert "no marker at all" in str(caught.value)
