"""Sample frames of a video; the model takes them as images, or averages their tokens.

Which frames: as `_load_video` in llava/utils/media.py of NVlabs/VILA takes them, frame
`round(linspace(0, total - 1, count))`, so the first and the last are among them and a video of
fewer frames than asked for repeats some; with `fps` frame `int(t · rate)` for t = 0, 1/fps, … below
the video's duration, `count` at most. (The `vila1.5` branch takes
`int(linspace(0, total - 2, count))`, at most two frames away, but pads short videos with black
images and fails when `total` equals `count`.)

Where `total` comes from: the container's header, or its packets where the header is silent. Both
may be wrong, so every frame is decoded and counted, in order and with only the chosen ones held;
if the count differs, a second pass takes the frames that the true count asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from vila_deploy.checkpoint.video_config import MAX_VIDEO_FRAMES, VideoConfig
from vila_deploy.checkpoint.vision_config import ImageConfig, TilingConfig
from vila_deploy.processing.frame_windows import check_frame_count
from vila_deploy.processing.images import MAX_IMAGE_PIXELS, check_not_url, square
from vila_deploy.utils.errors import VilaDeployError

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

Shrink = Callable[[Image.Image], Image.Image]
# Limit on the sampled frames of a video in all; RGB takes three bytes a pixel.
MAX_VIDEO_PIXELS = 500_000_000

# Only formats of one file: a playlist names other files or addresses, which FFmpeg would open. No
# still images and no text either, which FFmpeg would show as videos.
_FORMATS = (
    "apng,asf,avi,dv,flv,gif,h264,hevc,ivf,m4v,matroska,mjpeg,mov,mpeg,mpegts,mpegvideo,mxf,nut,"
    "obu,ogg,rm,yuv4mpegpipe"
)
_FIX = "give a video such as MP4, WebM, MKV, AVI or GIF; a still image is for --image"


class VideoFrames(list[Image.Image]):
    """Frames of a video as RGB images; `duration_s` is that of the whole video."""

    duration_s: float = 0.0


def sample_video(
    path: Path,
    video: VideoConfig,
    image: ImageConfig,
    tiling: TilingConfig,
    count: int | None = None,
) -> VideoFrames:
    """Return the frames of a video that a model takes, as small as its vision encoder sees them.

    Args:
        video, image, tiling: of the model.
        count: frames, at most; None: the model's own number.

    Raises:
        VilaDeployError: as `sample_frames`, or frames whose tokens can't be averaged in whole
            windows.
    """
    count = count or video.num_frames
    if not video.fps:
        check_frame_count(count, video)
    # A single frame is cut into tiles as an image is, at its full size.
    may_be_cut = tiling.cuts_single_images and (count == 1 or video.fps > 0)
    shrink = None if may_be_cut else partial(square, config=image)
    frames = sample_frames(path, count, video.fps, shrink)
    check_frame_count(len(frames), video)
    return frames


def frame_indices(total: int, count: int, fps: float = 0.0, rate: float = 0.0) -> list[int]:
    """Return `count` frame numbers evenly over 0..total-1; some repeat if `count` > `total`.

    Args:
        fps: if it is not 0, as many frames for each second of video instead, `count` at most.
        rate: the video's own frames a second.
    """
    if fps > 0 and rate > 0:
        seconds = np.arange(0, total / rate, 1 / fps)[:count]
        return [min(int(second * rate), total - 1) for second in seconds]
    return [int(index) for index in np.round(np.linspace(0, total - 1, count))]


def sample_frames(
    path: Path, count: int, fps: float = 0.0, shrink: Shrink | None = None
) -> VideoFrames:
    """Read frames of a video as RGB, in order, upright by its display matrix.

    A stream that ends early without an error counts as that short; damage is an error.

    Args:
        count, fps: which; see `frame_indices`.
        shrink: done to each frame before it is held.

    Raises:
        VilaDeployError: `count` not in 1..MAX_VIDEO_FRAMES, no such file, not a video, without a
            video stream or frames, damaged or cut short, frames over MAX_IMAGE_PIXELS, all of them
            together over MAX_VIDEO_PIXELS, or PyAV is not installed.
    """
    if not 1 <= count <= MAX_VIDEO_FRAMES:
        raise VilaDeployError(
            f"cannot take {count} frames", where=path, fix=f"ask for 1 to {MAX_VIDEO_FRAMES}"
        )
    check_not_url(path)
    try:
        total, rate = _stated_frames(path)
        # The first frame is taken however many there are: no need to count them for it.
        first_only = count == 1
        indices = [0] if first_only else frame_indices(total, count, fps, rate)
        chosen, seen = _take(path, set(indices), shrink, to_end=not first_only)
        if seen != total and not first_only:
            total = seen
            indices = frame_indices(total, count, fps, rate)
            chosen, _ = _take(path, set(indices), shrink, to_end=False)
        frames = VideoFrames(chosen[index] for index in indices)
        frames.duration_s = total / rate if rate > 0 else 0.0
        return frames
    except (VilaDeployError, MemoryError):
        raise
    # FFmpeg's parsers and converters raise whatever they stumble on.
    except Exception as error:
        raise VilaDeployError(f"video cannot be read ({error})", where=path, fix=_FIX) from error


def _stated_frames(path: Path) -> tuple[int, float]:
    """Return the frames by the header, else the packets, which may be wrong, and the frame rate.

    The rate is FFmpeg's av_guess_frame_rate, as OpenCV's; 0 if it finds none.
    """
    with _opened(path) as (container, stream):
        rate = float(stream.guessed_rate or 0.0)
        if stream.frames > 0:
            return stream.frames, rate
        packets = 0
        # Decoding will come upon the same damage and say where.
        with suppress(_import_av().FFmpegError):
            for packet in container.demux(stream):
                # The last one is empty: it only says that the file ends.
                packets += packet.size > 0
        return max(packets, 1), rate


def _take(
    path: Path, indices: set[int], shrink: Shrink | None, *, to_end: bool
) -> tuple[dict[int, Image.Image], int]:
    """Decode in order and return (the frames at `indices` that exist, number of frames decoded).

    Args:
        to_end: decode and count to the end, else only up to the last of `indices`.
    """
    chosen: dict[int, Image.Image] = {}
    seen = pixels = 0
    with closing(_frames(path)) as frames:
        for frame in frames:
            if seen in indices:
                image = _upright(frame)
                image = image if shrink is None else shrink(image)
                pixels += image.width * image.height
                if pixels > MAX_VIDEO_PIXELS:
                    raise VilaDeployError(
                        f"{len(indices)} frames of {frame.width}x{frame.height} are more than "
                        f"{MAX_VIDEO_PIXELS // 1_000_000} megapixels",
                        where=path,
                        fix="take fewer frames or scale it down first",
                    )
                chosen[seen] = image
            seen += 1
            if not to_end and len(chosen) == len(indices):
                break
    return chosen, seen


def _upright(frame: VideoFrame) -> Image.Image:
    """Return the frame as RGB, rotated by the display matrix in quarters, without mirroring."""
    return frame.to_image().rotate(round(frame.rotation / 90) * 90, expand=True)


def _frames(path: Path) -> Generator[VideoFrame, None, None]:
    """Yield every frame in display order; raise VilaDeployError if there is none."""
    av = _import_av()
    seen, cut_short = 0, False
    problem: Exception | None = None
    with _opened(path) as (container, stream):
        try:
            for packet in container.demux(stream):
                # FFmpeg hands out a packet that the file ends in, marked like this; one in the
                # middle may be a disturbed broadcast, which decoders get over.
                cut_short = packet.is_corrupt if packet.size else cut_short
                for frame in packet.decode():
                    yield frame
                    seen += 1
        except av.FFmpegError as error:
            problem, cut_short = error, True
    if not seen:
        raise VilaDeployError("has no frame that can be read", where=path, fix=_FIX) from problem
    if cut_short:
        raise VilaDeployError(
            f"is damaged or cut short: only its first {seen} frames can be read",
            where=path,
            fix="copy or convert it again",
        ) from problem


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a video and its first video stream for demuxing and decoding."""
    av = _import_av()
    # Opening a pipe would wait for a writer, and a second pass could not read it again.
    if not path.is_file():
        problem = "is no regular file" if path.exists() else "no such video"
        raise VilaDeployError(problem, where=path, fix="check the path")
    with path.open("rb") as file:
        try:
            container = av.open(file, mode="r", container_options={"format_whitelist": _FORMATS})
        except (av.FFmpegError, OSError) as error:
            raise VilaDeployError(
                "is not a video, or is cut short", where=path, fix=_FIX
            ) from error
        with container:
            yield container, _video_stream(container, path)


