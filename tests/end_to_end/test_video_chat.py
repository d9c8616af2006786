"""vila-chat about videos: the same as about their frames, given as images."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.commands import assert_one_line, invoke, run, succeed
from tests.support.tiny import make_checkpoint
from tests.support.videos import make_video


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("video")
    checkpoint = make_checkpoint(root / "checkpoint")
    succeed("vila-build-engine", checkpoint, "--target", "cpu", "-o", root / "engine")
    return root / "engine"


def blocks(index: int) -> np.ndarray:
    """Black and full colours in 3 × 4 blocks, others for each frame."""
    colours = np.random.default_rng(index).integers(0, 2, (3, 4, 3), np.uint8) * 255
    return colours.repeat(8, 0).repeat(8, 1)


def frame_files(folder: Path, indices: list[int]) -> list[object]:
    """--image options for these frames of a video of blocks."""
    options: list[object] = []
    for index in indices:
        Image.fromarray(blocks(index)).save(folder / f"{index}.png")
        options += ["--image", folder / f"{index}.png"]
    return options


def ask(engine: Path, *options: object, prompt: str = "What happens?") -> tuple[object, ...]:
    text = succeed("vila-chat", engine, *options, "-p", prompt, "--max-new-tokens", 24, "--json")
    answer = json.loads(text)
    return answer["tokens"], answer["text"], answer["prompt_tokens"]


def test_a_video_is_its_frames(engine: Path, tmp_path: Path) -> None:
    video = make_video(tmp_path / "v", 30, image=blocks)
    eight = [0, 4, 8, 12, 17, 21, 25, 29]
    answer = ask(engine, "--video", video)
    assert answer == ask(engine, *frame_files(tmp_path, eight))
    # This model sees which frames they are and in which order.
    assert answer != ask(engine, *frame_files(tmp_path, eight[::-1]))
    assert answer != ask(engine, *frame_files(tmp_path, [0, 4, 8, 12, 16, 21, 25, 29]))
    two = frame_files(tmp_path, [0, 29])
    assert ask(engine, "--video", video, "--video-frames", 2) == ask(engine, *two)
    marked = "<image> and <image>: what changed?"
    assert ask(engine, "--video", video, "--video-frames", 2, prompt=marked) == ask(
        engine, *two, prompt=marked
    )


def test_a_placeholder_takes_all_frames(engine: Path, tmp_path: Path) -> None:
    video = make_video(tmp_path / "v", 30, image=blocks)
    image = frame_files(tmp_path, [7])
    flags = ("--video-frames", 2)
    asked = ask(engine, *image, "--video", video, *flags, prompt="<vila/video> then <image>")
    frames = frame_files(tmp_path, [0, 29, 7])
    assert asked == ask(engine, *frames, prompt="<image>\n<image> then <image>")
    plain = ask(engine, "--video", video, *flags)
    assert ask(engine, "--video", video, *flags, prompt="<video>\nWhat happens?") == plain


def test_pictures_come_before_videos(engine: Path, tmp_path: Path) -> None:
    first = make_video(tmp_path / "first", 5, image=blocks)
    second = make_video(tmp_path / "second", 5, image=lambda index: blocks(index + 10))
    image = frame_files(tmp_path, [7])
    answer = ask(
        engine, "--video", first, *image, "--video", second, "--video-frames", 2
    )  # fmt: skip
    assert answer == ask(engine, *frame_files(tmp_path, [7, 0, 4, 10, 14]))


def test_video_in_a_conversation(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = make_video(tmp_path / "v", 30, image=blocks)
    frame_files(tmp_path, [0, 29])

    def talk(*lines: str) -> tuple[str, str]:
        left = [*lines, "/quit"]
        monkeypatch.setattr("builtins.input", lambda: left.pop(0))
        monkeypatch.setattr("vila_deploy.cli.chat_interactive.is_terminal", lambda: True)
        done = invoke("vila-chat", engine, "--video-frames", 2, "--max-new-tokens", 16)
        assert done.returncode == 0
        return done.stdout, done.stderr

    images = (f"/image {tmp_path / '0.png'}", f"/image {tmp_path / '29.png'}")
    answer, problems = talk(f"/video {tmp_path / 'absent.mp4'}", f"/video {video}", "What?")
    assert "absent.mp4: no such video" in problems
    assert answer == talk(*images, "What?")[0]
    assert answer != talk("What?")[0]


def test_no_video_gives_one_line(engine: Path, tmp_path: Path) -> None:
    video = make_video(tmp_path / "v", 30, "mp4")
    os.truncate(video, video.stat().st_size // 2)
    Image.new("RGB", (8, 8)).save(tmp_path / "still.png")
    for path in (video, tmp_path / "still.png", tmp_path / "absent.mp4", engine):
        assert path.name in assert_one_line(
            invoke("vila-chat", engine, "--video", path, "-p", "What?")
        )
    done = invoke("vila-chat", engine, "--video", video, "--video-frames", 0, "-p", "What?")
    assert done.returncode == 2


def test_damage_stays_off_the_terminal(engine: Path, tmp_path: Path) -> None:
    """FFmpeg's own complaints, which it writes past Python, don't reach the user."""
    video = make_video(tmp_path / "v", 30, "mp4, index first")
    os.truncate(video, video.stat().st_size - 100)
    done = run("vila-chat", engine, "--video", video, "-p", "What?")
    assert done.stdout == ""
    assert done.stderr == assert_one_line(done) + "\n"
