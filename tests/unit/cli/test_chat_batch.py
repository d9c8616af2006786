"""vila-chat --batch, and questions and images on stdin."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.support.chain import answering_checkpoint
from tests.support.commands import BIN, assert_one_line, invoke, run, succeed


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers "yes"."""
    folder = tmp_path_factory.mktemp("batch")
    root = answering_checkpoint(folder / "c", [3 + byte for byte in b"yes"] + [2])
    succeed("vila-build-engine", root, "--target", "cpu", "-o", folder / "e")
    return folder / "e"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three images, one in a folder below, beside files that are none."""
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    for name in ("b.png", "a.JPG", "below/c.webp"):
        Image.new("RGB", (9, 9)).save(folder / name)
    (folder / "._a.jpg").write_text("of macOS")
    (folder / "notes.txt").write_text("no image")
    return folder


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def write_rows(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def test_a_folder_is_captioned(engine: Path, photos: Path) -> None:
    out = photos / "out.jsonl"
    said = succeed("vila-chat", engine, "--batch", photos, "-o", out, "-p", "Who?")
    assert said == f"{out}: 3 of 3 rows answered\n"
    rows = lines(out)
    assert [row["image"] for row in rows] == ["a.JPG", "b.png", "below/c.webp"]
    assert all((row["text"], row["output"]) == ("Who?", "yes") for row in rows)
    assert all(row["finish_reason"] == "stop" and row["output_tokens"] == 4 for row in rows)
    assert not list(photos.glob("*.partial"))
    again = invoke("vila-chat", engine, "--batch", photos, "-o", out)
    assert "output file exists" in assert_one_line(again)


def test_each_row_gets_what_vila_chat_answers(tmp_path: Path) -> None:
    from tests.support.paths import TINY_VILA, TINY_VILA_EXAMPLE

    succeed("vila-build-engine", TINY_VILA, "--target", "cpu", "-o", tmp_path / "e")
    two, three = (TINY_VILA_EXAMPLE / "pictures" / name for name in ("two.png", "three.png"))
    asked = [
        {"image": str(two), "text": "Describe the picture."},
        {"image": [str(three)], "text": "Describe the picture.", "id": 7, "answer": "unknown"},
        {"text": "Hello?"},
        {"image": str(two)},
        {"image": [str(two), str(three)], "text": "<image> <image> Describe the picture."},
    ]
    batch = write_rows(tmp_path / "in.jsonl", *asked)
    question = "How many shapes are there?"
    options = ("--temperature", 1, "--seed", 3, "--top-k", 5, "--system", "Be right.")
    for sampling in ((), options):
        out = tmp_path / f"out{len(sampling)}.jsonl"
        succeed("vila-chat", tmp_path / "e", "--batch", batch, "-o", out, "-p", question, *sampling)
        for row, result in zip(asked, lines(out), strict=True):
            images = row.get("image", [])
            images = images if isinstance(images, list) else [images]
            words = [word for image in images for word in ("--image", image)]
            text = row.get("text", question)
            alone = succeed("vila-chat", tmp_path / "e", *words, "-p", text, "--json", *sampling)
            assert result["output"] == json.loads(alone)["text"]
            assert {key: result[key] for key in row} == row


def test_a_row_that_fails_is_one_error(engine: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "bad.png").write_text("no image")
    rows = [
        {"image": "photos/bad.png", "text": "One?"},
        {"image": "photos/b.png", "text": "Two?"},
        {"image": "https://a.org/cat.png", "text": "Three?"},
        {"image": "photos/b.png", "text": "<image> <image> Four?"},
        {"text": "word " * 2000},
    ]
    source, out = write_rows(tmp_path / "in.jsonl", *rows), tmp_path / "out.jsonl"
    done = invoke("vila-chat", engine, "--batch", source, "-o", out)
    assert "4 of 5 rows have failed" in assert_one_line(done)
    errors = [row.get("error", "") for row in lines(out)]
    for error, words in zip(
        errors, ["is not an image", "", "is a URL", "2 <image> markers", "the prompt takes"],
        strict=True,
    ):  # fmt: skip
        assert words in error
    # Mended, they are asked again, and they alone.
    Image.new("RGB", (9, 9)).save(photos / "bad.png")
    done = invoke("vila-chat", engine, "--batch", source, "-o", out, "--resume", "--json")
    assert "3 of 5 rows have failed" in assert_one_line(done)
    assert json.loads(done.stdout) == {"out": str(out), "rows": 5, "failed": 3}
    assert [row.get("output") for row in lines(out)] == ["yes", "yes", None, None, None]


def test_an_interrupted_run_goes_on(engine: Path, tmp_path: Path) -> None:
    rows = [{"text": f"Question {number}?", "id": number} for number in range(1000)]
    rows[7] = rows[5]  # equal rows are two rows
    source, out = write_rows(tmp_path / "in.jsonl", *rows), tmp_path / "out.jsonl"
    words = [BIN / "vila-chat", engine, "--batch", source, "-o", out]
    log = tmp_path / "out.jsonl.partial"
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        while not (log.exists() and log.read_bytes().count(b"\n") > 20):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
        assert process.wait() == 130
    assert f"results are kept in {log}; --resume goes on from there" in said
    assert not out.exists()
    kept = log.read_bytes().count(b"\n") - 1
    # As if it had been killed while it wrote.
    with log.open("a") as file:
        file.write('["1 {\\"id')
    assert "add --resume" in assert_one_line(invoke("vila-chat", *words[1:]))
    other = invoke("vila-chat", *words[1:], "--resume", "--temperature", 1)
    assert "another engine, question or options" in assert_one_line(other)
    done = run("vila-chat", *words[1:], "--resume")
    assert done.returncode == 0, done.stderr
    assert f" {kept}/1000" in done.stderr or f" {kept + 1}/1000" in done.stderr
    assert [row["id"] for row in lines(out)] == [row["id"] for row in rows]
    assert not log.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no rows"),
        ("{}\n", "line 1: has no question; add 'text'"),
        ('{"text": "a"}\nnot JSON\n', "line 2: is not valid JSON"),
        ("[1]\n", "is no JSON object"),
        ('{"text": 7}\n', "text is no string: 7"),
        ('{"text": "a", "image": 7}\n', "image is no path: 7"),
        ('{"text": "a", "image": [null]}\n', "image is no path: None"),
        ('{"text": "a", "output": "b"}\n', "has the key 'output'"),
        ("[" * 100_000, "is not valid JSON"),
    ],
)
def test_rows_are_checked_before_anything_else(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "in.jsonl").write_text(content)
    done = invoke("vila-chat", "no-engine", "--batch", tmp_path / "in.jsonl", "-o", "out.jsonl")
    assert message in assert_one_line(done)


def test_input_and_output_are_checked(engine: Path, photos: Path, tmp_path: Path) -> None:
    def fails(source: Path, out: Path) -> str:
        return assert_one_line(invoke("vila-chat", engine, "--batch", source, "-o", out))

    assert "cannot be read: No such file" in fails(tmp_path / "nowhere", tmp_path / "o")
    (tmp_path / "empty").mkdir()
    assert "holds no image" in fails(tmp_path / "empty", tmp_path / "o")
    assert "folder does not exist" in fails(photos, tmp_path / "nowhere" / "o")
    assert "output file exists" in fails(photos, photos)
    (tmp_path / "latin").write_bytes(b'{"text": "\xe9"}')
    assert "is not UTF-8" in fails(tmp_path / "latin", tmp_path / "o")
    (tmp_path / "o.partial").write_text("")
    assert "add --resume" in fails(photos, tmp_path / "o")
    succeed("vila-chat", engine, "--batch", photos, "-o", tmp_path / "o", "--resume")


def test_names_that_are_no_utf8(engine: Path, tmp_path: Path) -> None:
    name = os.fsdecode(b"\xe9.png")
    (tmp_path / "in").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "in" / name)
    succeed("vila-chat", engine, "--batch", tmp_path / "in", "-o", tmp_path / "out.jsonl")
    assert lines(tmp_path / "out.jsonl")[0]["image"] == name


@pytest.mark.parametrize(
    "words",
    [
        ["--batch", "x"],
        ["-o", "x"],
        ["--resume"],
        ["--batch", "x", "-o", "y", "--image", "z"],
        ["--image", "-"],
        ["--image", "-", "--image", "-", "-p", "What?"],
        ["--image", "-", "-p", "-"],
        ["--stop", "", "-p", "What?"],
        ["--top-k", "-1"],
        ["--repetition-penalty", "0"],
        ["--repetition-penalty", "nan"],
    ],
)
def test_options_that_do_not_go_together(words: list[str]) -> None:
    assert invoke("vila-chat", "no-engine", *words).returncode == 2


def piped(engine: Path, content: bytes, *words: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [BIN / "vila-chat", engine, *words], input=content, capture_output=True, check=False
    )
    return subprocess.CompletedProcess(
        done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
    )


def test_question_and_image_on_stdin(engine: Path) -> None:
    image = io.BytesIO()
    Image.new("RGB", (9, 9)).save(image, "PNG")
    done = piped(engine, image.getvalue(), "--image", "-", "-p", "<image> What?", "--json")
    assert json.loads(done.stdout)["text"] == "yes"
    done = piped(engine, "first line\nsecond, with ü\n".encode(), "-p", "-")
    assert (done.returncode, done.stdout, done.stderr) == (0, "yes\n", "")
    asked = piped(engine, b"first\nsecond\n", "-p", "-", "--json")
    given = invoke("vila-chat", engine, "-p", "first\nsecond", "--json")
    assert json.loads(asked.stdout)["prompt_tokens"] == json.loads(given.stdout)["prompt_tokens"]


@pytest.mark.parametrize(
    ("content", "words", "message"),
    [
        (b"", ["-p", "-"], "no question came through stdin"),
        (b"\n ", ["-p", "-"], "no question came through stdin"),
        (b"\xff", ["-p", "-"], "not valid UTF-8"),
        (b"", ["--image", "-", "-p", "What?"], "stdin: is not an image"),
        (b"no image", ["--image", "-", "-p", "What?"], "stdin: is not an image"),
    ],
)
def test_wrong_content_on_stdin(
    engine: Path, content: bytes, words: list[str], message: str
) -> None:
    assert message in assert_one_line(piped(engine, content, *words))


def test_sampling_options_reach_the_engine(engine: Path) -> None:
    def answer(*words: object) -> str:
        return succeed("vila-chat", engine, "-p", "What?", *words).rstrip("\n")

    assert answer("--temperature", 100, "--top-k", 1) == "yes"
    assert answer("--temperature", 100, "--seed", 1) != "yes"
    assert answer("--stop", "e", "--stop", "s") == "y"
    assert "not valid UTF-8" in assert_one_line(
        invoke("vila-chat", engine, "-p", "What?", "--system", "\udcff")
    )
    done = invoke("vila-chat", engine, "-p", "What?", "--system", "<image>")
    assert "marks the place of an image" in assert_one_line(done)


def test_odd_lines_of_a_log_are_asked_again(engine: Path, photos: Path) -> None:
    out = photos / "out.jsonl"
    (photos / "a.JPG").write_bytes(b"no image")
    assert invoke("vila-chat", engine, "--batch", photos, "-o", out).returncode == 1
    log = photos / "out.jsonl.partial"
    job, first, *rest = lines(log)
    odd = [7, [first[0], 7], [first[0], ["output"]], [7, {}]]
    log.write_text("".join(json.dumps(line) + "\n" for line in [job, *odd, *rest]), "utf-8")
    done = invoke("vila-chat", engine, "--batch", photos, "-o", out, "--resume")
    assert "1 of 3 rows have failed" in assert_one_line(done)
    assert len(lines(out)) == 3
