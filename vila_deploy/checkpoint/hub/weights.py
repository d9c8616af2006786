"""Choose which of a repository's files of weights are read, from its list of files alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath

from vila_deploy.checkpoint.folder_layout import PARTS
from vila_deploy.checkpoint.hub.repository import RemoteFile, Repository
from vila_deploy.checkpoint.reader import INDEX_FILE, PICKLE_SUFFIXES, SINGLE_FILE, weight_map
from vila_deploy.checkpoint.trtllm_sharding import FOLDER as TRTLLM
from vila_deploy.formats.tinychat import SUFFIX as TINYCHAT_SUFFIX


def weight_files(repository: Repository) -> dict[str, RemoteFile]:
    """Return the files of weights that opening the checkpoint reads, by path.

    Offline, those that the cache should have are among them, with no size.

    Raises:
        VilaDeployError: an index that names anything but safetensors beside it.
    """
    parts = PARTS if "llm/config.json" in repository.files else ("",)
    chosen: set[str] = set()
    for folder in parts:
        chosen |= _of_part(repository, folder)
    chosen |= {path for path in repository.files if _is_rank(path)}
    return {path: repository.files.get(path, RemoteFile(0)) for path in sorted(chosen)}


def pickled_files(repository: Repository) -> dict[str, RemoteFile]:
    """Return the files of torch.save that lie where weights are looked for."""
    folders = PARTS if "llm/config.json" in repository.files else ("",)
    return {
        path: file
        for path, file in repository.files.items()
        if path.endswith(PICKLE_SUFFIXES) and path.rpartition("/")[0] in folders
    }


def _of_part(repository: Repository, folder: str) -> set[str]:
    """Return the files of one part as `find_tensors` and `tinychat_file` choose them."""
    names = _names(repository.files, folder)
    safetensors = {name for name in names if name.endswith(".safetensors")}
    wanted = {SINGLE_FILE} if SINGLE_FILE in names else set()
    if INDEX_FILE in names:
        shards = set(weight_map(repository.folder / folder / INDEX_FILE).values())
        wanted |= shards if repository.offline else shards & names
    elif repository.offline:
        wanted = {SINGLE_FILE}
    if not safetensors and any(name.endswith(TINYCHAT_SUFFIX) for name in names):
        # A release in 4 bits has the original's index and, in place of its shards, one such file.
        wanted = {name for name in names if name.endswith(TINYCHAT_SUFFIX)}
    return {(PurePosixPath(folder) / name).as_posix() for name in wanted}


def _names(files: Mapping[str, RemoteFile], folder: str) -> set[str]:
    pairs = (path.rpartition("/") for path in files)
    return {name for parent, _, name in pairs if parent == folder}


def _is_rank(path: str) -> bool:
    return path.startswith(f"{TRTLLM}/") and path.endswith(".safetensors")
