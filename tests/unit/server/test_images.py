"""Images that a client sends: formats, damage, bombs, and nothing of Pillow's words in errors."""

from __future__ import annotations

import base64
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from vila_deploy.server.errors import ApiError
from vila_deploy.server.images import MAX_JPEG_SCANS, data_uri_bytes, decode_image

WHERE = "messages[0].content[0].image_url"
ROWS = np.random.default_rng(0).integers(0, 255, (12, 20, 3), np.uint8)


def encoded(kind: str, image: Image.Image | None = None, **options: object) -> bytes:
    buffer = io.BytesIO()
    (image or Image.fromarray(ROWS)).save(buffer, kind, **options)
    return buffer.getvalue()


def refusal(content: bytes, max_pixels: int = 10_000) -> str:
    with pytest.raises(ApiError) as caught:
        decode_image(content, WHERE, max_pixels)
    error = caught.value
    assert error.status == 400
    assert error.param == WHERE
    assert error.__cause__ is None
    return str(error)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_formats(kind: str) -> None:
    image = decode_image(encoded(kind), WHERE, 10_000)
    assert (image.mode, image.size) == ("RGB", (20, 12))


@pytest.mark.parametrize("kind", ["TIFF", "ICO", "PPM", "TGA", "PCX", "EPS", "PDF"])
def test_other_formats_are_not_parsed(kind: str) -> None:
    assert "is not an image that can be read" in refusal(encoded(kind))


def test_pixels_are_those_that_vila_chat_reads() -> None:
    assert (np.asarray(decode_image(encoded("PNG"), WHERE, 10_000)) == ROWS).all()


def test_exif_turns_the_image() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(encoded("JPEG", exif=exif), WHERE, 10_000).size == (12, 20)


def test_a_single_pixel() -> None:
    assert decode_image(encoded("PNG", Image.new("RGB", (1, 1))), WHERE, 10_000).size == (1, 1)


def test_size_is_checked_before_decoding() -> None:
    assert "larger than 0.01 megapixels" in refusal(encoded("PNG", Image.new("1", (101, 100))))
    header = struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk
    bomb += struct.pack(">I", zlib.crc32(chunk)) + struct.pack(">I", 99) + b"IDAT" + bytes(103)
    assert "larger than" in refusal(bomb)


def test_a_jpeg_of_many_scans_is_not_decoded() -> None:
    content = encoded("JPEG", progressive=True)
    decode_image(content, WHERE, 10_000)
    scans = b"\xff\xda" * MAX_JPEG_SCANS
    assert "scans" in refusal(content + scans)


def test_sixteen_bits_a_channel() -> None:
    deep = Image.fromarray(np.full((4, 4), 40_000, np.uint16))
    assert "8 bits a channel" in refusal(encoded("PNG", deep))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_damage_is_told_in_our_words(kind: str) -> None:
    content = encoded(kind)
    rng = np.random.default_rng(1)
    for _ in range(60):
        damaged = bytearray(content[: int(rng.integers(1, len(content)))])
        damaged[int(rng.integers(len(damaged)))] ^= int(rng.integers(1, 255))
        try:
            decode_image(bytes(damaged), WHERE, 10_000)
        except ApiError as error:
            text = str(error)
            assert text.startswith(f"{WHERE}: is "), text
            assert "0x" not in text
            assert "PIL" not in text


def test_empty_and_text() -> None:
    for content in (b"", b"hello", b"<svg/>", b"%!PS-Adobe"):
        assert "is not an image that can be read" in refusal(content)


def uri_refusal(url: str) -> str:
    with pytest.raises(ApiError) as caught:
        data_uri_bytes(url, WHERE)
    return str(caught.value)


def test_data_uris() -> None:
    content = base64.b64encode(b"abc").decode()
    for head in ("image/png", "IMAGE/PNG", "image/svg+xml", "image/jpeg;charset=utf-8", ""):
        assert data_uri_bytes(f"data:{head};base64,{content}", WHERE) == b"abc"


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd", "/etc/passwd", "../a.png", "C:\\a.png", "http://127.0.0.1/a.png",
        "ftp://a/b", "data:text/html;base64,AAAA", "data:image/png,AAAA", "data:", "",
        " data:image/png;base64,AAAA", "gopher://a", "s3://a/b", "\\\\host\\share\\a.png",
    ],
)  # fmt: skip
def test_other_urls_are_no_images(url: str) -> None:
    assert "is no data: URI of an image" in uri_refusal(url)


@pytest.mark.parametrize("text", ["A", "AAA", "A===", "AA=A", "AA AA", "AAA\n", "é", "_-_-"])
def test_wrong_base64(text: str) -> None:
    assert "is not valid base64" in uri_refusal(f"data:image/png;base64,{text}")
