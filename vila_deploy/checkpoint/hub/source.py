"""Tell where a checkpoint came from: by its place in the hub's cache, or by its report."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.files import read_json_object

REPORT = "report.json"
# What huggingface_hub calls the folder of OWNER/NAME in its cache.
_REPOSITORY = re.compile(r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)", re.ASCII)
_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubSource:
    """A repository `owner/name` on the hub, and the commit."""

    repository: str
    commit: str

    def __str__(self) -> str:
        return f"{self.repository} at commit {self.commit[:12]}"

    def to_json(self) -> dict[str, str]:
        return dict(vars(self))

    @classmethod
    def from_json(cls, value: Any) -> HubSource | None:
        """Return what `to_json` has written; None for anything else."""
        if not isinstance(value, dict):
            return None
        repository, commit = str(value.get("repository")), str(value.get("commit"))
        plain = _NAME.fullmatch(repository) and _COMMIT.fullmatch(commit)
        return cls(repository, commit) if plain else None


def hub_source(root: Path) -> HubSource | None:
    """Return where the checkpoint in `root` was fetched from, if it lies in the hub's cache."""
    absolute = Path(os.path.abspath(root))  # noqa: PTH100  links stay as they are
    match = _REPOSITORY.fullmatch(absolute.parent.parent.name)
    if match is None or absolute.parent.name != "snapshots" or not _COMMIT.fullmatch(absolute.name):
        return None
    return HubSource(f"{match['owner']}/{match['name']}", absolute.name)


def original_source(root: Path) -> HubSource | None:
    """Return where the checkpoint in `root`, or the one that it was quantized from, came from."""
    source = hub_source(root)
    report = root / REPORT
    if source is not None or not report.is_file():
        return source
    try:
        return HubSource.from_json(read_json_object(report).get("source"))
    except VilaDeployError:
        return None


def checkpoint_name(root: Path) -> str:
    """Return what to call the checkpoint in `root`: its folder's name, or its repository's."""
    source = hub_source(root)
    return source.repository.rpartition("/")[2] if source else root.resolve().name
