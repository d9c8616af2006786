"""A stand-in of the Hugging Face Hub on the loopback: what huggingface_hub asks, and no more.

Files of weights lie where git-lfs would have them: `resolve` redirects to another path, which takes
byte ranges. The commit is a hash over names and sizes, so that a changed folder is another commit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

LFS_SUFFIXES = (".safetensors", ".pt", ".bin")
CHUNK_BYTES = 64 << 10


@dataclass
class Hub:
    """The server's repositories and how it behaves; tests change the fields while it runs.

    Args:
        repositories: `owner/name` → folder with its files.
        renamed: old name → new one.
        gated: names whose files are refused.
        tags: revisions that every repository has besides main and its commit.
        ranges: whether byte ranges are answered as such.
        pause: seconds between chunks of a file of weights.
        hold_after: bytes after which answers with weights wait for `released`, once `held` is set.
        break_after: bytes after which each answer with weights breaks off.
        status: that answers everything, e.g. 503.
        requests: (method, path, Range) of every request, in order.
        sent: bytes of file contents that were sent, by path within the repository.
    """

    address: str = ""
    repositories: dict[str, Path] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    tags: tuple[str, ...] = ("v1", "refs/pr/1")
    lfs: bool = True
    ranges: bool = True
    pause: float = 0.0
    hold_after: int | None = None
    held: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)
    break_after: int | None = None
    status: int | None = None
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)

    def commit(self, name: str) -> str:
        root = self.repositories[name]
        listing = [(path, (root / path).stat().st_size) for path in self.paths(name)]
        return hashlib.sha1(json.dumps(listing).encode()).hexdigest()

    def paths(self, name: str) -> list[str]:
        root = self.repositories[name]
        return sorted(f.relative_to(root).as_posix() for f in root.rglob("*") if f.is_file())

    def has(self, name: str, revision: str) -> bool:
        return revision in ("main", self.commit(name), *self.tags)

    def forget(self) -> None:
        """Forget the requests so far and what was sent."""
        self.requests.clear()
        self.sent.clear()

    def sent_weights(self) -> int:
        return sum(size for path, size in self.sent.items() if path.endswith(LFS_SUFFIXES))


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """Serve an empty hub at `Hub.address` until the end of the block."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if self.hub.status is not None:
                self._error(self.hub.status, None)
            elif path.startswith("api/models/"):
                self._api(path.removeprefix("api/models/"))
            elif path.startswith("lfs/"):
                _, owner, name, file = path.split("/", 3)
                self._file(f"{owner}/{name}", file)
            elif path.count("/") >= 4:
                self._resolve(path)
            else:
                self._error(404, None)

    def _api(self, path: str) -> None:
        owner, name, *rest = path.split("/", 3)
        repository = f"{owner}/{name}"
        if repository in self.hub.renamed:
            self._redirect("/api/models/" + "/".join([self.hub.renamed[repository], *rest]), 307)
        elif repository not in self.hub.repositories:
            self._error(401, "RepoNotFound")
        elif rest and not self.hub.has(repository, rest[1]):
            self._error(404, "RevisionNotFound")
        elif rest and rest[0] == "tree":
            self._json([{"type": "file", **self._entry(repository, path)}
                        for path in self.hub.paths(repository)])  # fmt: skip
        else:
            siblings = []
            for path in self.hub.paths(repository):
                entry = self._entry(repository, path)
                lfs = entry.get("lfs")
                shown = lfs and {"sha256": lfs["oid"], "size": lfs["size"], "pointerSize": 130}
                siblings.append({"rfilename": path, "size": entry["size"], "blobId": entry["oid"],
                                 **({"lfs": shown} if shown else {})})  # fmt: skip
            self._json({"id": repository, "sha": self.hub.commit(repository), "siblings": siblings})

    def _entry(self, repository: str, path: str) -> dict[str, Any]:
        file = self.hub.repositories[repository] / path
        size = file.stat().st_size
        entry: dict[str, Any] = {"path": path, "size": size, "oid": self._etag(file)}
        if self._is_lfs(path):
            digest = _sha256(file, size, file.stat().st_mtime_ns)
            entry["lfs"] = {"oid": digest, "size": size, "pointerSize": 130}
        return entry

    def _is_lfs(self, path: str) -> bool:
        return self.hub.lfs and path.endswith(LFS_SUFFIXES)

    def _etag(self, file: Path) -> str:
        content = file.read_bytes() if file.stat().st_size < 1 << 20 else str(file).encode()
        return hashlib.sha1(content).hexdigest()

    def _resolve(self, path: str) -> None:
        """Answer OWNER/NAME/resolve/REVISION/PATH; a revision here has no slash."""
        owner, name, _, revision, file = path.split("/", 4)
        repository = f"{owner}/{name}"
        if repository in self.hub.renamed:
            new = self.hub.renamed[repository]
            self._redirect(f"/{new}/resolve/{revision}/{file}", 307)
        elif repository not in self.hub.repositories:
            self._error(401, "RepoNotFound")
        elif repository in self.hub.gated:
            self._error(403, "GatedRepo")
        elif not self.hub.has(repository, revision):
            self._error(404, "RevisionNotFound")
        elif file not in self.hub.paths(repository):
            self._error(404, "EntryNotFound")
        elif self._is_lfs(file):
            entry = self._entry(repository, file)
            headers = {"X-Linked-Etag": f'"{entry["lfs"]["oid"]}"',
                       "X-Linked-Size": str(entry["size"]),
                       "X-Repo-Commit": self.hub.commit(repository)}  # fmt: skip
            # Another host than the hub's, as huggingface_hub tells the two apart by it.
            storage = self.hub.address.replace("127.0.0.1", "localhost")
            self._redirect(f"{storage}/lfs/{repository}/{file}", 302, headers)
        else:
            self._file(repository, file)

    def _file(self, repository: str, path: str) -> None:
        file = self.hub.repositories[repository] / path
        size, begin, end = file.stat().st_size, 0, file.stat().st_size
        asked = self.headers.get("Range")
        if asked and self.hub.ranges:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            begin, end = int(first), min(size, int(last) + 1 if last else size)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
        else:
            self.send_response(200)
        self.send_header("ETag", f'"{self._etag(file)}"')
        self.send_header("X-Repo-Commit", self.hub.commit(repository))
        self.send_header("Content-Length", str(end - begin))
        self.end_headers()
        if self.command == "GET":
            self._send(file, path, begin, end)

    def _send(self, file: Path, path: str, begin: int, end: int) -> None:
        weights, start = path.endswith(LFS_SUFFIXES), begin
        with file.open("rb") as source:
            source.seek(begin)
            while begin < end:
                limit = self.hub.break_after
                if weights and limit is not None and begin - start >= limit:
                    self.close_connection = True
                    return
                chunk = source.read(min(CHUNK_BYTES, end - begin))
                self.wfile.write(chunk)
                self.hub.sent[path] = self.hub.sent.get(path, 0) + len(chunk)
                begin += len(chunk)
                held = self.hub.hold_after
                if weights and held is not None and self.hub.sent_weights() >= held:
                    self.hub.held.set()
                    self.hub.released.wait()
                if weights and self.hub.pause:
                    time.sleep(self.hub.pause)

    def _json(self, value: Any) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def _redirect(self, location: str, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Location": location, **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _error(self, status: int, code: str | None) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


_DIGESTS: dict[tuple[Path, int, int], str] = {}


def _sha256(file: Path, size: int, changed: int) -> str:
    key = (file, size, changed)
    if key not in _DIGESTS:
        _DIGESTS[key] = hashlib.sha256(file.read_bytes()).hexdigest()
    return _DIGESTS[key]


@contextmanager
def use_hub(hub: Hub, cache: Path) -> Iterator[None]:
    """Let this process take `hub` for the Hugging Face Hub and `cache` for its empty cache."""
    from huggingface_hub import constants

    from vila_deploy.checkpoint.hub import header_copy, repository

    values = {
        "ENDPOINT": hub.address,
        "HF_HUB_CACHE": str(cache),
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.address + "/{repo_id}/resolve/{revision}/{filename}",
    }
    cache.mkdir(parents=True, exist_ok=True)
    repository.find_repository.cache_clear()
    header_copy._pieces.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setattr(constants, name, value)
        yield
