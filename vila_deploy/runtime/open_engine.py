"""Open a built engine: check its folder, load it, hand out conversations."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from vila_deploy.backends.registry import BACKENDS, get_backend
from vila_deploy.engine.manifest import (
    TOKENIZER_FOLDER,
    Manifest,
    checked_meanwhile,
    load_manifest,
    read_manifest,
)
from vila_deploy.engine.model_info import ModelInfo
from vila_deploy.engine.precision import BITS
from vila_deploy.engine.session import Session
from vila_deploy.formats.module_dtypes import FP16
from vila_deploy.processing.tokenizer import Tokenizer, load_tokenizer
from vila_deploy.runtime.conversation import Conversation
from vila_deploy.utils.errors import VilaDeployError

MAX_SLOTS, DEFAULT_SLOTS = 64, 8
# Of the free memory; prompts, images and other programs need some too.
SLOTS_SHARE = 0.8


@dataclass(frozen=True)
class OpenedEngine:
    """A running engine; `with` closes it, or `close`. `tokenizer` is None for random weights."""

    folder: Path
    session: Session
    tokenizer: Tokenizer | None
    manifest: Manifest

    @property
    def model(self) -> ModelInfo:
        return self.manifest.model

    @property
    def max_input_len(self) -> int:
        return self.manifest.limits.max_input_len

    @property
    def cache_bytes_per_slot(self) -> int:
        """Return the most bytes of keys and values that one slot of the session takes."""
        return _cache_bytes(self.manifest, self.session.max_seq_len)

    def chat(self, system: str | None = None) -> Conversation:
        """Return a new conversation with this engine.

        Args:
            system: replaces the model's own system message.

        Raises:
            VilaDeployError: the engine has random weights and no tokenizer, or `system` holds a
                placeholder or is no UTF-8.
        """
        tokenizer = self.require_tokenizer()
        return Conversation(self.session, tokenizer, self.model, self.max_input_len, system)

    def require_tokenizer(self) -> Tokenizer:
        """Return the tokenizer.

        Raises:
            VilaDeployError: the engine has random weights and no tokenizer.
        """
        if self.tokenizer is None:
            raise VilaDeployError(
                "has random weights and no tokenizer",
                where=self.folder,
                fix="use it with vila-bench",
            )
        return self.tokenizer

    def close(self) -> None:
        """Free the engine; it can't be used afterwards."""
        self.session.close()

    def __enter__(self) -> OpenedEngine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _cache_bytes(manifest: Manifest, max_seq_len: int) -> int:
    model, dtype = manifest.model, manifest.module_precision.kv_cache
    bits = get_backend(manifest.backend).cache_bits if dtype == FP16 else BITS[dtype]
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim * max_seq_len * bits // 8


def slots_that_fit(folder: Path, most: int = DEFAULT_SLOTS) -> int:
    """Return how many full slots the free memory holds beside the engine's files, 1 to `most`.

    Raises:
        VilaDeployError: no engine, or this computer lacks the GPU that it is for.
    """
    manifest = read_manifest(folder)
    if manifest.backend not in BACKENDS:
        return 1  # `open_engine` says why it can't be opened
    backend = get_backend(manifest.backend)
    files = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    room = SLOTS_SHARE * backend.free_memory_bytes() - files
    each = _cache_bytes(manifest, manifest.limits.max_seq_len)
    return max(1, min(most, int(room / each)))


def open_engine(folder: str | Path, slots: int = 1) -> OpenedEngine:
    """Check the engine in `folder` against its manifest and load it.

    Args:
        slots: sequences to hold at once, 1 to MAX_SLOTS; a backend that holds fewer says so in
            `session.slots`. Each takes up to `cache_bytes_per_slot` of memory.

    Raises:
        VilaDeployError: `slots` out of range, no engine, an altered file, unfinished, or a backend
            that isn't here.
    """
    folder = Path(folder)
    if not 1 <= slots <= MAX_SLOTS:
        raise VilaDeployError(f"slots is {slots}", fix=f"give a number between 1 and {MAX_SLOTS}")
    if not folder.is_dir():
        raise VilaDeployError(
            "no such folder", where=folder, fix="give a folder that vila-build-engine made"
        )
    manifest = _manifest(folder)
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
    with checked_meanwhile(folder) if backend.opens_while_checking else nullcontext():
        tokenizer = load_tokenizer(tokenizer_folder) if tokenizer_folder.is_dir() else None
        session = backend.open(folder, manifest, slots)
    return OpenedEngine(folder, session, tokenizer, manifest)


def _manifest(folder: Path) -> Manifest:
    """Return the manifest, with all files checked but for a backend that opens meanwhile."""
    manifest = read_manifest(folder)
    if manifest.backend in BACKENDS and get_backend(manifest.backend).opens_while_checking:
        return manifest
    return load_manifest(folder)