def _video_stream(container: InputContainer, path: Path) -> VideoStream:
    attached = _import_av().stream.Disposition.attached_pic
    # An audio file's cover is a video stream too.
    streams = [s for s in container.streams.video if not s.disposition & attached]
    if not streams:
        raise VilaDeployError("has no video stream", where=path, fix=_FIX)
    stream = streams[0]
    if stream.codec_context is None:
        raise VilaDeployError("has a codec that PyAV cannot decode", where=path, fix=_FIX)
    if stream.width * stream.height > MAX_IMAGE_PIXELS:
        raise VilaDeployError(
            f"video of {stream.width}x{stream.height} is larger than "
            f"{MAX_IMAGE_PIXELS // 1_000_000} megapixels",
            where=path,
            fix="scale it down first",
        )
    # The frame size may change within a stream: this limit makes the decoder refuse before it
    # allocates. Twice, since it counts the margins that it adds to a frame too.
    stream.codec_context.options = {"max_pixels": str(2 * MAX_IMAGE_PIXELS)}
    stream.thread_type = "AUTO"
    return stream


def _import_av() -> ModuleType:
    """Import PyAV on first use: most conversations have no video."""
    try:
        import av
    except ImportError as error:
        raise VilaDeployError("reading videos needs PyAV", fix="pip install av") from error
    return av
