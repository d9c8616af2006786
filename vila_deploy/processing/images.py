"""Turn images into the pixels that a vision tower takes; numpy and Pillow only."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from vila_deploy.checkpoint.video_config import Pool
from vila_deploy.checkpoint.vision_config import ImageConfig, TilingConfig
from vila_deploy.processing.frame_windows import FrameWindow, Item, window_mean
from vila_deploy.processing.s2 import resize_bicubic
from vila_deploy.utils.arrays import Floats
from vila_deploy.utils.errors import VilaDeployError

MAX_IMAGE_PIXELS = 100_000_000
IMAGE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif",
)  # fmt: skip
URL = re.compile(r"(?i)([a-z][a-z0-9+.-]+:/|data:)")  # two letters: C:/ is a drive


def read_image(source: str | Path | Image.Image) -> Image.Image:
    """Return an image file, or an image that Pillow has opened, as RGB and upright.

    Upright by its EXIF orientation; transparency is dropped, as the models were trained.

    Raises:
        VilaDeployError: not there, not an image, cut short, more than 8 bits a channel, or more
            than MAX_IMAGE_PIXELS.
    """
    if isinstance(source, Image.Image):
        with _one_line_errors(getattr(source, "filename", None) or "image"):
            return _upright_rgb(source)
    if not isinstance(source, str | Path):
        raise VilaDeployError(
            f"an image can't be a {type(source).__name__}", fix="give a path or a PIL image"
        )
    check_not_url(source)
    with _one_line_errors(source), Image.open(source) as image:
        return _upright_rgb(image)


def read_image_bytes(content: bytes, where: str) -> Image.Image:
    """Return the image that a file's bytes are, as `read_image` does; `where` names it in errors.

    Raises:
        VilaDeployError: as `read_image`.
    """
    with _one_line_errors(where), Image.open(io.BytesIO(content)) as image:
        return _upright_rgb(image)


def check_not_url(source: str | Path) -> None:
    """Raise VilaDeployError for a URL in place of a file; as a Path it has lost a slash."""
    if URL.match(str(source)) and not Path(source).exists():
        raise VilaDeployError(
            "is a URL, and files alone are read", where=source, fix="download it and give the file"
        )


def _upright_rgb(image: Image.Image) -> Image.Image:
    if image.width * image.height > MAX_IMAGE_PIXELS:
        raise VilaDeployError(
            f"image of {image.width}x{image.height} is larger than "
            f"{MAX_IMAGE_PIXELS // 1_000_000} megapixels",
            fix="scale it down first",
        )
    if image.mode.startswith(("I", "F")):
        # Pillow would clip such values to 255: a white or a black image.
        raise VilaDeployError(
            f"has {image.mode} pixels, 8 bits a channel are needed",
            fix="convert it to 8 bits first",
        )
    return ImageOps.exif_transpose(image).convert("RGB")


@contextmanager
def _one_line_errors(where: str | Path) -> Iterator[None]:
    """Raise VilaDeployError, which names the image, instead of whatever Pillow raises."""
    fix = "give a PNG, JPEG, WebP, BMP or GIF image"
    try:
        with warnings.catch_warnings():
            # Pillow's own limit only warns; ours is an error, checked before any decoding.
            warnings.simplefilter("ignore")
            yield
    except VilaDeployError as error:
        raise VilaDeployError(error.what, where=where, fix=error.fix) from None
    except FileNotFoundError as error:
        raise VilaDeployError("no such image", where=where, fix="check the path") from error
    except (UnidentifiedImageError, IsADirectoryError) as error:
        raise VilaDeployError("is not an image", where=where, fix=fix) from error
    except Image.DecompressionBombError as error:
        raise VilaDeployError("image is too large", where=where, fix="scale it down") from error
    # Pillow's decoders raise whatever their format parser stumbles on.
    except Exception as error:
        raise VilaDeployError(f"image cannot be read ({error})", where=where, fix=fix) from error


@dataclass(frozen=True)
class Pixels:
    """An image as the vision encoder takes it.

    Args:
        tiles: [tiles, 3, size, size].
        grid: None if every tile is an image of its own in the prompt. (rows, columns) if the tiles
            are one image at all its scales: the arrangement of tiles at the largest scale.
        pool: the tiles are frames of a video, whose tokens are averaged (see `window_mean`).
    """

    tiles: NDArray[np.float32]
    grid: tuple[int, int] | None = None
    pool: Pool | None = None


def place_features(encoded: Sequence[Floats], pixels: Pixels) -> Sequence[Floats]:
    """Return the features [tokens, hidden] of each place in the prompt that the pixels take.

    Args:
        encoded: what the vision encoder made of each tile, or of all of them if they have a grid.
    """
    if pixels.pool is None:
        return encoded
    return list(window_mean(np.stack(encoded), pixels.pool))


def preprocess(
    images: Sequence[Item], config: ImageConfig, tiling: TilingConfig, alone: bool = True
) -> list[Pixels]:
    """Return the pixels of each RGB image or window of frames, as the model was trained.

    Args:
        alone: whether a single image is the only one of its prompt. Models with dynamic tiles cut
            only such an image into tiles; each of several images is one tile.
    """
    cut = alone and len(images) == 1
    return [
        _pixels(item.convert("RGB"), config, tiling, cut)
        if isinstance(item, Image.Image)
        else _window_pixels(item, config)
        for item in images
    ]


def _window_pixels(window: FrameWindow, config: ImageConfig) -> Pixels:
    frames = [normalized(square(frame.convert("RGB"), config), config) for frame in window.frames]
    return Pixels(np.stack(frames), pool=window.pool)


def _pixels(image: Image.Image, config: ImageConfig, tiling: TilingConfig, cut: bool) -> Pixels:
    if tiling.mode == "s2":
        return _static_scales(image, config, tiling)
    if not cut or tiling.mode == "single":
        return Pixels(normalized(square(image, config), config)[None])
    side = tiling.tile
    rows, columns = closest_grid(image.size, tiling.min_tiles, tiling.max_tiles, side)
    # Each scale is a resize of the full image by Pillow's default filter, cut into tiles.
    if tiling.mode == "dynamic":
        tiles = _cut(image, side, rows, columns)
        if len(tiles) > 1:
            tiles.append(image.resize((side, side)))
        return Pixels(np.stack([normalized(tile, config) for tile in tiles]))
    tiles = []
    for index in range(len(tiling.scales) - 1):
        tiles += _cut(image, side, tiling.side(index), tiling.side(index))
    tiles += _cut(image, side, rows, columns)
    return Pixels(np.stack([normalized(tile, config) for tile in tiles]), (rows, columns))


def _static_scales(image: Image.Image, config: ImageConfig, tiling: TilingConfig) -> Pixels:
    """Return pixels at every scale of S2, each resized from the square image's pixels."""
    pixels = normalized(square(image, config), config)
    tiles = []
    for index, size in enumerate(tiling.scales):
        side = tiling.side(index)
        scaled = resize_bicubic(pixels, size).reshape(3, side, tiling.tile, side, tiling.tile)
        tiles.append(scaled.transpose(1, 3, 0, 2, 4).reshape(-1, 3, tiling.tile, tiling.tile))
    return Pixels(np.concatenate(tiles), (tiling.side(-1), tiling.side(-1)))


