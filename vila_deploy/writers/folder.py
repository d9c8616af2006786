"""Write a quantized checkpoint: packed linears in shards, the other parts, configs, checksums."""

from __future__ import annotations

import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from vila_deploy.checkpoint import Checkpoint
from vila_deploy.checkpoint.checksums import write_checksums
from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.folder_layout import PARTS, llm_config_values, part_configs
from vila_deploy.checkpoint.int8_tower import INT8_BITS
from vila_deploy.checkpoint.lora import MergedReader
from vila_deploy.checkpoint.reader import INDEX_FILE, SINGLE_FILE, Int8TowerReader, TensorReader
from vila_deploy.checkpoint.rounded_tower import RoundedTower
from vila_deploy.formats.base import Packing, QuantizedLinear, QuantScheme
from vila_deploy.formats.registry import FORMATS, Format
from vila_deploy.processing.tokenizer import TOKENIZER_FILES
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.files import canonical_json, read_json_object, sha256_file

if TYPE_CHECKING:
    from torch import Tensor

# Tensors wait in memory until a shard is full.
SHARD_BYTES = 512 << 20
# The longest part of the model's name in a file's.
MODEL_CHARACTERS = 64
LLM_FILES = (*TOKENIZER_FILES, "generation_config.json", "chat_template.jinja")


def check_formats(formats: Sequence[str], config: VilaConfig, scheme: QuantScheme | None) -> None:
    """Refuse, before any work, a model or scheme that one of the formats can't hold.

    Args:
        formats: keys of FORMATS.
        scheme: None for a model that is not quantized.

    Raises:
        VilaDeployError: names the first linear or property that doesn't fit.
    """
    for name in formats:
        writer = FORMATS[name].writer
        writer.check_model(config)
        if config.vision.int8_linears and INT8_BITS not in FORMATS[name].packing.widths:
            raise VilaDeployError(
                f"{name} holds no vision tower in int8, as this checkpoint has",
                where="vision_tower/config.json: quantization_config",
                fix="choose format compressed-tensors or gguf, or convert the original checkpoint",
            )
        if scheme is not None:
            writer.check(FORMATS[name].packing, config, scheme)


def file_stem(model: str) -> str:
    """Return a model's name as the beginning of a file's, in characters that every tool takes."""
    return re.sub(r"[^\w.+-]", "_", model, flags=re.ASCII)[:MODEL_CHARACTERS] or "model"


class CheckpointWriter:
    """Writes a quantized checkpoint in every format that was asked for, as the layers come.

    One checkpoint in `folder` for one format, in `folder`/NAME each for several.

    Args:
        formats: keys of FORMATS.
        scheme: None for a model that is not quantized.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        folder: Path,
        formats: Sequence[str],
        scheme: QuantScheme | None,
    ):
        self._writers: list[Writer] = []
        for name in formats:
            subfolder = folder / name if len(formats) > 1 else folder
            subfolder.mkdir(exist_ok=True)
            row = FORMATS[name]
            self._writers.append(row.writer(checkpoint, subfolder, row, scheme))

    def add(self, name: str, value: Tensor | QuantizedLinear) -> None:
        """Write what llm/ holds under `name`: a float16 tensor, or a quantized linear."""
        for writer in self._writers:
            writer.add(name, value)

    def finish(self) -> None:
        """Write the rest of each checkpoint, its configs and its checksums."""
        for writer in self._writers:
            writer.finish()


class Writer(ABC):
    """Writes a quantized checkpoint in one format into an empty folder, tensor by tensor.

    Attributes:
        takes_unquantized: whether `scheme` may be None, for a checkpoint that is not quantized.
    """

    takes_unquantized: ClassVar[bool] = False

    def __init__(
        self, checkpoint: Checkpoint, folder: Path, row: Format, scheme: QuantScheme | None
    ):
        self._checkpoint, self._folder = checkpoint, folder
        self._packing, self._quantized = row.packing, scheme is not None
        self._scheme = scheme or QuantScheme()

    @classmethod
    def check(cls, packing: Packing, config: VilaConfig, scheme: QuantScheme) -> None:
        """Raise VilaDeployError, before any work, for a model or scheme that doesn't fit."""
        packing.check(scheme, config.llm.layer_linears(0))

    @classmethod  # noqa: B027
    def check_model(cls, config: VilaConfig) -> None:
        """Raise VilaDeployError, before any work, for a model that doesn't fit unquantized too."""

    @abstractmethod
    def add(self, name: str, value: Tensor | QuantizedLinear) -> None:
        """Write what llm/ holds under `name`, in a plain checkpoint's order and spelling.

        Args:
            name: of a tensor with its `.weight`, or of a quantized linear without.
            value: a tensor in float16, or a linear.
        """

    @abstractmethod
    def finish(self) -> None:
        """Write the rest: configs, the other parts, checksums."""


class ShardedWriter(Writer):
    """VILA layout; llm/ holds packed linears in shards and says so in its config.json."""

    def __init__(self, checkpoint: Checkpoint, folder: Path, row: Format, scheme: QuantScheme):
        super().__init__(checkpoint, folder, row, scheme)
        copy_parts(checkpoint, folder)
        self._shards = ShardWriter(folder / "llm")

    def add(self, name: str, value: Tensor | QuantizedLinear) -> None:
        zero_point = not self._scheme.symmetric
        for full, tensor in packed(name, value, self._packing, zero_point).items():
            self._shards.add(full, tensor)

    def finish(self) -> None:
        self._shards.finish()
        write_llm_config(self._checkpoint, self._folder, self._packing, self._scheme)
        write_checksums(self._folder, self._shards.digests)


