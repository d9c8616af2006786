"""Image reading and preprocessing against transformers' SiglipImageProcessor and hostile files."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vila_deploy.checkpoint.vision_config import ImageConfig, TilingConfig
from vila_deploy.processing.images import preprocess, read_image
from vila_deploy.utils.errors import VilaDeployError

CONFIG = ImageConfig("resize", 42, 3, 1 / 255, (0.5, 0.4, 0.3), (0.5, 0.25, 0.2))
TILING = TilingConfig("single", 42, (42,))


@pytest.mark.parametrize("size", [(640, 480), (300, 700), (3, 5), (42, 42)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK"])
def test_preprocess_equals_siglip_processor(size: tuple[int, int], mode: str) -> None:
    processors = pytest.importorskip("transformers.models.siglip.image_processing_pil_siglip")
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    image = Image.fromarray(noise).convert(mode)
    processor = processors.SiglipImageProcessorPil(
        size={"height": 42, "width": 42}, image_mean=CONFIG.mean, image_std=CONFIG.std, resample=3
    )
    expected = processor(image.convert("RGB"), return_tensors="np")["pixel_values"]
    (pixels,) = preprocess([image], CONFIG, TILING)
    np.testing.assert_allclose(pixels.tiles, expected, atol=1e-5)


def test_no_images_give_no_pixels() -> None:
    assert preprocess([], CONFIG, TILING) == []


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    Image.new("RGB", (20, 10)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (10, 20)


def png_of_size(width: int, height: int) -> bytes:
    """A valid PNG header that claims width × height pixels, with next to no data behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = (
        chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    )
    return b"\x89PNG\r\n\x1a\n" + data


def hostile_images(folder: Path) -> dict[str, Path]:
    good = folder / "good.jpg"
    Image.effect_noise((200, 200), 80).convert("RGB").save(good)
    contents = {
        "text.jpg": b"this is no image",
        "empty.png": b"",
        "cut.jpg": good.read_bytes()[: good.stat().st_size // 2],
        "bomb.png": png_of_size(60000, 60000),
        "bomb2.png": png_of_size(12000, 12000),
        "lying.png": png_of_size(500, 500),
    }
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return {**{name: folder / name for name in contents}, "absent": folder / "absent.png",
            "folder": folder}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["text.jpg", "empty.png", "cut.jpg", "bomb.png", "bomb2.png", "lying.png", "absent", "folder"],
)
def test_hostile_picture_gives_one_line(tmp_path: Path, name: str) -> None:
    path = hostile_images(tmp_path)[name]
    with pytest.raises(VilaDeployError) as caught:
        read_image(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.fix


@pytest.mark.parametrize("values", [np.uint16([[0, 65535]]), np.float32([[0.0, 1.0]])])
def test_images_that_would_be_clipped_are_refused(values: np.ndarray, tmp_path: Path) -> None:
    file = tmp_path / "deep.tiff"
    Image.fromarray(values).save(file)
    with pytest.raises(VilaDeployError, match=r"deep\.tiff: has \S+ pixels, 8 bits a channel"):
        read_image(file)
