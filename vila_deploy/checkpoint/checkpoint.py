"""Open a checkpoint of any generation: find, check it in full, then read it lazily."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from vila_deploy.checkpoint.checksums import ChecksumError, verify_checksums
from vila_deploy.checkpoint.config import VilaConfig, config_of
from vila_deploy.checkpoint.folder_layout import PARTS, Layout, find_layout, split_flat
from vila_deploy.checkpoint.gguf_reader import GgufReader, gguf_files
from vila_deploy.checkpoint.llm_config import LlmConfig
from vila_deploy.checkpoint.reader import Int8TowerReader, TensorReader, find_tensors, llm_reader
from vila_deploy.checkpoint.safetensors_header import TensorInfo
from vila_deploy.checkpoint.tensor_schema import check_projector, check_tower
from vila_deploy.checkpoint.weight_source import ModelWeights, WeightSource
from vila_deploy.formats.registry import format_of
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.files import sha256_file

IDENTIFYING_SUFFIXES = (".json", ".model", ".txt", ".jinja")


class PartReader(WeightSource, Protocol):
    """The tensors of one part, with the files that hold them."""

    def names(self) -> list[str]: ...

    def files(self) -> list[Path]: ...

    def info(self, name: str) -> TensorInfo: ...


class Checkpoint:
    """A checkpoint whose layout, configs and tensors have been checked; made by open_checkpoint.

    `llm`, `vision` and `projector` read the tensors of its parts.
    """

    def __init__(
        self,
        layout: Layout,
        config: VilaConfig,
        llm: PartReader,
        vision: TensorReader,
        projector: TensorReader,
        digests: dict[Path, str],
    ):
        self.layout, self.root, self.config = layout, layout.root, config
        self.llm, self.vision, self.projector = llm, vision, projector
        self._digests = digests

    @property
    def weights(self) -> ModelWeights:
        """What reads the tensors of all its parts."""
        return ModelWeights(self.llm, self.vision, self.projector)

    def fingerprint(self) -> str:
        """Return SHA-256 over the names and contents of configs, tokenizer and weights.

        Reads every file once, unless opening has done so already.
        """
        files = [*self._configs(), *self._weights()]
        return _list_digest({self._name(file): self._digest(file) for file in files})

    def outline(self) -> str:
        """Return SHA-256 over contents of configs and tokenizer, and names and sizes of weights."""
        lines = {self._name(file): self._digest(file) for file in self._configs()}
        lines |= {self._name(file): str(file.stat().st_size) for file in self._weights()}
        return _list_digest(lines)

    def digests(self, prefixes: tuple[str, ...]) -> dict[str, str]:
        """Return SHA-256 of tower, projector and llm/ files with such tensors, by path below root.

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
        """Return the files of configs and tokenizer."""
        inside = (path for folder in self.layout.folders() for path in folder.iterdir())
        files = {path for path in inside if path.suffix in IDENTIFYING_SUFFIXES and path.is_file()}
        return {self.root / "config.json", *files} - self._weights()

    def _weights(self) -> set[Path]:
        return {f for reader in (self.llm, self.vision, self.projector) for f in reader.files()}

    def _name(self, file: Path) -> str:
        return os.fsdecode(file.relative_to(self.root).as_posix())

    def _digest(self, file: Path) -> str:
        if file not in self._digests:
            self._digests[file] = sha256_file(file)
        return self._digests[file]


def _list_digest(lines: dict[str, str]) -> str:
    """Return SHA-256 of the lines that sha256sum would print of these files."""
    total = hashlib.sha256()
    for name in sorted(lines):
        total.update(f"{lines[name]}  ".encode() + os.fsencode(name) + b"\n")
    return total.hexdigest()


def open_checkpoint(root: Path, config: VilaConfig | None = None) -> Checkpoint:
    """Check everything that can be checked before work starts; read weights only to hash them.

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
    tensors = _find_parts(layout)
    llm = _open_llm(layout, config.llm, tensors.get("llm"))
    vision, projector = _open_vision(layout, config, tensors)
    readers = (llm, vision, projector)
    # Last, since the other checks say more precisely what is wrong.
    try:
        digests = verify_checksums(root, [file for reader in readers for file in reader.files()])
    except ChecksumError as error:
        _refuse_non_finite(readers, error.file)
        raise
    return Checkpoint(layout, config, llm, vision, projector, digests or {})


def open_vision(layout: Layout, config: VilaConfig) -> tuple[TensorReader, TensorReader]:
    """Return readers of the tower and the projector, whose names and shapes have been checked.

    For programs that read the LLM's weights themselves; no checksum is computed.

    Raises:
        VilaDeployError: names the file or tensor that is wrong.
    """
    return _open_vision(layout, config, _find_parts(layout))


def _find_parts(layout: Layout) -> dict[str, dict[str, TensorInfo]]:
    """Return the tensors of each part; those of an llm/ folder are found by its own reader."""
    if layout.flat:
        return split_flat(find_tensors(layout.root), layout.prefixes)
    return {part: find_tensors(layout.root / part) for part in PARTS[1:]}


def _open_vision(
    layout: Layout, config: VilaConfig, tensors: dict[str, dict[str, TensorInfo]]
) -> tuple[TensorReader, TensorReader]:
    tower, projector = tensors["vision_tower"], tensors["mm_projector"]
    check_tower(config, tower, layout.folder("vision_tower"))
    check_projector(config, projector, layout.folder("mm_projector"))
    tower_reader = Int8TowerReader if config.vision.int8_linears else TensorReader
    return tower_reader(tower), TensorReader(projector)


def _open_llm(
    layout: Layout, config: LlmConfig, tensors: dict[str, TensorInfo] | None
) -> PartReader:
    """Return a reader of the checked tensors of llm/.

    Args:
        tensors: of llm/, if they have been found.
    """
    folder = layout.folder("llm")
    if config.quantization is not None:
        open_format = format_of(config.quantization).reader
        if open_format is not None:
            reader: PartReader = open_format(layout, config)
            return reader
    elif files := gguf_files(folder):
        return GgufReader(files, config)
    return llm_reader(find_tensors(folder) if tensors is None else tensors, config, folder)


def _refuse_non_finite(readers: Iterable[PartReader], file: Path) -> None:
    """Raise if a tensor in `file` holds NaN or Inf: that names the damage better than a digest."""
    for reader in readers:
        for name in reader.names():
            if reader.info(name).file == file:
                reader.tensor(name)
