"""Write files and folders that appear whole or not at all; read and hash small and large files."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import signal
import stat
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vila_deploy.utils.errors import VilaDeployError, unreadable

CHUNK_BYTES = 8 << 20
FULL_BELOW_BYTES = 1 << 20
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_APPEARED = {errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR}
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def new_folder(destination: Path, work: Path | None = None) -> Iterator[Path]:
    """Yield an empty folder beside `destination`, renamed there on success, removed on failure.

    Ctrl-C, SIGTERM and SIGHUP leave nothing behind either, and then end the program as usual.

    Args:
        work: an existing folder beside `destination` to make the new one in. It is removed on
            success; remains of an earlier new folder in it are removed at the start.

    Raises:
        VilaDeployError: `destination` exists and is no empty folder, or appears meanwhile, its
            parent does not exist, or something can't be written, as on a full disk.
    """
    check_new(destination)
    # The name is cut, so that the longest legal destination still leaves room for the suffix.
    hidden = destination.parent / f".{destination.name[:32]}.partial-{secrets.token_hex(4)}"
    partial = hidden if work is None else work / "output"
    no_longer_needed = partial
    with _interrupted_once() as ignore_signals:
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            yield partial
            _sync(partial)
            ignore_signals()
            _publish(partial, destination)
            if work is not None:
                # If it is killed now, what is left of `work` is not taken for one to go on from.
                work.rename(hidden)
                no_longer_needed = hidden
        except Exception as error:
            problem = _write_problem(error, work or partial, destination)
            if problem is None:
                raise
            raise problem from error
        finally:
            ignore_signals()
            shutil.rmtree(no_longer_needed, ignore_errors=True)


def check_new(destination: Path, kind: str = "folder") -> None:
    """Raise VilaDeployError if `destination` exists or its parent does not.

    An empty folder is as good as none, unless it is a link or another disk is mounted there.
    """
    inside = f"give a new folder in it, such as {destination / 'NAME'}, or choose another -o"
    if destination.is_symlink():
        what = f"output {kind} exists: it is a link"
        raise VilaDeployError(what, where=destination, fix="remove it or choose another -o")
    if kind == "folder" and _is_mount(destination):
        what = "a disk is mounted there, and a mount point can't be replaced"
        raise VilaDeployError(what, where=destination, fix=inside)
    if os.path.lexists(destination) and not (kind == "folder" and is_empty_folder(destination)):
        raise VilaDeployError(
            f"output {kind} exists", where=destination, fix="remove it or choose another -o"
        )
    if not os.path.isdir(destination.parent):  # noqa: PTH112  Path.is_dir raises on EACCES
        raise VilaDeployError(
            "folder does not exist", where=destination.parent, fix="create it or choose another -o"
        )
    if not os.access(destination.parent, os.W_OK | os.X_OK):
        raise VilaDeployError(
            "cannot write: its folder is read-only for you",
            where=destination,
            fix="check the folder's permissions and its disk, or choose another -o",
        )


def _is_mount(path: Path) -> bool:
    try:
        return bool(path.name) and path.is_mount()
    except OSError:
        return False


def is_empty_folder(path: Path) -> bool:
    """Return whether `path` is a folder with nothing in it, which rename(2) can replace."""
    try:
        replaceable = bool(path.name) and not path.is_symlink() and not path.is_mount()
        return replaceable and not any(path.iterdir())
    except OSError:
        return False


def _publish(partial: Path, destination: Path) -> None:
    """Rename without replacing anything but an empty folder, as rename(2) does at once."""
    check_new(destination)
    try:
        partial.rename(destination)
    except OSError as error:
        if error.errno in _APPEARED:
            check_new(destination)
        raise


def _sync(folder: Path) -> None:
    """Flush every file to the disk, so that not even a power cut shows a folder half filled."""
    for parent, _, names in os.walk(folder):
        for path in (*(Path(parent, name) for name in names), Path(parent)):
            if not path.is_symlink():
                _sync_one(path)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(temporary: Path, destination: Path) -> None:
    """Rename a file within its folder so that a power cut leaves all of the old or of the new."""
    _sync_one(temporary)
    temporary.replace(destination)
    _sync_one(destination.parent)


def write_file(destination: Path, text: str, errors: str = "strict") -> None:
    """Write `text` in UTF-8 into a file that appears whole or not at all, in the place of any."""
    temporary = destination.with_name(f".{destination.name[:32]}.{secrets.token_hex(4)}")
    try:
        temporary.write_text(text, "utf-8", errors)
        replace_file(temporary, destination)
    finally:
        temporary.unlink(missing_ok=True)


def _write_problem(error: Exception, partial: Path, destination: Path) -> VilaDeployError | None:
    """Return the error for the user if `error` came from writing, otherwise None."""
    if isinstance(error, VilaDeployError):
        return None
    # Rust libraries raise their own types, with the errno in the text only.
    in_text = re.search(r"\(os error (\d+)\)", str(error))
    code = error.errno if isinstance(error, OSError) else int(in_text[1]) if in_text else None
    # Others lose the errno altogether: then look at the disk itself.
    if code in _FULL or (code is None and _disk_is_full(destination.parent)):
        return VilaDeployError(
            f"cannot write: {os.strerror(code or errno.ENOSPC)}",
            where=destination,
            fix="free some space or choose another -o",
        )
    if not isinstance(error, OSError):
        return None
    has_name = error.filename is not None
    if has_name and Path(os.fsdecode(error.filename)).is_relative_to(partial):
        what = f"cannot write: {error.strerror}"
    elif not has_name and error.errno in (errno.EIO, errno.EROFS):
        what = f"reading or writing failed: {error.strerror}"
    elif not has_name and re.search(r"requested and \d+ written", str(error)):  # numpy's tofile
        what = f"cannot write: {error}"
    else:
        return None
    fix = "check the folder's permissions and its disk, or choose another -o"
    return VilaDeployError(what, where=destination, fix=fix)


def _disk_is_full(folder: Path) -> bool:
    try:
        return shutil.disk_usage(folder).free < FULL_BELOW_BYTES
    except OSError:
        return False


@contextmanager
def _interrupted_once() -> Iterator[Callable[[], None]]:
    """Let the first signal that ends a program raise, and ignore later ones.

    Otherwise a second Ctrl-C would interrupt the cleaning up after the first one. Yields a function
    that makes all of them ignored. Python runs handlers in the main thread only.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    handlers = {number: signal.getsignal(number) for number in _ENDING_SIGNALS}
    # None is a handler from outside Python, which could not be put back.
    previous = {n: old for n, old in handlers.items() if old not in (signal.SIG_IGN, None)}

    def set_all(handler: Callable[[int, Any], Any] | signal.Handlers) -> None:
        for number in previous:
            signal.signal(number, handler)

    def end_program(signum: int, frame: Any) -> None:
        set_all(signal.SIG_IGN)
        handler = previous[signal.Signals(signum)]
        if not callable(handler):
            raise SystemExit(128 + signum)
        handler(signum, frame)
        set_all(end_program)

    try:
        set_all(end_program)
        yield lambda: set_all(signal.SIG_IGN)
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def sha256_file(path: Path) -> str:
    """Return the hex SHA-256 of a file's bytes."""
    digest, chunk = hashlib.sha256(), memoryview(bytearray(CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(chunk):
            digest.update(chunk[:size])
    return digest.hexdigest()


def canonical_json(value: Any) -> str:
    """Return `value` as JSON in the one way of this project: equal content is equal bytes."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    # Halves of characters, as file names and others' JSON may hold, are in no encoding.
    return _LONE_SURROGATE.sub(lambda half: f"\\u{ord(half[0]):04x}", text)


def read_small_file(path: Path, *, limit_bytes: int) -> bytes:
    """Return the bytes of a regular file; reading anything else, such as a pipe, could block.

    Raises:
        VilaDeployError: missing, no regular file, unreadable, or larger than `limit_bytes`.
    """
    fix = "download this file again"
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise VilaDeployError("is no regular file", where=path, fix=fix)
        with path.open("rb") as file:
            content = file.read(limit_bytes + 1)
    except OSError as error:
        raise unreadable(error, path) from error
    if len(content) > limit_bytes:
        raise VilaDeployError(f"larger than {limit_bytes} bytes", where=path, fix=fix)
    return content


def read_json_object(path: Path, *, limit_bytes: int = 16 << 20) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        VilaDeployError: not readable, larger than `limit_bytes`, or refused by
            `parse_json_object`.
    """
    return parse_json_object(read_small_file(path, limit_bytes=limit_bytes), path)


def parse_json_object(content: bytes, source: str | Path) -> dict[str, Any]:
    """Return the JSON object in `content`; `source` names it in messages.

    Raises:
        VilaDeployError: not UTF-8, not JSON, a key that occurs twice, or not an object.
    """
    fix = "download this file again"
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise VilaDeployError(f"is not valid JSON ({error})", where=source, fix=fix) from error
    if not isinstance(value, dict):
        raise VilaDeployError("holds no JSON object", where=source, fix=fix)
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"key {twice[:60]!r} occurs twice")
    return values
