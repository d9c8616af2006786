"""Prefill a prompt in steps between which other sequences may decode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vila_deploy.engine.session import (
    DeviceRows,
    EncodesTiles,
    KeepsOnDevice,
    Session,
    chunk_size,
)
from vila_deploy.processing.images import Pixels, place_features
from vila_deploy.runtime.image_cache import ImageCache
from vila_deploy.runtime.prompt import Prompt, PromptImage
from vila_deploy.utils.arrays import Floats

Rows = Floats | DeviceRows


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
    features: dict[bytes, Rows] = {}
    on_device: dict[bytes, DeviceRows] = {}
    for image in needed:
        if image.digest in features:
            continue
        held: Rows | None = images.get(image.digest)
        if held is None:
            for encoded in encode_steps(session, image.pixels):
                held = encoded
                yield PrefillStep()
            assert held is not None
            if isinstance(held, np.ndarray):
                images.put(image.digest, held)
            else:
                on_device[image.digest] = held
        features[image.digest] = held
    embeds = _embeds(session, _parts(prompt, cached, features))
    start = 0
    while start < len(embeds):
        count = chunk_size(len(embeds) - start, chunk())
        last = start + count == len(embeds)
        logits = _prefill(session, slot, embeds[start : start + count], more=not last)
        start += count
        # Only now, so that the prompt has not waited for the copies.
        while on_device:
            assert isinstance(session, KeepsOnDevice)
            digest, rows = on_device.popitem()
            images.put(digest, session.to_host(rows))
        yield PrefillStep(count, logits if last else None)


def _prefill(session: Session, slot: int, embeds: Rows, *, more: bool) -> Floats:
    if isinstance(embeds, np.ndarray):
        return session.prefill(slot, embeds, more=more)
    assert isinstance(session, KeepsOnDevice)
    return session.prefill_on_device(slot, embeds, more)


def encode_steps(session: Session, pixels: Pixels) -> Iterator[Rows | None]:
    """Encode an image, tile by tile where the session can; yield all features with the last one.

    The features [tokens, hidden] of all places that the image takes in a prompt, on the device if
    the session keeps them there.
    """
    if isinstance(session, KeepsOnDevice) and pixels.pool is None:
        yield session.encode_on_device(pixels.tiles, pixels.grid)
        return
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


def _parts(prompt: Prompt, cached: int, features: dict[bytes, Rows]) -> list[list[int] | Rows]:
    """Return the prompt behind its first `cached` tokens: token ids and features in turn."""
    parts: list[list[int] | Rows] = []
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
            parts.append(run)
            run = []
        digest, index = key
        end = position
        while end < len(keys) and keys[end] == (digest, index + end - position):
            end += 1
        parts.append(features[digest][index : index + end - position])
        position = end
    if run:
        parts.append(run)
    return parts


def _embeds(session: Session, parts: Sequence[list[int] | Rows]) -> Rows:
    """Return the embeddings [tokens, hidden] of the parts of a prompt."""
    if isinstance(session, KeepsOnDevice):
        return session.embed_on_device(parts)
    embeds: list[Floats] = []
    for part in parts:
        if isinstance(part, list):
            embeds.append(session.embed_tokens(part))
        else:
            assert isinstance(part, np.ndarray)
            embeds.append(part)
    return np.concatenate(embeds)
