"""The repository's Markdown files: their links, headings and code blocks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.paths import REPOSITORY

FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.M | re.S)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\((?P<to>[^)\s]+)\)")
IMAGE = re.compile(r"!\[[^\]]*\]\((?P<to>[^)\s]+)\)|<img src=\"(?P<src>[^\"]+)\"")
HEADING = re.compile(r"^#+ +(?P<title>.+)$", re.M)
COMMENT = re.compile(r"\s{2,}# .*$")


@dataclass(frozen=True)
class Block:
    """A fenced block of code: page, line of its first line, language and text."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(REPOSITORY)}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A line `$ …` of a console block and the lines that are shown below it."""

    block: Block
    line: str
    output: tuple[str, ...]


def pages() -> list[Path]:
    """Return every Markdown file of the repository, those of environments excepted."""
    folders = (".", "docs", "benchmarks", "benchmarks/*", "examples/*")
    return sorted(path for folder in folders for path in REPOSITORY.glob(f"{folder}/*.md"))


def blocks(page: Path, language: str) -> Iterator[Block]:
    """Return the blocks of `page` in one language."""
    text = page.read_text("utf-8")
    for match in FENCE.finditer(text):
        if match["language"] == language:
            yield Block(page, text.count("\n", 0, match.start()) + 2, language, match["body"])


def commands(block: Block) -> list[Command]:
    """Return the commands of a console block, without their comments."""
    found: list[tuple[str, list[str]]] = []
    for line in block.text.splitlines():
        if line.startswith("$ "):
            found.append((COMMENT.sub("", line.removeprefix("$ ")), []))
        elif line.strip():
            found[-1][1].append(line.rstrip())
    return [Command(block, line, tuple(output)) for line, output in found]


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of the headings of `page`."""
    text = FENCE.sub("", page.read_text("utf-8"))
    return {_anchor(match["title"]) for match in HEADING.finditer(text)}


def _anchor(title: str) -> str:
    words = re.sub(r"[^\w\- ]", "", title.strip().lower())
    return words.replace(" ", "-")


def links(page: Path) -> Iterator[str]:
    """Return where the links and images of `page` go, those in code blocks excepted."""
    text = FENCE.sub("", page.read_text("utf-8"))
    for match in LINK.finditer(text):
        yield match["to"]
    for match in IMAGE.finditer(text):
        yield match["to"] or match["src"]
