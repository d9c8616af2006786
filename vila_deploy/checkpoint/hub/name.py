"""Tell a repository's name on the Hugging Face Hub from a folder on this computer."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from vila_deploy.utils.errors import VilaDeployError, short

# What huggingface_hub accepts as OWNER/NAME.
_PART = r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9_])?"
_NAME = re.compile(rf"(?P<repository>{_PART}/{_PART})(?:@(?P<revision>[^@\s]+))?", re.ASCII)
# Path makes one slash of two.
_EXPLICIT = re.compile(r"hf:/{1,2}(?=[^/])")
_ADDRESS = re.compile(r"https?:/{1,2}(?:www\.)?(?:huggingface\.co|hf\.co)/(?=[^/])")
_TREE = re.compile(r"(?P<repository>[^/]+/[^/]+)(?:/tree/(?P<revision>.+))?")
_NEAR = 0.8  # ratio of difflib from which on a name is taken for a misspelled one


@dataclass(frozen=True)
class HubName:
    """A repository, `owner/name`, and the branch, tag or commit that is asked for."""

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision}" if self.revision else self.repository


def hub_name(checkpoint: str | Path) -> HubName | None:
    """Return the repository that `checkpoint` names; None where it is a path.

    A file or folder of that name on this computer wins. `hf://OWNER/NAME[@REVISION]` and the
    address of the repository's page are always taken for the repository.

    Raises:
        VilaDeployError: it looks like a misspelled folder, or begins like the name of a repository
            and is none.
    """
    text = os.fspath(checkpoint)
    explicit = _EXPLICIT.match(text)
    if explicit:
        return _parse(text[explicit.end() :].rstrip("/"), text)
    address = _ADDRESS.match(text)
    if address:
        tree = _TREE.fullmatch(text[address.end() :].rstrip("/"))
        parts = tree.groupdict() if tree else {"repository": text, "revision": None}
        revision = f"@{parts['revision']}" if parts["revision"] else ""
        return _parse(f"{parts['repository']}{revision}", text)
    if text.startswith(("./", "../", "~")):
        return None
    path = Path(text)
    match = _NAME.fullmatch(str(path))
    if match is None or os.path.lexists(path) or not _is_name(match["repository"]):
        return None
    if match["revision"] is None:
        _refuse_misspelled(path)
    return HubName(match["repository"], match["revision"])


def _parse(name: str, text: str) -> HubName:
    match = _NAME.fullmatch(name)
    if match is None or not _is_name(match["repository"]):
        raise VilaDeployError(
            f"{short(text)} is no repository of the hub",
            fix="give OWNER/NAME or OWNER/NAME@REVISION",
        )
    return HubName(match["repository"], match["revision"])


def _is_name(repository: str) -> bool:
    return "--" not in repository and ".." not in repository and len(repository) <= 96


def _refuse_misspelled(path: Path) -> None:
    """Raise VilaDeployError where the folder beside which `path` would lie has one like it."""
    try:
        folders = [entry.name for entry in os.scandir(path.parent) if entry.is_dir()]
    except OSError:
        return
    near = difflib.get_close_matches(path.name, folders, n=1, cutoff=_NEAR)
    if near:
        raise VilaDeployError(
            f"no such folder; did you mean {path.parent / near[0]}?",
            where=path,
            fix=f"for the hub's repository of that name give hf://{path}",
        )
