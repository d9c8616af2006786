"""The rows of vila-chat --batch: those of a .jsonl file, or one for each image in a folder."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vila_deploy.processing.images import IMAGE_SUFFIXES, URL
from vila_deploy.utils.errors import VilaDeployError, short

TEXT, IMAGE, VIDEO = "text", "image", "video"
OUTPUT, ERROR = "output", "error"
RESULT_KEYS = (OUTPUT, ERROR, "finish_reason", "prompt_tokens", "output_tokens")
CAPTION_QUESTION = "Describe this image."
_FIX = 'write one JSON object a line: {"image": "cat.jpg", "text": "What is this?"}'


@dataclass(frozen=True)
class BatchRow:
    """A question of its own, with nothing before it.

    Args:
        keys: the row as the user wrote it, which its result repeats.
        images, videos: paths.
    """

    keys: dict[str, Any]
    question: str
    images: tuple[Path, ...] = ()
    videos: tuple[Path, ...] = ()


def read_rows(source: Path, question: str | None) -> list[BatchRow]:
    """Return the rows of a .jsonl file, or one for each image in a folder and those below it.

    Args:
        question: asked where a row has no text of its own.

    Raises:
        VilaDeployError: nothing there, no rows, or a row that can't be one.
    """
    if source.is_dir():
        rows = list(_folder_rows(source, CAPTION_QUESTION if question is None else question))
        if not rows:
            raise VilaDeployError(
                f"holds no image ({', '.join(IMAGE_SUFFIXES)})", where=source, fix="add some"
            )
        return rows
    try:
        # Some Windows programs begin a file with a byte order mark.
        lines = source.read_bytes().decode("utf-8-sig").split("\n")
    except OSError as error:
        what = f"cannot be read: {error.strerror}"
        fix = "give a .jsonl file or a folder of images"
        raise VilaDeployError(what, where=source, fix=fix) from error
    except UnicodeDecodeError as error:
        what = f"is not UTF-8 (byte {error.start})"
        raise VilaDeployError(what, where=source, fix=_FIX) from error
    rows = [
        _row(line, question, source.parent, f"{source}: line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not rows:
        raise VilaDeployError("holds no rows", where=source, fix=_FIX)
    return rows


def numbered(rows: Sequence[BatchRow]) -> list[str]:
    """Return a name for each row by its content alone, equal rows by their order among them."""
    seen: Counter[str] = Counter()
    names = []
    for row in rows:
        content = json.dumps([row.keys, row.question], sort_keys=True)
        seen[content] += 1
        names.append(f"{seen[content]} {content}")
    return names


def _folder_rows(folder: Path, question: str) -> Iterator[BatchRow]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(parent, name)
            # macOS leaves ._photo.jpg files.
            if path.suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."):
                keys = {IMAGE: str(path.relative_to(folder)), TEXT: question}
                yield BatchRow(keys, question, (path,))


def _row(line: str, question: str | None, folder: Path, where: str) -> BatchRow:
    try:
        keys = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise VilaDeployError("is not valid JSON", where=where, fix=_FIX) from error
    if not isinstance(keys, dict):
        raise VilaDeployError(f"is no JSON object: {short(keys)}", where=where, fix=_FIX)
    for key in RESULT_KEYS:
        if key in keys:
            raise VilaDeployError(
                f"has the key {key!r}, which is the result's", where=where, fix="rename it"
            )
    text = keys.get(TEXT, question)
    if text is None:
        fix = f"add {TEXT!r}, or ask the same of all with -p QUESTION"
        raise VilaDeployError("has no question", where=where, fix=fix)
    if not isinstance(text, str):
        raise VilaDeployError(f"{TEXT} is no string: {short(text)}", where=where, fix=_FIX)
    images, videos = (_paths(keys, key, folder, where) for key in (IMAGE, VIDEO))
    return BatchRow(keys, text, images, videos)


def _paths(keys: dict[str, Any], key: str, folder: Path, where: str) -> tuple[Path, ...]:
    value = keys.get(key)
    names = [] if value is None else value if isinstance(value, list) else [value]
    for name in names:
        if not isinstance(name, str):
            raise VilaDeployError(f"{key} is no path: {short(name)}", where=where, fix=_FIX)
    # A URL stays one, for the error that says so.
    return tuple(Path(name) if URL.match(name) else folder / name for name in names)
