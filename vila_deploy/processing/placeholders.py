"""Bind the placeholders in a question to its images and videos."""

from __future__ import annotations

import re
from collections.abc import Sequence

from PIL import Image

from vila_deploy.processing.chat_template import IMAGE_MARKER, with_markers
from vila_deploy.processing.frame_windows import Item
from vila_deploy.utils.errors import VilaDeployError

# What VILA's scripts (llava/constants.py and llava/entry.py) and their users write.
IMAGE_PLACEHOLDERS = (IMAGE_MARKER, "<image-placeholder>")
VIDEO_PLACEHOLDERS = ("<video>", "<vila/video>")
PLACEHOLDER = re.compile("|".join(map(re.escape, (*IMAGE_PLACEHOLDERS, *VIDEO_PLACEHOLDERS))))
Media = Image.Image | Sequence[Item]


def bind_placeholders(
    question: str, media: Sequence[Media], image_end: str = ""
) -> tuple[str, list[Item]]:
    """Return `question` with an image marker for each image, and the images in their order.

    A placeholder takes the next image, or all frames of the next video (or windows of frames).
    Without placeholders the media come first, in the order given; frames may also have an image
    placeholder each.

    Args:
        media: images, and videos as sequences of frames.
        image_end: see ModelInfo; with one, no newline is needed between the frames.

    Raises:
        VilaDeployError: more or fewer placeholders than images and videos.
    """
    images = [item for item in media if isinstance(item, Image.Image)]
    videos = [item for item in media if not isinstance(item, Image.Image)]
    flat = [image for item in media for image in _images(item)]
    names: list[str] = PLACEHOLDER.findall(question)
    video_count = sum(name in VIDEO_PLACEHOLDERS for name in names)
    image_count = len(names) - video_count
    if not names or (image_count == len(flat) and not video_count):
        text = PLACEHOLDER.sub(IMAGE_MARKER, question)
        return with_markers(text, len(flat), image_end), flat
    if (image_count, video_count) != (len(images), len(videos)):
        raise _wrong_count(image_count, video_count, len(images), len(videos))
    next_image, next_video = iter(images), iter(videos)
    ordered: list[Item] = []
    separator = "" if image_end else "\n"

    def fill(match: re.Match[str]) -> str:
        is_video = match.group() in VIDEO_PLACEHOLDERS
        bound = _images(next(next_video) if is_video else next(next_image))
        ordered.extend(bound)
        return separator.join([IMAGE_MARKER] * len(bound))

    return PLACEHOLDER.sub(fill, question), ordered


def check_no_placeholders(text: str) -> None:
    """Raise VilaDeployError if `text` asks for an image or a video.

    For callers whose images come beside the text: there it could only be an attempt at another
    person's image, or at the embedding of a token that was never trained.
    """
    match = PLACEHOLDER.search(text)
    if match is not None:
        raise VilaDeployError(
            f"the text holds {match.group()}, which marks the place of an image",
            fix="leave it out; images take their place among the parts of a message",
        )


def _images(item: Media) -> list[Item]:
    return [item] if isinstance(item, Image.Image) else list(item)


def _wrong_count(image_count: int, video_count: int, images: int, videos: int) -> VilaDeployError:
    placeholders, media = f"{image_count} <image> markers", f"{images} images"
    fix = "give one --image for each marker, or no marker at all"
    if video_count or videos:
        placeholders = f"{image_count} <image> and {video_count} <video> markers"
        media = f"{images} images and {videos} videos"
        fix = "give one --image for each <image>, one --video for each <video>, or no marker at all"
    return VilaDeployError(f"the prompt has {placeholders} for {media}", fix=fix)
