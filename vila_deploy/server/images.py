"""Images of a request: bytes of a data: URI, decoded within limits; no file is ever opened."""

from __future__ import annotations

import base64
import binascii
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

from vila_deploy.processing.images import read_image
from vila_deploy.server.errors import ApiError
from vila_deploy.utils.errors import VilaDeployError

# Pillow's own parsers of these are used most and fuzzed most; the others are not called.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
DATA_URI = re.compile(r"data:(image/[\w.+-]+)?((?:;[\w-]+=[\w.+-]*)*);base64,", re.ASCII | re.I)
# Each scan of a progressive JPEG goes over all pixels again; encoders write about ten.
MAX_JPEG_SCANS = 64
_START_OF_SCAN = b"\xff\xda"
_FIX = f"send a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image"


def data_uri_bytes(url: str, param: str) -> bytes:
    """Return the bytes of data:image/…;base64,….

    Raises:
        ApiError: another kind of URL, or wrong base64.
    """
    head = DATA_URI.match(url)
    if head is None:
        raise ApiError(
            "is no data: URI of an image", param=param, fix="send data:image/png;base64,…"
        )
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise ApiError("is not valid base64", param=param, fix="send base64 with padding") from None


def decode_image(content: bytes, param: str, max_pixels: int) -> Image.Image:
    """Return the first frame of an image, RGB and upright; its size is checked before decoding.

    Raises:
        ApiError: no image, an unknown format, damaged, too large, or made to be slow.
    """
    with _refusals(param, max_pixels):
        return read_image(_opened(content, param, max_pixels))


def count_pixels(content: bytes, param: str, max_pixels: int) -> int:
    """Return width × height of an image that somebody else decodes, from its header alone.

    Raises:
        ApiError: as `decode_image`, but for damage behind the header.
    """
    with _refusals(param, max_pixels):
        image = _opened(content, param, max_pixels)
        return image.width * image.height


@contextmanager
def _refusals(param: str, max_pixels: int) -> Iterator[None]:
    """Turn whatever a parser of images stumbles on into an ApiError."""
    try:
        yield
    except (ApiError, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise _too_large(param, max_pixels) from None
    except VilaDeployError as error:
        # The original is what Pillow raised, with addresses and names of its own.
        if error.__cause__ is not None:
            raise _unreadable(param) from None
        raise ApiError(error.what, param=param, fix=error.fix) from None
    except Exception:
        raise _unreadable(param) from None


def _opened(content: bytes, param: str, max_pixels: int) -> Image.Image:
    with warnings.catch_warnings():
        # Pillow's own limit only warns; ours is an error.
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    _check_cost(image, content, param, max_pixels)
    return image


def _check_cost(image: Image.Image, content: bytes, param: str, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise _too_large(param, max_pixels)
    if content.startswith(b"\xff\xd8") and content.count(_START_OF_SCAN) > MAX_JPEG_SCANS:
        raise ApiError(
            f"is a JPEG of more than {MAX_JPEG_SCANS} scans", param=param, fix="save it anew"
        )


def _too_large(param: str, max_pixels: int) -> ApiError:
    return ApiError(
        f"is larger than {max_pixels / 1e6:g} megapixels",
        param=param,
        code="image_too_large",
        fix="scale it down",
    )


def _unreadable(param: str) -> ApiError:
    return ApiError("is not an image that can be read", param=param, fix=_FIX)
