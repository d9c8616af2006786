"""SHA256SUMS at the top of a checkpoint, in the format of sha256sum."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from vila_deploy.utils.errors import VilaDeployError, short
from vila_deploy.utils.files import read_small_file, sha256_file

CHECKSUM_FILE = "SHA256SUMS"
LIMIT_BYTES = 1 << 20
# An AWQ release of VILA has its language model in a .pt.
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".gguf")
# As sha256sum writes them, and with --tag as BSD does.
_LINE = re.compile(r"(?P<digest>[0-9a-fA-F]{64})[ \t]+\*?(?P<path>\S.*)")
_TAGGED_LINE = re.compile(r"SHA256 ?\((?P<path>.+)\) ?= ?(?P<digest>[0-9a-fA-F]{64})")


def write_checksums(root: Path, known: Mapping[Path, str] = MappingProxyType({})) -> None:
    """Write SHA256SUMS over every file of weights below `root`.

    Args:
        known: digests of files that need not be read again.
    """
    lines = [
        f"{known.get(file) or sha256_file(file)}  {file.relative_to(root).as_posix()}\n"
        for file in sorted(root.rglob("*"))
        if file.suffix in WEIGHT_SUFFIXES
    ]
    (root / CHECKSUM_FILE).write_text("".join(lines), "utf-8")


def read_checksums(root: Path) -> dict[str, str] | None:
    """Return path relative to `root` → hex digest; None where there is no SHA256SUMS.

    Empty lines, comments and files that are no weights are left out.

    Raises:
        VilaDeployError: a line that is malformed, leaves the folder, or contradicts another.
    """
    source = root / CHECKSUM_FILE
    if not os.path.lexists(source):
        return None
    content = read_small_file(source, limit_bytes=LIMIT_BYTES)
    digests: dict[str, str] = {}
    for number, line in enumerate(content.decode("utf-8-sig", "replace").splitlines(), 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = _LINE.fullmatch(text) or _TAGGED_LINE.fullmatch(text)
        path, digest = (match["path"], match["digest"].lower()) if match else ("", "")
        path = path.removeprefix("./")
        if not _is_inside(path) or digests.get(path, digest) != digest:
            raise VilaDeployError(
                f"must be a SHA-256 and the path of a file here, found {short(line)}",
                where=f"{source}: line {number}",
                fix="download this file again, or remove it to go without checksums",
            )
        digests[path] = digest
    return {path: digest for path, digest in digests.items() if path.endswith(WEIGHT_SUFFIXES)}


def _is_inside(path: str) -> bool:
    inside = not path.startswith("/") and not set(path) & set("\\:\0")
    return inside and not {"", ".", ".."} & set(path.split("/"))


def verify_checksums(root: Path, files: Iterable[Path]) -> dict[Path, str] | None:
    """Hash `files`; None where there is no SHA256SUMS.

    Returns:
        File → hex digest, each as SHA256SUMS says.

    Raises:
        ChecksumError: a file with other content.
        VilaDeployError: a file that SHA256SUMS does not list, or SHA256SUMS itself is wrong.
    """
    expected = read_checksums(root)
    if expected is None:
        return None
    found: dict[Path, str] = {}
    for file in files:
        path = file.relative_to(root).as_posix()
        if path not in expected:
            raise VilaDeployError(
                f"does not list {path}",
                where=root / CHECKSUM_FILE,
                fix="download this file again, or remove it to go without checksums",
            )
        found[file] = sha256_file(file)
        if found[file] != expected[path]:
            raise ChecksumError(file, found[file], expected[path])
    return found


class ChecksumError(VilaDeployError):
    """The content of `file` is not what SHA256SUMS says."""

    def __init__(self, file: Path, found: str, expected: str):
        self.file = file
        super().__init__(
            f"content has changed: SHA-256 {found[:16]}…, {CHECKSUM_FILE} says {expected[:16]}…",
            where=file,
            fix="download this file again",
        )
