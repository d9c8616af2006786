"""What takes one place in a prompt: the unit that vLLM and SGLang encode and cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from vila_deploy.engine.model_info import ModelInfo
from vila_deploy.processing.frame_windows import frame_windows
from vila_deploy.processing.images import Pixels, preprocess
from vila_deploy.runtime.prompt import Prompt, PromptImage

# Stands for a place in a prompt on its way to the program's processor; no text has such a token.
PLACE_MARKER = -1
# What the positions of a place hold in the end: their embeddings come from the image.
FILLER_TOKEN = 0


@dataclass(frozen=True)
class Place:
    """An image, a tile or a window of frames.

    Args:
        key: equal for pixels that give equal embeddings.
        tokens: embeddings that it takes in the prompt.
    """

    pixels: Pixels
    key: str
    tokens: int


def places_of(image: PromptImage) -> list[Place]:
    """Return the places that an image takes in the prompt."""
    key, pixels = image.digest.hex(), image.pixels
    if len(image.token_counts) == 1:
        return [Place(pixels, key, image.token_counts[0])]
    assert pixels.grid is None
    size = len(pixels.tiles) // len(image.token_counts)
    return [
        Place(
            Pixels(pixels.tiles[size * index : size * (index + 1)], pool=pixels.pool),
            f"{key}-{index}",
            tokens,
        )
        for index, tokens in enumerate(image.token_counts)
    ]


def with_places(prompt: Prompt) -> tuple[list[int], list[Place]]:
    """Return a prompt's token ids with a marker for each place, and the places."""
    ids = list(prompt.chunks[0])
    for chunk in prompt.chunks[1:]:
        ids += [PLACE_MARKER, *chunk]
    return ids, [place for image in prompt.images for place in places_of(image)]


def largest_place(model: ModelInfo) -> Place:
    """Return the place with the most tokens that a model can have."""
    side, widest = model.tiling.tile or model.image.size, max(model.tiling.max_tiles, 1)
    blank = Image.new("RGB", (side * widest, side))
    (pixels,) = preprocess([blank], model.image, model.tiling)
    found = places_of(PromptImage.of(pixels, model))
    if model.video.pools:
        found += _windows(model)
    return max(found, key=lambda place: (place.tokens, len(place.pixels.tiles)))


def _windows(model: ModelInfo) -> Sequence[Place]:
    """Return a place of each kind of window that a video has."""
    frame = Image.new("RGB", (model.image.size, model.image.size))
    windows = frame_windows([frame] * model.video.frame_multiple, model.video)
    kinds = {window.pool: window for window in windows if not isinstance(window, Image.Image)}
    pixels = preprocess(list(kinds.values()), model.image, model.tiling, alone=False)
    return [place for item in pixels for place in places_of(PromptImage.of(item, model))]
