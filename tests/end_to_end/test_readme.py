"""Commands and Python of README and guides, run as they stand there.

tiny-vila stands in for VILA1.5-3b: the folder of that name is its checkpoint, and images, videos
and data files of the names on the pages are made for the test. What is changed in a command is in
SHORTER, what is not run in NOT_RUN; a command that is neither a `vila-…` nor listed fails.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.support.commands import BIN, invoke, succeed
from tests.support.documents import Block, Command, blocks, commands
from tests.support.paths import REPOSITORY, TINY_VILA, TINY_VILA_EXAMPLE
from tests.support.videos import make_video

PAGES = ("README.md", "docs/quantization.md", "docs/cli.md", "docs/api.md")
MODEL = "VILA1.5-3b"

# Beginning of a command: why it is not run.
NOT_RUN = {
    "python3 -m venv": "makes the environment that the tests run in",
    "pip install": "needs a network",
    f"vila-quantize {MODEL} --lora": "needs an adapter; unit/checkpoint/test_lora.py merges some",
    f"vila-bench --model {MODEL}": "writes and times three billion random weights",
    "vila-serve": "answers until it is stopped; tests/unit/server asks it",
    "curl": "needs a running server; tests/unit/server asks one",
    "vila-eval vila-3b-cpu --data MMMU": "needs the benchmark; tests/unit/harness reads a made one",
    "vila-bench --table": "builds and times models for up to 15 minutes",
}
# Commands that begin so and have none of the words get these options too, to take seconds.
SHORTER = (
    ("vila-quantize", ("--plan", "--algorithm", "--calib"), ["--algorithm", "rtn"]),
    ("vila-quantize", ("--plan", "--algorithm", "rtn"), ["--no-eval"]),
    ("vila-chat", ("--max-new-tokens",), ["--max-new-tokens", "48"]),
    # tiny-vila knows no text.
    ("vila-eval", ("--data",), ["--max-kl", "9"]),
)
NUMBER = re.compile(r"[\d.,:]*\d(?:s\b)?")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 4-bit engine of tiny-vila, made in seconds."""
    folder = tmp_path_factory.mktemp("readme")
    succeed("vila-quantize", TINY_VILA, "-o", folder / "rtn", "--algorithm", "rtn")
    succeed("vila-build-engine", folder / "rtn", "--target", "cpu", "-o", folder / "engine")
    return folder / "engine"


@pytest.fixture
def here(engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with every file that the pages name and no page makes."""
    monkeypatch.chdir(tmp_path)
    Path(MODEL).symlink_to(TINY_VILA)
    Path("Efficient-Large-Model").mkdir()
    Path("Efficient-Large-Model", MODEL).symlink_to(TINY_VILA)
    Path("examples").symlink_to(REPOSITORY / "examples")
    Path(".demo").mkdir()
    shutil.copytree(engine, ".demo/int4")
    images = sorted((TINY_VILA_EXAMPLE / "pictures").glob("*.png"))
    for name, image in zip(("cat.jpg", "a.jpg", "b.jpg"), images, strict=True):
        Image.open(image).convert("RGB").save(name)
    Path("photos").mkdir()
    shutil.copy("a.jpg", "photos/7.jpg")
    line = {"text": "<image>\nWhat is on it?", "answer": "Shapes.", "image": "photos/7.jpg"}
    Path("questions.jsonl").write_text(json.dumps(line) + "\n", "utf-8")
    Path("my-questions").mkdir()
    row = {"question": "How many shapes are there?", "answer": "3", "image": "../a.jpg"}
    Path("my-questions", "questions.jsonl").write_text(json.dumps(row) + "\n", "utf-8")
    make_video(Path("cat.mp4"), frames=16, kind="mp4")
    return tmp_path


def listed(line: str) -> bool:
    """Is it a command that is not run, for a reason?"""
    return all(
        any(part.strip().startswith(beginning) for beginning in (*NOT_RUN, ". "))
        for part in line.split("&&")
    )


def arguments(line: str) -> list[str]:
    """Return the words of a command as it is run."""
    words = shlex.split(line)
    for command, unless, more in SHORTER:
        if words[0] == command and not set(unless) & set(words):
            words += more
    return words


def run(command: Command) -> None:
    """Run one command and compare what it prints with what the page shows."""
    name, *rest = arguments(command.line)
    where = f"{command.block}: {command.line}"
    assert (BIN / name).exists(), f"{where}: neither a command of ours nor in NOT_RUN"
    done = invoke(name, *rest)
    assert done.returncode == 0, f"{where}\n{done.stderr}"
    if "--json" in rest:
        json.loads(done.stdout)
    if name == "vila-chat":
        assert done.stdout.strip(), where
    else:
        assert_shown(command, done.stdout)


def assert_shown(command: Command, printed: str) -> None:
    """The page shows what is printed, but for figures; … stands for any lines."""
    if not command.output:
        return
    pattern = "".join(
        "(?:.*\n)*" if line == "…" else re.escape(shape(line)) + "\n" for line in command.output
    )
    text = "".join(shape(line) + "\n" for line in printed.splitlines())
    where = f"{command.block}: {command.line}"
    assert re.fullmatch(pattern, text), f"{where}\nprints otherwise than shown:\n{printed}"


def shape(line: str) -> str:
    """Return a line with # for each number or time and single spaces."""
    return NUMBER.sub("#", " ".join(line.split()))


def blocks_in_order(page: Path) -> Iterator[Block]:
    found = [*blocks(page, "console"), *blocks(page, "python")]
    return iter(sorted(found, key=lambda block: block.line))


@pytest.mark.slow
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", PAGES)
def test_page_runs(name: str, engine: Path) -> None:
    if name == "docs/api.md":
        shutil.copytree(engine, "vila-3b-cpu")
    for block in blocks_in_order(REPOSITORY / name):
        if block.language == "python":
            exec(compile(block.text, str(block), "exec"), {"__name__": "__main__"})
            continue
        for command in commands(block):
            if not listed(command.line):
                run(command)


def test_every_reason_is_needed() -> None:
    lines = [
        part.strip()
        for name in PAGES
        for block in blocks(REPOSITORY / name, "console")
        for command in commands(block)
        for part in command.line.split("&&")
    ]
    for beginning in NOT_RUN:
        assert any(line.startswith(beginning) for line in lines), beginning


def test_shown_output_must_be_printed() -> None:
    block = Block(REPOSITORY / "README.md", 1, "console", "$ vila-x   # why\na: 1.5 MB\n…\nb\n")
    (command,) = commands(block)
    assert command.line == "vila-x"
    for printed in ("a: 22 MB\nmore\nb\n", "a: 3,000 MB\nb\n"):
        assert_shown(command, printed)
    for printed in ("b\na: 22 MB\n", "first\na: 1 MB\nb\n", "a: 1 MB\nb\nlast\n", "a: 1 GB\nb\n"):
        with pytest.raises(AssertionError):
            assert_shown(command, printed)
