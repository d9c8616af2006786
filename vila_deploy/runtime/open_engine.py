"""Open a built engine: its folder is checked, its backend runs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vila_deploy.backends.registry import BACKENDS, get_backend
from vila_deploy.engine.manifest import TOKENIZER_FOLDER, Manifest, load_manifest
from vila_deploy.engine.model_info import ModelInfo
from vila_deploy.engine.session import Session
from vila_deploy.processing.tokenizer import Tokenizer, load_tokenizer
from vila_deploy.utils.errors import VilaDeployError


@dataclass(frozen=True)
class OpenedEngine:
    """A running engine with what a conversation needs; `tokenizer` is None for random weights."""

    session: Session
    tokenizer: Tokenizer | None
    manifest: Manifest

    @property
    def model(self) -> ModelInfo:
        return self.manifest.model

    @property
    def max_input_len(self) -> int:
        return self.manifest.limits.max_input_len


@contextmanager
def open_engine(folder: Path) -> Iterator[OpenedEngine]:
    """Check the engine in `folder` against its manifest and run it until the block ends.

    Raises:
        VilaDeployError: no engine, an altered file, unfinished, or a backend that isn't here.
    """
    if not folder.is_dir():
        raise VilaDeployError(
            "no such folder", where=folder, fix="give a folder that vila-build-engine made"
        )
    manifest = load_manifest(folder)
    if manifest.backend not in BACKENDS:
        raise VilaDeployError(
            f"was built for backend {manifest.backend!r}, which this version doesn't have",
            where=folder,
            fix=f"build it with --backend {' or '.join(BACKENDS)}",
        )
    backend = get_backend(manifest.backend)
    if manifest.pending_steps:
        raise VilaDeployError(
            f"is not finished: {'; '.join(step.title for step in manifest.pending_steps)}",
            where=folder,
            fix=f"run on {backend.finish_location(manifest)}: vila-build-engine {folder} "
            f"--target {manifest.target} --backend {manifest.backend} -o {folder}",
        )
    tokenizer_folder = folder / TOKENIZER_FOLDER
    tokenizer = load_tokenizer(tokenizer_folder) if tokenizer_folder.is_dir() else None
    session = backend.open(folder, manifest)
    try:
        yield OpenedEngine(session, tokenizer, manifest)
    finally:
        session.close()
