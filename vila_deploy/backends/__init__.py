"""Backends by name: each builds engines for its targets and opens them as a Session."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from vila_deploy.engine.manifest import Manifest, load_manifest
from vila_deploy.engine.model_info import ModelInfo
from vila_deploy.engine.session import Session
from vila_deploy.processing.tokenizer import Tokenizer, load_tokenizer
from vila_deploy.utils.errors import VilaDeployError

# Each module offers open_session(folder, manifest) → Session.
BACKENDS = {
    "onnxruntime": "vila_deploy.backends.onnxruntime",
    "native": "vila_deploy.backends.native",
    "tensorrt": "vila_deploy.backends.tensorrt",
    "tensorrt-llm": "vila_deploy.backends.tensorrt_llm",
}

TOKENIZER_FOLDER = "tokenizer"


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
    """Checks the engine in `folder` against its manifest and runs it until the block ends.

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
    if manifest.needs:
        from vila_deploy.builder.finish import finish_location

        raise VilaDeployError(
            f"is not finished: {'; '.join(manifest.needs)}",
            where=folder,
            fix=f"run on {finish_location(manifest)}: vila-build-engine {folder} "
            f"--target {manifest.target} --backend {manifest.backend} -o {folder}",
        )
    tokenizer_folder = folder / TOKENIZER_FOLDER
    tokenizer = load_tokenizer(tokenizer_folder) if tokenizer_folder.is_dir() else None
    session = import_module(BACKENDS[manifest.backend]).open_session(folder, manifest)
    try:
        yield OpenedEngine(session, tokenizer, manifest)
    finally:
        session.close()
