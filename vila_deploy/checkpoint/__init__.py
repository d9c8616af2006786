"""Checkpoints of every generation: found, checked in full, then read lazily."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from vila_deploy.checkpoint.checksums import ChecksumError, verify_checksums
from vila_deploy.checkpoint.config import VilaConfig, config_of
from vila_deploy.checkpoint.folder_layout import PARTS, Layout, find_layout, split_flat
from vila_deploy.checkpoint.llm_config import EMBEDDING, HEAD, LlmConfig
from vila_deploy.checkpoint.quantization import TRTLLM
from vila_deploy.checkpoint.reader import TensorReader, find_tensors
from vila_deploy.checkpoint.safetensors_header import TensorInfo
from vila_deploy.checkpoint.tensor_schema import check_llm, check_projector, check_tower
from vila_deploy.checkpoint.tinychat_file import VERSION as TINYCHAT
from vila_deploy.checkpoint.tinychat_file import read_tinychat, tinychat_file
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.files import sha256_file

if TYPE_CHECKING:
    from vila_deploy.checkpoint.trtllm_reader import TrtllmCheckpoint

IDENTIFYING_SUFFIXES = (".json", ".model", ".txt", ".jinja")


class Checkpoint:
    """A checkpoint whose layout, configs and tensors have been checked; made by open_checkpoint.

    `llm`, `vision` and `projector` read the tensors of its parts.
    """

    def __init__(
        self,
        layout: Layout,
        config: VilaConfig,
        llm: TensorReader | TrtllmCheckpoint,
        vision: TensorReader,
        projector: TensorReader,
        digests: dict[Path, str],
    ):
        self.layout, self.root, self.config = layout, layout.root, config
        self.llm, self.vision, self.projector = llm, vision, projector
        self._digests = digests

    def fingerprint(self) -> str:
        """SHA-256 over the names and contents of configs, tokenizer and weights.

        Reads every file once, unless opening has done so already.
        """
        files = [*self._configs(), *self._weights()]
        return _list_digest({self._name(file): self._digest(file) for file in files})

    def outline(self) -> str:
        """SHA-256 over names and contents of configs and tokenizer, names and sizes of weights."""
        lines = {self._name(file): self._digest(file) for file in self._configs()}
        lines |= {self._name(file): str(file.stat().st_size) for file in self._weights()}
        return _list_digest(lines)

    def digests(self, prefixes: tuple[str, ...]) -> dict[str, str]:
        """SHA-256 of tower, projector and the files of llm/ with such tensors, by path below root.

        To be called before they are read, for the sake of `fingerprint`: what is read just after
        the hash comes out of the system's cache, so weights larger than the memory are read from
        the disk once, not twice.

        Args:
            prefixes: how the tensors' names begin.
        """
        names = [name for name in self.llm.names() if name.startswith(prefixes)]
        files = {self.llm.info(name).file for name in names}
        files |= {*self.vision.files(), *self.projector.files()}
        return {self._name(file): self._digest(file) for file in sorted(files)}

    def _configs(self) -> set[Path]:
        """Configs and tokenizer."""
        inside = (path for folder in self.layout.folders() for path in folder.iterdir())
        found = {path for path in inside if path.suffix in IDENTIFYING_SUFFIXES and path.is_file()}
        return {self.root / "config.json", *found} - self._weights()

    def _weights(self) -> set[Path]:
        return {f for reader in (self.llm, self.vision, self.projector) for f in reader.files()}

    def _name(self, file: Path) -> str:
        return os.fsdecode(file.relative_to(self.root).as_posix())

    def _digest(self, file: Path) -> str:
        if file not in self._digests:
            self._digests[file] = sha256_file(file)
        return self._digests[file]


def _list_digest(lines: dict[str, str]) -> str:
    """SHA-256 of what sha256sum would print of these files."""
    total = hashlib.sha256()
    for name in sorted(lines):
        total.update(f"{lines[name]}  ".encode() + os.fsencode(name) + b"\n")
    return total.hexdigest()


def open_checkpoint(root: Path, config: VilaConfig | None = None) -> Checkpoint:
    """Checks everything that can be checked before work starts; reads no weights but to hash them.

    That is: layout, configs, index, every header of a file of weights, every tensor's name, shape
    and dtype, and SHA256SUMS if there is one.

    Args:
        config: of this checkpoint, where the caller has read it already.

    Raises:
        VilaDeployError: names the file, key or tensor that is wrong.
    """
    try:
        return _open(root, config)
    except OSError as error:
        raise VilaDeployError(
            f"cannot be read ({error.strerror or error})",
            where=error.filename or root,
            fix="check its permissions and its disk",
        ) from error


def _open(root: Path, config: VilaConfig | None) -> Checkpoint:
    layout = find_layout(root)
    config = config or config_of(layout)
    if layout.flat:
        found = split_flat(find_tensors(root), layout.prefixes)
    else:
        found = {
            "llm": {} if _is_trtllm(config.llm) else _find_llm(root / "llm", config.llm),
            **{part: find_tensors(root / part) for part in PARTS[1:]},
        }
    llm = _llm_reader(layout, config.llm, found["llm"])
    check_tower(config, found["vision_tower"], layout.folder("vision_tower"))
    check_projector(config, found["mm_projector"], layout.folder("mm_projector"))
    vision, projector = TensorReader(found["vision_tower"]), TensorReader(found["mm_projector"])
    readers = (llm, vision, projector)
    # Last, since the other checks say more precisely what is wrong.
    try:
        digests = verify_checksums(root, [file for reader in readers for file in reader.files()])
    except ChecksumError as error:
        _refuse_non_finite(readers, error.file)
        raise
    return Checkpoint(layout, config, llm, vision, projector, digests or {})


def _is_trtllm(config: LlmConfig) -> bool:
    return config.quantization is not None and config.quantization.version == TRTLLM


def _llm_reader(
    layout: Layout, config: LlmConfig, found: dict[str, TensorInfo]
) -> TensorReader | TrtllmCheckpoint:
    """Reads the checked tensors of llm/, or of trtllm/ beside it."""
    if _is_trtllm(config):
        # Only here, since that module needs torch.
        from vila_deploy.checkpoint.trtllm_reader import FOLDER, TrtllmCheckpoint

        return TrtllmCheckpoint(layout.root / FOLDER, config)
    check_llm(config, found, layout.folder("llm"))
    return TensorReader(
        found,
        group_size=config.quantization.group_size if config.quantization else None,
        aliases={HEAD: EMBEDDING} if config.tie_word_embeddings else None,
    )


def _find_llm(folder: Path, config: LlmConfig) -> dict[str, TensorInfo]:
    """Every tensor of llm/, which an AWQ release of VILA holds in one file of torch.save."""
    tinychat = config.quantization is not None and config.quantization.version == TINYCHAT
    file = tinychat_file(folder) if tinychat else None
    if file is None or config.quantization is None:
        return find_tensors(folder)
    return read_tinychat(file, config.quantization.group_size)


def _refuse_non_finite(readers: Iterable[TensorReader | TrtllmCheckpoint], file: Path) -> None:
    """Raises if a tensor in `file` holds NaN or Inf: that names the damage better than a digest."""
    for reader in readers:
        for name in reader.names():
            if reader.info(name).file == file:
                reader.tensor(name)