def _cut(image: Image.Image, tile: int, rows: int, columns: int) -> list[Image.Image]:
    """Stretch the image to rows × columns tiles and return them row by row."""
    stretched = image.resize((columns * tile, rows * tile))
    corners = [(column * tile, row * tile) for row in range(rows) for column in range(columns)]
    return [stretched.crop((x, y, x + tile, y + tile)) for x, y in corners]


def closest_grid(size: tuple[int, int], least: int, most: int, tile: int) -> tuple[int, int]:
    """Return rows and columns of the grid of `least` to `most` tiles nearest to an image's shape.

    Of grids with equally near shapes a larger one wins if its area is below twice the image's.

    Args:
        size: width and height in pixels.
    """
    width, height = size
    grids = [
        (columns, rows)
        for columns in range(1, most + 1)
        for rows in range(1, most // columns + 1)
        if columns * rows >= least
    ]
    best, best_difference = (1, 1), float("inf")
    for columns, rows in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        difference = abs(width / height - columns / rows)
        large_enough = width * height > 0.5 * tile * tile * columns * rows
        if difference < best_difference or (difference == best_difference and large_enough):
            best, best_difference = (columns, rows), difference
    return best[1], best[0]


def square(image: Image.Image, config: ImageConfig) -> Image.Image:
    """Return the image as a square of config.size: padded, cropped or stretched by its mode."""
    size, resample = config.size, Image.Resampling(config.resample)
    if config.mode == "pad":
        longer = max(image.size)
        _check_area(image, longer, longer)
        background = tuple(int(value * 255) for value in config.mean)
        padded = Image.new("RGB", (longer, longer), background)
        padded.paste(image, ((longer - image.width) // 2, (longer - image.height) // 2))
        return padded.resize((size, size), resample)
    if config.mode == "crop":
        shorter = min(image.size)
        width, height = (int(size * side / shorter) for side in image.size)
        _check_area(image, width, height)
        image = image.resize((width, height), resample)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        return image.crop((left, top, left + size, top + size))
    # The original stretches by Pillow's own filter before its processor, which finds nothing to do.
    return image.resize((size, size))


def _check_area(image: Image.Image, width: int, height: int) -> None:
    """Raise VilaDeployError if padding or scaling would take too much memory: a long image."""
    if width * height > MAX_IMAGE_PIXELS:
        raise VilaDeployError(
            f"an image of {image.width}x{image.height} is too long and narrow for this model",
            fix="cut it to a ratio of sides below 50",
        )


def normalized(image: Image.Image, config: ImageConfig) -> NDArray[np.float32]:
    """Return an RGB image as normalized pixels [3, height, width]."""
    mean, std = np.array(config.mean, np.float32), np.array(config.std, np.float32)
    values = np.asarray(image, np.float32) * np.float32(config.rescale)
    return np.ascontiguousarray(((values - mean) / std).transpose(2, 0, 1))
