"""vila-chat in pipes and scripts: wrong lines, closed streams, encodings, control characters."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from tests.support.chain import answering_checkpoint
from tests.support.commands import BIN, assert_one_line, invoke, succeed


def byte_tokens(text: str) -> list[int]:
    return [*(3 + byte for byte in text.encode()), 2]


def build(folder: Path, text: str) -> Path:
    root = answering_checkpoint(folder / "c", byte_tokens(text))
    succeed("vila-build-engine", root, "--target", "cpu", "-o", folder / "e")
    return folder / "e"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers with an emoji, ESC and BEL."""
    return build(tmp_path_factory.mktemp("chat"), "😀\x1b[\x07")


def chat(
    engine: Path, *args: object, typed: bytes | None = b"", redirect: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run vila-chat through a shell, which can close streams."""
    words = [BIN / "vila-chat", engine, *args]
    done = subprocess.run(
        ["sh", "-c", f'"$@" {redirect}', "sh", *map(os.fsencode, words)],
        input=typed, capture_output=True, timeout=120, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    stdout, stderr = done.stdout.decode("utf-8", "replace"), done.stderr.decode()
    return subprocess.CompletedProcess(done.args, done.returncode, stdout, stderr)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (b"/image nowhere.png\nWhat?\n", "nowhere.png"),
        (b"/video nowhere.mp4\nWhat?\n", "nowhere.mp4"),
        (b"/image " + 300 * b"a" + b"\nWhat?\n", "File name too long"),
        (b"/image\nWhat?\n", "/image names no file; type /image FILE"),
        (b"/video \nWhat?\n", "/video names no file"),
        (b"/image https://a.org/cat.jpg\nWhat?\n", "download it"),
        (b"/usr/bin is what?\nWhat?\n", "a space goes before a question"),
        (b"<image> What?\n", "1 <image> markers for 0 images"),
        (b"\xff\xfe\n", "not valid UTF-8"),
        (b"/image \xff.png\nWhat?\n", r"\udcff.png"),
        (b"", "no question came through stdin; give one with -p"),
        (b"\n \n/reset\n", "no question came through stdin"),
        (b"/image 'a b.png\nWhat?\n", "a quote that is not closed"),
        (b"/help\n/image a.png nowhere.png\nWhat?\n", "a.png"),
    ],
)
def test_a_piped_line_that_fails_ends_the_command(engine: Path, typed: bytes, message: str) -> None:
    done = chat(engine, typed=typed)
    assert message.replace("\\udcff", "\\xdcff") in assert_one_line(done)
    assert done.stdout == ""


def test_piped_answers_before_a_failure_stay(engine: Path, tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "red.png")
    lines = f"/image {tmp_path / 'red.png'}\nOne?\n/reset\n /Two?\n/image nowhere.png\nThree?\n"
    done = chat(engine, typed=lines.encode())
    assert "nowhere.png" in assert_one_line(done)
    assert done.stdout.count("😀") == 2
    assert chat(engine, typed=b"One?\nTwo?\n/quit\nThree?").stdout.count("😀") == 2
    assert chat(engine, typed=b"One?\n/exit\nTwo?").stdout.count("😀") == 1
    assert chat(engine, typed=b"/quit").returncode == 0


@pytest.mark.parametrize("flags", [["-p", "Hi"], ["-p", "Hi", "--json"], []])
def test_closed_stdout_is_one_line(engine: Path, flags: list[str]) -> None:
    assert "stdout is closed" in assert_one_line(chat(engine, *flags, redirect=">&-"))


def test_closed_stdin_and_stderr(engine: Path) -> None:
    assert "stdin is closed; give one with -p" in assert_one_line(chat(engine, redirect="<&-"))
    assert "😀" in chat(engine, "-p", "Hi", redirect="<&-").stdout
    assert "😀" in chat(engine, "-p", "Hi", redirect="2>&-").stdout
    assert chat(engine, "-p", "Hi", redirect="<&- >&- 2>&-").returncode == 1
    assert "No space left" in assert_one_line(chat(engine, "-p", "Hi", redirect=">/dev/full"))


@pytest.mark.parametrize("encoding", ["latin-1", "cp1251", "cp437", "koi8-r:strict"])
def test_an_output_without_the_character(engine: Path, encoding: str) -> None:
    done = chat(engine, "-p", "Hi", PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stdout) == (0, "\\U0001f600\\x1b[\\x07\n")
    done = chat(engine, "-p", "Hi", "--json", PYTHONIOENCODING=encoding)
    assert json.loads(done.stdout)["text"] == "😀\x1b[\x07"


def test_control_characters_are_shown_as_escapes(engine: Path) -> None:
    assert succeed("vila-chat", engine, "-p", "Hi") == "😀\\x1b[\\x07\n"
    assert json.loads(succeed("vila-chat", engine, "-p", "Hi", "--json"))["text"] == "😀\x1b[\x07"


def test_line_ends_stay_and_other_controls_do_not(tmp_path: Path) -> None:
    engine = build(tmp_path, "a\n\tb\rc\x7fd\x9be")
    assert succeed("vila-chat", engine, "-p", "Hi") == "a\n\tb\\x0dc\\x7fd\\x9be\n"


@pytest.mark.parametrize("flag", ["--image", "--video"])
@pytest.mark.parametrize("url", ["https://a.org/x.png", "HTTP://a/x", "s3://b/x", "file:///x.png"])
def test_a_url_is_no_file(engine: Path, flag: str, url: str) -> None:
    done = invoke("vila-chat", engine, flag, url, "-p", "What?")
    assert "is a URL, and files alone are read; download it" in assert_one_line(done)


def test_an_image_whose_name_is_no_utf8(engine: Path, tmp_path: Path) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xe9\xff.png")
    Image.new("RGB", (9, 9)).save(name)
    assert chat(engine, "--image", name, "-p", "What?").returncode == 0
    assert chat(engine, typed=b"/image " + os.fsencode(name) + b"\nWhat?\n").returncode == 0


def test_an_engine_whose_name_is_no_utf8(engine: Path, tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9\xff"))
    path.symlink_to(engine)
    assert "the path is no UTF-8" in assert_one_line(chat(path, "-p", "What?"))
