"""Take a folder or a repository's name where a checkpoint is wanted."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vila_deploy.checkpoint.checkpoint import open_checkpoint
from vila_deploy.checkpoint.config import load_config
from vila_deploy.checkpoint.hub.download import fetch_files
from vila_deploy.checkpoint.hub.header_copy import header_copy
from vila_deploy.checkpoint.hub.name import hub_name
from vila_deploy.checkpoint.hub.repository import find_repository
from vila_deploy.checkpoint.hub.weights import weight_files


@dataclass(frozen=True)
class Download:
    """What using a repository means: which files of weights are read, and which are to be fetched.

    Args:
        repository: `owner/name`.
        files: files of weights that are read.
        size_bytes: of those.
        missing_bytes: of those that the hub's cache lacks.
        free_bytes: on the disk of the cache.
    """

    repository: str
    commit: str
    files: int
    size_bytes: int
    missing_bytes: int
    free_bytes: int

    @property
    def fits(self) -> bool:
        return self.missing_bytes <= self.free_bytes

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "fits": self.fits}

    def summary(self) -> str:
        """Return one line: how much of how much is to be fetched, and whether the disk has room."""
        size, missing = self.size_bytes / 1e6, self.missing_bytes / 1e6
        name = f"{self.repository} at {self.commit[:12]}"
        if not self.missing_bytes:
            return f"{name}: all {size:,.1f} MB of weights are in the hub's cache"
        verdict = "fits" if self.fits else "does not fit; set HF_HOME to a folder on another disk"
        return (
            f"{name}: {missing:,.1f} MB of {size:,.1f} MB of weights in {self.files} files are to "
            f"be fetched, {self.free_bytes / 1e9:,.1f} GB are free: {verdict}"
        )


@contextmanager
def planned_checkpoint(
    checkpoint: str | Path, template: str | None = None
) -> Iterator[tuple[Path, Download | None]]:
    """Yield a folder with the checkpoint's config files, and what is to be fetched to use it.

    A folder on this computer is yielded as it is, with None. Of a repository only config files and
    tensor headers are fetched, a few MB at most, and the tensors are checked against the configs;
    nothing may read weights in that folder, which is removed at the end.

    Args:
        checkpoint: a folder, or `OWNER/NAME` or `OWNER/NAME@REVISION` on the Hugging Face Hub.
        template: the prompt template that the user names.

    Raises:
        VilaDeployError: the repository is missing, gated or no checkpoint, or can't be reached.
    """
    name = hub_name(checkpoint)
    if name is None:
        yield Path(checkpoint), None
        return
    repository = find_repository(name)
    files = weight_files(repository)
    absent = repository.missing(files)
    download = Download(
        name.repository,
        repository.commit,
        len(files),
        sum(file.size for file in files.values()),
        sum(file.size for file in absent.values()),
        shutil.disk_usage(repository.folder).free,
    )
    with header_copy(repository) as folder:
        open_checkpoint(folder, load_config(folder, template))
        yield folder, download


def fetch_checkpoint(
    checkpoint: str | Path,
    check: Callable[[Path], object] | None = None,
    template: str | None = None,
) -> Path:
    """Return the checkpoint's folder; a repository is fetched into the hub's cache first.

    Only files that are read are fetched. An interrupted download goes on where it ended, and what
    the cache has is not fetched again.

    Args:
        checkpoint: a folder, or `OWNER/NAME` or `OWNER/NAME@REVISION` on the Hugging Face Hub.
        check: called with a folder that has all but the weights, before they are fetched; raises
            where fetching them would be in vain.
        template: the prompt template that the user names.

    Raises:
        VilaDeployError: the repository is missing, gated or no checkpoint, can't be reached, or the
            disk has no room for it.
    """
    name = hub_name(checkpoint)
    if name is None:
        return Path(checkpoint)
    repository = find_repository(name)
    files = weight_files(repository)
    if repository.missing(files):
        with planned_checkpoint(checkpoint, template) as (folder, download):
            if check is not None:
                check(folder)
            assert download is not None
            print(download.summary(), file=sys.stderr)
        fetch_files(repository, files)
    return repository.folder
