"""Prefill a prompt in steps between which other sequences may decode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from vila_deploy.engine.session import EncodesTiles, Session, chunk_size
from vila_deploy.processing.images import Pixels, place_features
from vila_deploy.runtime.image_cache import ImageCache
from vila_deploy.runtime.prompt import Prompt, PromptImage
from vila_deploy.utils.arrays import Floats


@dataclass(frozen=True)
class PrefillStep:
    """One image tile through the vision encoder, or one chunk of tokens through the LLM.

    Args:
        tokens: how many positions the slot holds more; 0 for an image tile.
        logits: of the prompt's last token [vocab], with the last step.
    """

    tokens: int = 0
    logits: Floats | None = None


def prefill_steps(
    session: Session,
    slot: int,
    prompt: Prompt,
    cached: int,
    images: ImageCache,
    chunk: Callable[[], int],
) -> Iterator[PrefillStep]:
    """Append the prompt to `slot`, which holds its first `cached` tokens; yield after each step.

    Images of the cached part are not encoded; features of the others are kept in `images`.

    Args:
        chunk: returns the most tokens of the next step.
    """
    needed = _images_behind(prompt, cached)
    features: dict[bytes, Floats] = {}
    for image in needed:
        if image.digest in features:
            continue
        held = images.get(image.digest)
        if held is None:
            for encoded in encode_steps(session, image.pixels):
                held = encoded
                yield PrefillStep()
            assert held is not None
            images.put(image.digest, held)
        features[image.digest] = held
    embeds = _embeds(session, prompt, cached, features)
    start = 0
    while start < len(embeds):
        count = chunk_size(len(embeds) - start, chunk())
        last = start + count == len(embeds)
        logits = session.prefill(slot, embeds[start : start + count], more=not last)
        start += count
        yield PrefillStep(count, logits if last else None)


def encode_steps(session: Session, pixels: Pixels) -> Iterator[Floats | None]:
    """Encode an image, tile by tile where the session can; yield all features with the last one.

    The features [tokens, hidden] of all places that the image takes in a prompt.
    """
    if not isinstance(session, EncodesTiles):
        encoded = session.encode_images(pixels.tiles, pixels.grid)
        yield np.concatenate(place_features(list(encoded), pixels))
        return
    tiles: list[Floats] = []
    for index in range(len(pixels.tiles)):
        tiles += list(session.encode_tiles(pixels.tiles[index : index + 1]))
        if index + 1 < len(pixels.tiles):
            yield None
    encoded = session.merge_tiles(np.stack(tiles), pixels.grid)
    yield np.concatenate(place_features(list(encoded), pixels))


def _images_behind(prompt: Prompt, cached: int) -> list[PromptImage]:
    """Return the images that have embeddings behind the first `cached` positions."""
    held = {key[0] for key in prompt.keys[cached:] if isinstance(key, tuple)}
    return [image for image in prompt.images if image.digest in held]


def _embeds(session: Session, prompt: Prompt, cached: int, features: dict[bytes, Floats]) -> Floats:
    """Return the embeddings [tokens, hidden] of the prompt behind its first `cached` tokens."""
    parts: list[Floats] = []
    run: list[int] = []
    keys = prompt.keys
    position = cached
    while position < len(keys):
        key = keys[position]
        if not isinstance(key, tuple):
            run.append(key)
            position += 1
            continue
        if run:
            parts.append(session.embed_tokens(run))
            run = []
        digest, index = key
        end = position
        while end < len(keys) and keys[end] == (digest, index + end - position):
            end += 1
        parts.append(features[digest][index : index + end - position])
        position = end
    if run:
        parts.append(session.embed_tokens(run))
    return np.concatenate(parts)
