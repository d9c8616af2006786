"""Which frames of a video are taken, against a decoder that keeps them all, and hostile files."""

from __future__ import annotations

import dataclasses
import os
import struct
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tests.support.videos import KINDS, grey, make_video, numbers
from vila_deploy.checkpoint.video_config import VideoConfig
from vila_deploy.checkpoint.vision_config import ImageConfig, TilingConfig
from vila_deploy.processing import video as video_module
from vila_deploy.processing.images import preprocess
from vila_deploy.processing.video import sample_frames, sample_video
from vila_deploy.utils.errors import VilaDeployError


@pytest.mark.parametrize(
    ("frames", "count", "expected"),
    [
        (100, 8, [0, 14, 28, 42, 57, 71, 85, 99]),
        (100, 6, [0, 20, 40, 59, 79, 99]),
        (100, 1, [0]),
        (100, 2, [0, 99]),
        (30, 30, list(range(30))),
        (9, 8, [0, 1, 2, 3, 5, 6, 7, 8]),
        (8, 8, list(range(8))),
        (7, 8, [0, 1, 2, 3, 3, 4, 5, 6]),
        # linspace gives 0.5 here, and numpy rounds it to the even neighbour.
        (2, 3, [0, 0, 1]),
        (1, 8, [0] * 8),
    ],
)
def test_frames_at_even_distances(
    tmp_path: Path, frames: int, count: int, expected: list[int]
) -> None:
    assert numbers(sample_frames(make_video(tmp_path / "v", frames), count)) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [5, 8, 70])
def test_every_container_gives_the_frames_that_plain_decoding_gives(
    tmp_path: Path, kind: str, count: int
) -> None:
    path = make_video(tmp_path / "v", 60, kind)
    with av.open(str(path)) as container:
        every = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    # As in the original's _load_video.
    indices = np.round(np.linspace(0, len(every) - 1, count)).astype(int)
    found = sample_frames(path, count)
    assert all(image.mode == "RGB" for image in found)
    np.testing.assert_array_equal(
        np.stack([np.asarray(image) for image in found]), np.stack(every)[indices]
    )
    # Lossy codecs miss the last one by a grey level.
    np.testing.assert_allclose(numbers(found), indices, atol=1)


@pytest.mark.parametrize("stated", [20, 59, 61, 500, 2**31 - 1])
def test_a_lying_header_changes_nothing(tmp_path: Path, stated: int) -> None:
    path = make_video(tmp_path / "v", 60, "avi")
    expected = numbers(sample_frames(path, 8))
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, data.index(b"avih") + 8 + 16, stated)
    struct.pack_into("<I", data, data.index(b"strh") + 8 + 32, stated)
    path.write_bytes(data)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == stated, "the lie was not heard"
    assert numbers(sample_frames(path, 8)) == expected == [0, 8, 17, 25, 34, 42, 51, 59]


def test_a_recording_that_begins_between_key_frames(tmp_path: Path) -> None:
    path = make_video(tmp_path / "v", 60, "ts", options={"g": "20", "bf": "0", "sc_threshold": "0"})
    packet_size = 188
    with av.open(str(path)) as container:
        positions = [packet.pos for packet in container.demux(video=0) if packet.size]
    data = path.read_bytes()
    # Its tables stay, its first five frames go; the next fifteen build on them and can't be shown.
    tables, start = 3 * packet_size, positions[5] // packet_size * packet_size
    path.write_bytes(data[:tables] + data[start:])
    np.testing.assert_allclose(numbers(sample_frames(path, 4)), [20, 33, 46, 59], atol=1)


def test_only_the_chosen_frames_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converted = []
    upright = video_module._upright
    monkeypatch.setattr(
        video_module, "_upright", lambda frame: converted.append(1) or upright(frame)
    )
    sample_frames(make_video(tmp_path / "v", 100), 8)
    assert len(converted) == 8


def corner(index: int) -> np.ndarray:
    """White in the upper left quarter of a wide image."""
    image = np.zeros((16, 32, 3), np.uint8)
    image[:8, :16] = 255
    return image


