"""Fetch a repository's files of weights into the hub's cache, each going on where it stopped.

huggingface_hub itself starts a file from its beginning again, which may have 10 GB. So the bytes
are fetched here, into the place that its cache has for them, and huggingface_hub adds the link.
"""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

from vila_deploy.checkpoint.hub.problems import AGAIN, is_passing, one_line
from vila_deploy.checkpoint.hub.repository import RemoteFile, Repository, quiet
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.files import sha256_file
from vila_deploy.utils.progress import progress

THREADS = 4
ATTEMPTS, PAUSE_SECONDS = 5, 1.0
UNIT_BYTES = 1_000_000
_ETAG = re.compile(r"[\w.-]+", re.ASCII)

OnBytes = Callable[[int], None]


def fetch_files(repository: Repository, files: Mapping[str, RemoteFile]) -> None:
    """Fetch those of `files` that the cache lacks; what an earlier run left unfinished goes on.

    Raises:
        VilaDeployError: too little space, no access, no connection, or other bytes than the hub
            announces.
    """
    absent = repository.missing(files)
    if not absent:
        return
    check_space(repository, absent)
    stop = threading.Event()
    with (
        one_line(repository.name),
        quiet(),
        _byte_progress(absent, stop) as on_bytes,
        ThreadPoolExecutor(THREADS) as threads,
    ):
        jobs = [
            threads.submit(_fetch, repository, path, file, on_bytes)
            for path, file in absent.items()
        ]
        try:
            _finish(jobs)
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(f"what was fetched is kept; {AGAIN}") from error
        finally:
            stop.set()
            threads.shutdown(cancel_futures=True)


def check_space(repository: Repository, files: Mapping[str, RemoteFile]) -> None:
    """Raise VilaDeployError if the disk of the hub's cache has no room for `files`."""
    cache = _cache(repository)
    begun = sum(path.stat().st_size for path in (cache / "blobs").glob("*.incomplete"))
    needed = sum(file.size for file in files.values()) - begun
    free = shutil.disk_usage(cache).free
    if free < needed:
        raise VilaDeployError(
            f"{repository.name} needs {needed / 1e6:,.1f} MB here, {free / 1e6:,.1f} MB are free",
            where=cache.parent,
            fix="free some space, or set HF_HOME to a folder on another disk",
        )


def _cache(repository: Repository) -> Path:
    """Return the repository's folder in the hub's cache, above blobs/ and snapshots/."""
    return repository.folder.parent.parent


def _finish(jobs: list[Future[None]]) -> None:
    """Wait for all jobs, or raise what the first one that fails has raised."""
    done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
    for job in done:
        job.result()


@contextmanager
def _byte_progress(files: Mapping[str, RemoteFile], stop: threading.Event) -> Iterator[OnBytes]:
    """Yield a function that counts bytes, for several threads; once `stop` is set, it raises."""
    total = sum(file.size for file in files.values())
    lock, done = threading.Lock(), 0
    with progress(total // UNIT_BYTES, "fetching, MB") as advance:

        def on_bytes(count: int) -> None:
            nonlocal done
            if stop.is_set():
                raise InterruptedError
            with lock:
                before, done = done // UNIT_BYTES, done + count
                if done // UNIT_BYTES != before:
                    advance("", done // UNIT_BYTES - before)

        yield on_bytes


def _fetch(repository: Repository, path: str, file: RemoteFile, on_bytes: OnBytes) -> None:
    """Fetch one file and link it into the commit's folder."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.utils import WeakFileLock

    url = hf_hub_url(repository.name.repository, path, revision=repository.commit)
    etag = get_hf_file_metadata(url).etag
    if etag and _ETAG.fullmatch(etag):
        cache = _cache(repository)
        blob = cache / "blobs" / etag
        # The locks that huggingface_hub takes for the same file.
        lock = cache.parent / ".locks" / cache.name / f"{etag}.lock"
        for folder in (blob.parent, lock.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            if not blob.exists():
                _fetch_blob(repository, url, file, blob, on_bytes)
    hf_hub_download(repository.name.repository, path, revision=repository.commit)


def _fetch_blob(
    repository: Repository, url: str, file: RemoteFile, blob: Path, on_bytes: OnBytes
) -> None:
    partial = blob.with_name(f"{blob.name}.incomplete")
    if partial.exists() and partial.stat().st_size > file.size:
        partial.unlink()
    on_bytes(_size(partial))
    attempts = ATTEMPTS
    while (begin := _size(partial)) < file.size:
        try:
            _append(url, partial, begin, on_bytes)
        except Exception as error:
            # As long as bytes arrive, a connection that breaks now and then is no problem.
            attempts = ATTEMPTS if _size(partial) > begin else attempts - 1
            if not attempts or not is_passing(error):
                raise
            time.sleep(PAUSE_SECONDS)
    if _size(partial) > file.size or (file.sha256 and sha256_file(partial) != file.sha256):
        partial.unlink()
        raise VilaDeployError(
            f"{url} arrived with other bytes than the hub announces",
            where=str(repository.name),
            fix="run the same command again, which fetches this file anew",
        )
    partial.replace(blob)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _append(url: str, partial: Path, begin: int, on_bytes: OnBytes) -> None:
    """Append to `partial`, which has `begin` bytes, what the server gives of the rest.

    Raises:
        EOFError: nothing at all came.
    """
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if begin:
        headers["Range"] = f"bytes={begin}-"
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
        hf_raise_for_status(response)
        with partial.open("ab") as output:
            if begin and response.status_code != 206:  # the server gives whole files only
                output.truncate(0)
                on_bytes(-begin)
            for chunk in response.iter_bytes():
                output.write(chunk)
                on_bytes(len(chunk))
    if _size(partial) <= begin:
        raise EOFError
