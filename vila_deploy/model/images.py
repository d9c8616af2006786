"""Pictures to pixels, as the `resize` image mode of VILA1.5 does it; numpy and Pillow only."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from vila_deploy.checkpoint.vision_config import ImageConfig
from vila_deploy.errors import VilaDeployError

MAX_IMAGE_PIXELS = 100_000_000


def open_image(path: Path) -> Image.Image:
    """Reads a picture as RGB, upright by its EXIF orientation.

    Raises:
        VilaDeployError: not there, not a picture, cut short, or more than MAX_IMAGE_PIXELS.
    """
    fix = "give a PNG, JPEG, WebP, BMP or GIF picture"
    try:
        with warnings.catch_warnings():
            # Pillow's own limit only warns; ours is an error, checked before any decoding.
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                if image.width * image.height > MAX_IMAGE_PIXELS:
                    raise VilaDeployError(
                        f"picture of {image.width}x{image.height} is larger than "
                        f"{MAX_IMAGE_PIXELS // 1_000_000} megapixels",
                        where=path,
                        fix="scale it down first",
                    )
                return ImageOps.exif_transpose(image).convert("RGB")
    except VilaDeployError:
        raise
    except FileNotFoundError as error:
        raise VilaDeployError("no such picture", where=path, fix="check the path") from error
    except (UnidentifiedImageError, IsADirectoryError) as error:
        raise VilaDeployError("is not a picture", where=path, fix=fix) from error
    except Image.DecompressionBombError as error:
        raise VilaDeployError("picture is too large", where=path, fix="scale it down") from error
    # Pillow's decoders raise whatever their format parser stumbles on.
    except Exception as error:
        raise VilaDeployError(f"picture cannot be read ({error})", where=path, fix=fix) from error


def preprocess(images: list[Image.Image], config: ImageConfig) -> NDArray[np.float32]:
    """RGB pictures → pixels [images, 3, size, size]: resize, rescale, normalise.

    The picture is stretched to a square, as VILA1.5 was trained (`image_aspect_ratio: resize`).
    """
    side = config.size
    pixels = np.empty((len(images), 3, side, side), np.float32)
    mean, std = np.array(config.mean, np.float32), np.array(config.std, np.float32)
    for out, image in zip(pixels, images, strict=True):
        square = image.convert("RGB").resize((side, side), Image.Resampling(config.resample))
        values = np.asarray(square, np.float32) * np.float32(config.rescale)
        out[:] = ((values - mean) / std).transpose(2, 0, 1)
    return pixels
