"""Read the files of a task: JSON, JSON lines and images, with one line for whatever is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from vila_deploy.harness.question import TaskImage
from vila_deploy.processing.images import URL, read_image
from vila_deploy.utils.errors import VilaDeployError, short
from vila_deploy.utils.fields import Fields

MAX_FILE_BYTES = 512 << 20


def find_file(folder: Path, *names: str) -> Path:
    """Return the first of these files that `folder` has.

    Raises:
        VilaDeployError: it has none of them.
    """
    for name in names:
        if (folder / name).is_file():
            return folder / name
    what = "no such file" if folder.is_dir() else "no such folder"
    where = folder / names[0] if folder.is_dir() else folder
    known = " or ".join(names)
    raise VilaDeployError(what, where=where, fix=f"give the folder that holds {known}")


def read_text(path: Path) -> str:
    """Return a file's text, without the byte order mark of some Windows programs."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise VilaDeployError(
                f"is larger than {MAX_FILE_BYTES >> 20} MiB", where=path, fix="split it"
            )
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        what = f"cannot be read: {error.strerror}"
        raise VilaDeployError(what, where=path, fix="check the path") from error
    except UnicodeDecodeError as error:
        what = f"is not UTF-8 (byte {error.start})"
        raise VilaDeployError(what, where=path, fix="save it as UTF-8") from error


def parse_json(text: str, where: str | Path) -> Any:
    """Return what a JSON text holds."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise VilaDeployError("is not valid JSON", where=where, fix="correct it") from error


def rows_of(path: Path) -> Iterator[Fields]:
    """Yield the objects of a .jsonl file.

    Raises:
        VilaDeployError: not UTF-8, a line that is no JSON object, or no line at all.
    """
    found = False
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            found = True
            yield as_row(parse_json(line, f"{path}: line {number}"), path, f"line {number}")
    if not found:
        raise VilaDeployError("holds no rows", where=path, fix="write one JSON object a line")


def as_row(value: Any, path: Path, place: str) -> Fields:
    """Return an object of a file; `place` says where in it."""
    if not isinstance(value, dict):
        raise VilaDeployError(
            f"is no JSON object: {short(value)}", where=f"{path}: {place}", fix="correct it"
        )
    return Fields(value, path, f"{place}: ")


def identifier(row: Fields, key: str) -> str:
    """Return a row's number or name as text."""
    value = row.values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise row.error(key, f"must be a number or a string, found {short(value)}")
    return str(value)


def texts(row: Fields, key: str) -> tuple[str, ...]:
    """Return a list of strings that has at least one."""
    value = row.values.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        raise row.error(key, f"must be a list of strings, found {short(value)}")
    return tuple(value)


def file_image(folder: Path, name: str, row: Fields, key: str = "image") -> TaskImage:
    """Return the image `name` below `folder`, which must be there.

    Raises:
        VilaDeployError: no such file, or no path at all.
    """
    if URL.match(name):
        raise row.error(key, f"is a URL: {short(name)}", "download it and name the file")
    path = folder / name
    try:
        there = bool(name) and path.is_file()
    except (OSError, ValueError):
        there = False
    if not there:
        raise row.error(key, f"no such image: {short(str(path))}", "put it there, or correct it")
    return TaskImage(str(path), partial(read_image, path))
