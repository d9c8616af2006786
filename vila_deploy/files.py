"""Files and folders that appear whole or not at all, and their checksums."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vila_deploy.errors import VilaDeployError

CHUNK_BYTES = 8 << 20


@contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """Yields an empty folder beside `destination`, renamed there on success, removed on failure.

    Raises:
        VilaDeployError: if `destination` exists, its parent does not, or the disk is full.
    """
    if os.path.lexists(destination):
        raise VilaDeployError(
            "output folder exists", where=destination, fix="remove it or choose another -o"
        )
    if not destination.parent.is_dir():
        raise VilaDeployError(
            "folder does not exist", where=destination.parent, fix="create it or choose another -o"
        )
    partial = destination.parent / f".{destination.name}.partial-{secrets.token_hex(4)}"
    try:
        partial.mkdir()
        yield partial
        partial.rename(destination)
    except OSError as error:
        raise VilaDeployError(
            f"cannot write: {error.strerror or error}",
            where=destination,
            fix="free some space or choose another -o",
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def canonical_json(value: Any) -> str:
    """The one way in which this project writes JSON: equal content is equal bytes."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def read_json_object(path: Path, *, limit_bytes: int = 16 << 20) -> dict[str, Any]:
    """Reads a JSON file that must hold an object.

    Raises:
        VilaDeployError: missing, larger than `limit_bytes`, not UTF-8, not JSON, or not an object.
    """
    fix = "download this file again"
    try:
        if path.stat().st_size > limit_bytes:
            raise VilaDeployError(f"larger than {limit_bytes} bytes", where=path, fix=fix)
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise VilaDeployError(f"cannot be read: {error.strerror}", where=path, fix=fix) from error
    except (ValueError, RecursionError) as error:
        raise VilaDeployError(f"is not valid JSON ({error})", where=path, fix=fix) from error
    if not isinstance(value, dict):
        raise VilaDeployError("holds no JSON object", where=path, fix=fix)
    return value