@pytest.mark.parametrize(
    ("matrix", "size", "quarter"),
    [
        ((1, 0, 0, 1), (32, 16), (0, 0)),
        ((0, 1, -1, 0), (16, 32), (1, 0)),  # by 90 degrees clockwise
        ((-1, 0, 0, -1), (32, 16), (1, 1)),
        ((0, -1, 1, 0), (16, 32), (0, 1)),
    ],
)
def test_the_display_matrix_is_applied(
    tmp_path: Path,
    matrix: tuple[int, int, int, int],
    size: tuple[int, int],
    quarter: tuple[int, int],
) -> None:
    path = make_video(tmp_path / "v", 3, "mp4", corner)
    data = bytearray(path.read_bytes())
    a, b, c, d = (value << 16 for value in matrix)
    # Of a version 0 track header, 40 bytes behind its four flag bytes.
    struct.pack_into(">9i", data, data.index(b"tkhd") + 8 + 36, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    for image in sample_frames(path, 3):
        assert image.size == size
        column, row = quarter
        half = np.asarray(image.convert("L"), float).reshape(2, size[1] // 2, 2, size[0] // 2)
        bright = half.mean((1, 3)) > 128
        assert bright[row, column]
        assert bright.sum() == 1


def _sound(path: Path, cover: bool = False) -> None:
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44100, layout="stereo")
        if cover:
            art = container.add_stream("mjpeg", rate=1)
            art.width, art.height, art.pix_fmt = 32, 16, "yuvj420p"
            art.disposition = av.stream.Disposition.attached_pic.value
            container.mux(art.encode(av.VideoFrame.from_ndarray(grey(9), "rgb24")))
            container.mux(art.encode())
        sound = av.AudioFrame.from_ndarray(np.zeros((2, 4096), np.float32), "fltp", "stereo")
        sound.rate = 44100
        container.mux(stream.encode(sound))
        container.mux(stream.encode())


def _cut(path: Path, share: float) -> Path:
    os.truncate(path, int(path.stat().st_size * share))
    return path


def hostile(folder: Path, name: str) -> Path:
    """A file or path of this name that is no good video."""
    path = folder / name
    good = make_video(folder / "good", 60, "mp4")
    if name == "folder":
        path.mkdir()
    elif name == "pipe":
        os.mkfifo(path)
    elif name == "sound.m4a":
        _sound(path)
    elif name == "music.m4a":
        _sound(path, cover=True)
        with av.open(str(path)) as container:
            assert len(container.streams.video) == 1
    elif name == "still.png":
        Image.new("RGB", (32, 16)).save(path)
    elif name == "cut.mp4":
        _cut(make_video(path, 60, "mp4"), 0.5)
    elif name == "cut-index-first.mp4":
        _cut(make_video(path, 60, "mp4, index first"), 0.9)
    elif name == "no-frames.mkv":
        data = make_video(path, 60, "mkv").read_bytes()
        # Up to the first frame.
        path.write_bytes(data[: data.index(b"\x1f\x43\xb6\x75") + 40])
    else:
        contents = {
            "empty.mp4": b"",
            "text.mp4": b"this is no video\n" * 100,
            "noise.mp4": np.random.default_rng(0).bytes(20_000),
            "words.txt": b"FFmpeg would show this as moving letters\n" * 100,
            "list.m3u8": f"#EXTM3U\n#EXTINF:3,\n{good}\n#EXT-X-ENDLIST\n".encode(),
            "list.ffconcat": f"ffconcat version 1.0\nfile '{good.name}'\n".encode(),
        }
        if name in contents:
            path.write_bytes(contents[name])
    return path


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("absent.mp4", "no such video"),
        ("folder", "no regular file"),
        ("pipe", "no regular file"),
        ("a" * 300, "cannot be read"),
        ("empty.mp4", "is not a video"),
        ("text.mp4", "is not a video"),
        ("noise.mp4", "is not a video"),
        ("words.txt", "is not a video"),
        ("still.png", "--image"),
        ("list.m3u8", "is not a video"),
        ("list.ffconcat", "is not a video"),
        ("sound.m4a", "no video stream"),
        ("music.m4a", "no video stream"),
        ("cut.mp4", "cut short"),
        ("cut-index-first.mp4", r"cut short: only its first \d+ frames"),
        ("no-frames.mkv", "has no frame"),
    ],
)
def test_hostile_video_gives_one_line(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(VilaDeployError, match=reason) as error:
        sample_frames(hostile(tmp_path, name), 8)
    assert name in str(error.value)
    assert "\n" not in str(error.value)
    assert "; " in str(error.value), "no remedy"


@pytest.mark.parametrize("kind", KINDS)
def test_damage_gives_frames_or_one_line(tmp_path: Path, kind: str) -> None:
    path = make_video(tmp_path / "v", 60, kind)
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    for _ in range(30):
        data = bytearray(whole)
        for position in random.integers(0, len(data), random.integers(1, 20)):
            data[position] = random.integers(0, 256)
        path.write_bytes(data[: random.integers(len(data) // 2, len(data) + 1)])
        try:
            found = sample_frames(path, 4)
        except VilaDeployError:
            continue
        assert len(found) == 4


@pytest.mark.parametrize("count", [0, -1, 8193])
def test_senseless_counts(tmp_path: Path, count: int) -> None:
    with pytest.raises(VilaDeployError, match=f"cannot take {count} frames"):
        sample_frames(make_video(tmp_path / "v", 3), count)


def test_frames_that_are_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_video(tmp_path / "v", 9)
    monkeypatch.setattr(video_module, "MAX_IMAGE_PIXELS", 32 * 16 - 1)
    with pytest.raises(VilaDeployError, match="video of 32x16 is larger"):
        sample_frames(path, 2)
    monkeypatch.setattr(video_module, "MAX_IMAGE_PIXELS", 32 * 16)
    monkeypatch.setattr(video_module, "MAX_VIDEO_PIXELS", 4 * 32 * 16)
    assert len(sample_frames(path, 4)) == 4
    with pytest.raises(VilaDeployError, match="5 frames of 32x16 are more"):
        sample_frames(path, 5)


def test_frames_that_grow_too_large_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = make_video(tmp_path / "small", 9, "mpeg")
    large = make_video(tmp_path / "large", 9, "mpeg", lambda index: grey(index, 640, 480))
    path = tmp_path / "both.mpg"
    path.write_bytes(small.read_bytes() + large.read_bytes())
    assert {image.size for image in sample_frames(path, 6)} == {(32, 16), (640, 480)}
    monkeypatch.setattr(video_module, "MAX_IMAGE_PIXELS", 640 * 480 // 2 - 1)
    with pytest.raises(VilaDeployError, match=r"only its first \d frames"):
        sample_frames(path, 6)


def test_without_pyav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_video(tmp_path / "v", 3)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(VilaDeployError, match=r"needs PyAV; pip install av"):
        sample_frames(path, 8)


def test_pyav_is_imported_for_videos_alone() -> None:
    code = (
        "import sys, vila_deploy, vila_deploy.cli.chat, vila_deploy.processing.video;"
        "sys.exit('av' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Frames at 25 a second; numbers of _load_video in llava/utils/media.py of NVlabs/VILA (b760c34)
# with OpenCV 4.10, which agreed in 128 cases of four containers.
@pytest.mark.parametrize(
    ("frames", "fps", "count", "expected"),
    [
        (100, 2.0, 64, [0, 12, 25, 37, 50, 62, 75, 87]),
        (100, 3.7, 64, [0, 6, 13, 20, 27, 33, 40, 47, 54, 60, 67, 74, 81, 87, 94]),
        (26, 2.0, 5, [0, 12, 25]),
        (100, 0.4, 8, [0, 62]),
        (100, 2.0, 3, [0, 12, 25]),
        (4, 50.0, 100, [0, 0, 1, 1, 2, 2, 3, 3]),
    ],
)
def test_frames_for_each_second(
    tmp_path: Path, frames: int, fps: float, count: int, expected: list[int]
) -> None:
    path = make_video(tmp_path / "v", frames)
    found = sample_frames(path, count, fps)
    assert numbers(found) == expected
    assert found.duration_s == pytest.approx(frames / 25)


RESIZE = ImageConfig("resize", 28, 3, 1 / 255, (0.5,) * 3, (0.5,) * 3)
MODES = ("resize", "pad", "crop")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tiles", ["single", "dynamic"])
def test_small_frames_give_the_same_pixels(mode: str, tiles: str, tmp_path: Path) -> None:
    path = make_video(tmp_path / "v", 12, image=corner)
    image = dataclasses.replace(RESIZE, mode=mode)
    tiling = TilingConfig(tiles, 28, (28,), 0, 1, 4)
    for count in (1, 4):
        large = sample_frames(path, count)
        small = sample_video(path, VideoConfig(count), image, tiling)
        assert small[0].size == ((32, 16) if (count, tiles) == (1, "dynamic") else (28, 28))
        for one, other in zip(
            preprocess(large, image, tiling), preprocess(small, image, tiling), strict=True
        ):
            np.testing.assert_array_equal(one.tiles, other.tiles)


def test_long_videos_are_held_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_video(tmp_path / "v", 64, image=corner)
    monkeypatch.setattr(video_module, "MAX_VIDEO_PIXELS", 64 * 300)
    with pytest.raises(VilaDeployError, match="megapixels"):
        sample_frames(path, 64)
    image = dataclasses.replace(RESIZE, size=14)
    assert len(sample_video(path, VideoConfig(64), image, TilingConfig("single", 14, (14,)))) == 64
