"""Ask the hub for a repository's commit and files; fetch its config files into the hub's cache."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vila_deploy.checkpoint.checksums import CHECKSUM_FILE
from vila_deploy.checkpoint.folder_layout import PARTS
from vila_deploy.checkpoint.hub.name import HubName
from vila_deploy.checkpoint.hub.problems import one_line, transport_error
from vila_deploy.checkpoint.trtllm_sharding import FOLDER as TRTLLM
from vila_deploy.utils.errors import VilaDeployError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

TIMEOUT_SECONDS = 10.0
# The largest tokenizers have about 35 MB; what is larger is no file of configs.
MAX_CONFIG_BYTES = 64 << 20
CONFIG_SUFFIXES = (".json", ".model", ".txt", ".jinja")
ROOT_FILES = ("config.json", "README.md", "report.json", CHECKSUM_FILE)
# Logs of training, which can be large.
UNUSED = ("trainer_state.json", "all_results.json", "train_results.json")
# Names that need no escaping anywhere; others belong to no checkpoint.
_PLAIN = re.compile(r"[A-Za-z0-9_][\w.+-]*(/[A-Za-z0-9_][\w.+-]*)?", re.ASCII)


@dataclass(frozen=True)
class RemoteFile:
    """Size of a file of a repository and, where git-lfs keeps it, its SHA-256."""

    size: int
    sha256: str | None = None


@dataclass(frozen=True)
class Repository:
    """A repository at one commit, its config files in the hub's cache.

    Args:
        name: as the user asks for it, which the hub redirects where it was renamed.
        files: path within the repository → file; offline, those that the cache holds.
        folder: of this commit in the hub's cache.
        offline: the hub wasn't asked, or could not be reached.
    """

    name: HubName
    commit: str
    files: Mapping[str, RemoteFile]
    folder: Path
    offline: bool = False

    def missing(self, files: Mapping[str, RemoteFile]) -> dict[str, RemoteFile]:
        """Return those of `files` that aren't in the cache yet."""
        return {path: file for path, file in files.items() if not (self.folder / path).exists()}


@lru_cache(maxsize=8)
def find_repository(name: HubName) -> Repository:
    """Return a repository as it is now, with its config files fetched.

    Without a connection, and with HF_HUB_OFFLINE, that is what the cache holds. Asked for again by
    the same process, it is the same commit.

    Raises:
        VilaDeployError: missing, gated, no such revision, no checkpoint, or no connection and not
            in the cache.
    """
    with one_line(name):
        info = _ask(name)
        return _cached(name) if info is None else _online(name, info)


def _ask(name: HubName) -> ModelInfo | None:
    """Return what the hub says of it; None where there is no connection, or the hub is down."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return HfApi().model_info(
            name.repository, revision=name.revision, timeout=TIMEOUT_SECONDS, files_metadata=True
        )
    except OfflineModeIsEnabled:
        return None
    except HfHubHTTPError as error:
        if error.response.status_code < 500:
            raise
        return None
    except transport_error():
        return None


def _online(name: HubName, info: ModelInfo) -> Repository:
    if info.id and info.id != name.repository:
        print(f"{name.repository} is now called {info.id}", file=sys.stderr)
    files = _files(info)
    if "config.json" not in files:
        raise VilaDeployError(
            "holds no config.json, so it is no checkpoint",
            where=str(name),
            fix="give a repository with llm/, vision_tower/ and mm_projector/",
        )
    configs = [path for path in files if is_config(path, files)]
    for path in configs:
        if files[path].size > MAX_CONFIG_BYTES:
            raise VilaDeployError(
                f"has {files[path].size / 1e6:,.0f} MB, which no config file has",
                where=f"{name}: {path}",
                fix="use a repository that you trust",
            )
    # By the name of the revision, so that the cache knows what it stood for.
    folder = _snapshot(name, {"allow_patterns": configs})
    if info.sha != folder.name:
        raise VilaDeployError("changed just now", where=str(name), fix="run the command again")
    return Repository(name, folder.name, files, folder)


def _files(info: ModelInfo) -> dict[str, RemoteFile]:
    files = {}
    for sibling in info.siblings or ():
        size = sibling.lfs.size if sibling.lfs else sibling.size
        digest = sibling.lfs.sha256 if sibling.lfs else None
        if _PLAIN.fullmatch(sibling.rfilename) and size is not None:
            files[sibling.rfilename] = RemoteFile(size, digest)
    return files


def _cached(name: HubName) -> Repository:
    """Return what the cache has of a repository."""
    folder = _snapshot(name, {"local_files_only": True, "allow_patterns": ["config.json"]})
    paths = [path for path in folder.rglob("*") if path.is_file()]
    files = {p.relative_to(folder).as_posix(): RemoteFile(p.stat().st_size) for p in paths}
    return Repository(name, folder.name, files, folder, offline=True)


def _snapshot(name: HubName, options: dict[str, Any]) -> Path:
    """Return the folder of the revision's commit in the cache, with the files that are wanted."""
    from huggingface_hub import snapshot_download

    with quiet():
        return Path(snapshot_download(name.repository, revision=name.revision, **options))


@contextmanager
def quiet() -> Iterator[None]:
    """Let huggingface_hub show no bars of a few kilobytes, and not warn of the disk as we do."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    enabled = not are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Not enough free disk space")
        try:
            if enabled:
                disable_progress_bars()
            yield
        finally:
            if enabled:
                enable_progress_bars()


def is_config(path: str, files: Mapping[str, RemoteFile]) -> bool:
    """Return whether `path` is a small file that a checkpoint's readers and writers look at.

    Code of the repository is copied beside a checkpoint for SGLang and never run.
    """
    folder, name = os.path.split(path)
    if name in UNUSED:
        return False
    if folder:
        return folder in (*PARTS, TRTLLM) and name.endswith(CONFIG_SUFFIXES)
    if "llm/config.json" in files:
        return name in ROOT_FILES
    return name in ROOT_FILES or name.endswith((*CONFIG_SUFFIXES, ".py"))
