"""Look at a checkpoint on the hub without its weights: config files, and headers of tensors.

What comes of it is a folder like the checkpoint's, in which a file of weights is its header and
then a hole of the right size. So the code that checks a checkpoint on the disk checks this one too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from vila_deploy.checkpoint.checksums import CHECKSUM_FILE
from vila_deploy.checkpoint.hub.problems import one_line
from vila_deploy.checkpoint.hub.repository import (
    TIMEOUT_SECONDS,
    RemoteFile,
    Repository,
    is_config,
)
from vila_deploy.checkpoint.hub.weights import pickled_files, weight_files
from vila_deploy.checkpoint.safetensors_header import MAX_HEADER_BYTES
from vila_deploy.utils.errors import VilaDeployError

THREADS = 4
# More than most headers of a shard have.
FIRST_BYTES = 64 << 10
# Of a file of torch.save: the pickle with the tensors' shapes, and the archive's directory.
PICKLE_HEAD_BYTES = PICKLE_TAIL_BYTES = 1 << 20

Pieces = tuple[tuple[int, bytes], ...]
"""Parts of a file: the position of each, and its bytes."""


@contextmanager
def header_copy(repository: Repository) -> Iterator[Path]:
    """Yield a folder with the repository's config files and the headers of its weights.

    Nothing may read tensors out of it. It is removed at the end.

    Raises:
        VilaDeployError: the hub can't be reached; and errors from inside the block name the
            repository in place of the folder.
    """
    weights = weight_files(repository)
    headers = _headers(repository, weights)
    with tempfile.TemporaryDirectory(prefix="vila-hub-") as scratch:
        root = Path(scratch) / repository.name.repository.rpartition("/")[2]
        for path in repository.files:
            if is_config(path, repository.files) and path != CHECKSUM_FILE:
                _link(repository.folder / path, root / path)
        for path, file in {**pickled_files(repository), **weights}.items():
            if (repository.folder / path).exists():
                _link(repository.folder / path, root / path)
            else:
                _write_pieces(root / path, file.size, headers.get(path, ()))
        try:
            yield root
        except VilaDeployError as error:
            texts = (error.what, error.where, error.fix)
            what, where, fix = (
                None if text is None else str(text).replace(str(root), str(repository.name))
                for text in texts
            )
            raise VilaDeployError(what or "", where=where, fix=fix) from error


def _link(source: Path, destination: Path) -> None:
    if source.exists():
        destination.parent.mkdir(parents=True, exist_ok=True)
        destination.symlink_to(source)


def _write_pieces(path: Path, size: int, pieces: Pieces) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for position, content in pieces:
            file.seek(position)
            file.write(content)
        file.truncate(size)


def _headers(repository: Repository, weights: dict[str, RemoteFile]) -> dict[str, Pieces]:
    """Return what is needed of each file of weights that the cache lacks."""
    absent = repository.missing(weights)
    if absent and repository.offline:
        raise VilaDeployError(
            f"{next(iter(absent))} is not in the hub's cache, and there is no connection",
            where=str(repository.name),
            fix="connect and run the same command again; what was fetched before is kept",
        )
    with one_line(repository.name), ThreadPoolExecutor(THREADS) as threads:
        pieces = threads.map(
            lambda item: _pieces(
                repository.name.repository, repository.commit, item[0], item[1].size
            ),
            absent.items(),
        )
        return dict(zip(absent, pieces, strict=True))


@lru_cache(maxsize=256)
def _pieces(repository: str, commit: str, path: str, size: int) -> Pieces:
    """Return the parts of one file that say which tensors it holds."""
    from huggingface_hub import hf_hub_url

    url = hf_hub_url(repository, path, revision=commit)
    if not path.endswith(".safetensors"):
        head = _read_range(url, 0, min(PICKLE_HEAD_BYTES, size))
        tail = max(len(head), size - PICKLE_TAIL_BYTES)
        return ((0, head), (tail, _read_range(url, tail, size)))
    head = _read_range(url, 0, min(FIRST_BYTES, size))
    end = 8 + int.from_bytes(head[:8], "little")
    # A header that is too long for its file is refused by whoever reads it.
    if len(head) < end <= min(size, 8 + MAX_HEADER_BYTES):
        head += _read_range(url, len(head), end)
    return ((0, head),)


def _read_range(url: str, begin: int, end: int) -> bytes:
    """Return bytes `begin` to `end` of a file, and read no more even of a server without ranges."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    if begin >= end:
        return b""
    headers = {**build_hf_headers(), "Range": f"bytes={begin}-{end - 1}"}
    headers["Accept-Encoding"] = "identity"
    content = bytearray()
    session = get_session()
    with session.stream("GET", url, headers=headers, timeout=TIMEOUT_SECONDS) as response:
        hf_raise_for_status(response)
        skipped = 0 if response.status_code == 206 else begin
        if skipped > MAX_HEADER_BYTES:
            raise OSError("the server gives whole files only")
        for chunk in response.iter_bytes():
            content += chunk
            if len(content) >= skipped + end - begin:
                break
    return bytes(content[skipped : skipped + end - begin])