class ShardWriter:
    """Collects tensors and writes a shard whenever SHARD_BYTES are full.

    Shards get their final names in `finish`, when their number is known; `digests` then has the
    SHA-256 of each, taken while it was still in the system's cache.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES):
        self._folder, self._shard_bytes = folder, shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._digests: list[str] = []
        self.total_bytes = 0
        self.digests: dict[Path, str] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a tensor; floating-point ones must be float16."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self._shard_bytes:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += size
        self.total_bytes += size
        # Nothing would come into this shard any more, and a head alone may be larger than it.
        if self._pending_bytes >= self._shard_bytes:
            self._flush()

    def finish(self) -> None:
        """Write the last shard, the final names and, for more than one shard, the index."""
        self._flush()
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards, 1):
            file = SINGLE_FILE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            self._partial(number).rename(self._folder / file)
            self.digests[self._folder / file] = self._digests[number - 1]
            weight_map |= dict.fromkeys(names, file)
        if count > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            (self._folder / INDEX_FILE).write_text(canonical_json(index), "utf-8")

    def _flush(self) -> None:
        if self._pending:
            self._shards.append(list(self._pending))
            file = self._partial(len(self._shards))
            save_tensors(self._pending, file, {"format": "pt"})
            self._pending, self._pending_bytes = {}, 0
            self._digests.append(sha256_file(file))

    def _partial(self, number: int) -> Path:
        return self._folder / f"shard-{number}.safetensors"


def packed(
    name: str, value: Tensor | QuantizedLinear, packing: Packing, zero_point: bool = True
) -> dict[str, Tensor]:
    """Return the tensors that are stored of `value`, under full names."""
    if isinstance(value, QuantizedLinear):
        tensors = packing.pack(value, zero_point)
        return {f"{name}.{part}": tensor for part, tensor in tensors.items()}
    return {name: value}


def quantized_config(checkpoint: Checkpoint, quantization: dict[str, Any]) -> dict[str, Any]:
    """Return llm/config.json with `quantization` as quantization_config, for float16."""
    config = llm_config_values(checkpoint.layout)
    # Either spelling may be there; the unquantized tensors are float16 whatever they were before.
    config["dtype"] = config["torch_dtype"] = "float16"
    return {**config, "quantization_config": quantization}


def write_llm_config(
    checkpoint: Checkpoint, folder: Path, packing: Packing, scheme: QuantScheme
) -> None:
    """Write llm/config.json of the checkpoint in `folder`, with its quantization_config."""
    config = quantized_config(checkpoint, packing.quantization_config(scheme))
    (folder / "llm" / "config.json").write_text(canonical_json(config), "utf-8")


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file that is as readable as others; safetensors' own is its owner's."""
    from safetensors.torch import save_file

    save_file(tensors, path, metadata)
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def copy_parts(checkpoint: Checkpoint, root: Path) -> None:
    """Copy the tower, the projector, their configs and the tokenizer, in VILA layout.

    Of a RoundedTower some linears are written in int8.

    Raises:
        VilaDeployError: NaN or Inf in a tensor of the tower or projector.
    """
    for part in PARTS:
        (root / part).mkdir()
    readers = {"vision_tower": checkpoint.vision, "mm_projector": checkpoint.projector}
    if checkpoint.layout.flat:
        for name, values in part_configs(checkpoint.layout).items():
            (root / name).write_text(canonical_json(values), "utf-8")
        for part, reader in readers.items():
            _save_all(reader, root / part)
    else:
        shutil.copyfile(checkpoint.root / "config.json", root / "config.json")
        for part, reader in readers.items():
            _copy_part(reader, checkpoint.root / part, root / part)
    if isinstance(checkpoint.vision, RoundedTower):
        file = root / "vision_tower" / "config.json"
        quantization = {"quantization_config": checkpoint.vision.quantization_config()}
        file.write_text(canonical_json({**read_json_object(file), **quantization}), "utf-8")
    _write_prompt_template(checkpoint, root / "config.json")
    copy_llm_files(checkpoint, root / "llm")


def copy_llm_files(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy the tokenizer and generation_config.json."""
    for name in LLM_FILES:
        source = checkpoint.layout.folder("llm") / name
        if source.is_file():
            shutil.copyfile(source, folder / name)


def _copy_part(reader: TensorReader, source: Path, destination: Path) -> None:
    changed = isinstance(reader, MergedReader | RoundedTower)
    for file in sorted(source.glob("*.json")):
        if file.is_file() and not (changed and file.name == INDEX_FILE):
            shutil.copyfile(file, destination / file.name)
    if changed:
        _save_all(reader, destination)
        return
    for name in reader.names():
        reader.tensor(name)
    for file in reader.files():
        shutil.copyfile(file, destination / file.name)


def _save_all(reader: TensorReader, folder: Path) -> None:
    if isinstance(reader, RoundedTower | Int8TowerReader):
        tensors = reader.stored()
    else:
        tensors = {name: reader.tensor(name) for name in reader.names()}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_tensors(tensors, folder / SINGLE_FILE, {"format": "pt"})


def _write_prompt_template(checkpoint: Checkpoint, file: Path) -> None:
    """Keep the template that was asked for, so that the engine gets it too."""
    values, template = read_json_object(file), checkpoint.config.prompt_template
    if values.get("prompt_template") != template:
        file.write_text(canonical_json({**values, "prompt_template": template}), "utf-8")
