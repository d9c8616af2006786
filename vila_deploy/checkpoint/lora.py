"""Merge a LoRA adapter into a checkpoint while it is read, one tensor at a time.

The adapter is a folder that peft or VILA's training saved: adapter_config.json, the pairs A and B
in adapter_model.safetensors, and modules trained in full there or in non_lora_trainables.bin.
A linear's weight W becomes W + scaling·B·A (LoRA, arXiv:2106.09685), with DoRA
m · (W + scaling·B·A) / ‖W + scaling·B·A‖ by output channel (arXiv:2402.09353).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vila_deploy.checkpoint.checkpoint import Checkpoint
from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.folder_layout import ADAPTER_CONFIG, FIRST_GENERATION, PARTS
from vila_deploy.checkpoint.llm_config import EMBEDDING, HEAD
from vila_deploy.checkpoint.lora_config import LoraConfig, load_lora_config
from vila_deploy.checkpoint.reader import TensorReader
from vila_deploy.checkpoint.safetensors_header import read_header
from vila_deploy.checkpoint.tensor_schema import (
    llm_tensor_specs,
    projector_tensor_specs,
    tower_tensor_specs,
    unused_tensor,
)
from vila_deploy.checkpoint.torch_load import PickledFile
from vila_deploy.utils.errors import VilaDeployError, printable, short
from vila_deploy.utils.files import sha256_file

if TYPE_CHECKING:
    from torch import Tensor

# The first of each that is there is read, the pickled ones without executing anything.
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
TRAINED_IN_FULL = "non_lora_trainables.bin"
WRAPPER = "base_model.model."
# What follows a module's name, and which factor of its change that is.
FACTOR = re.compile(r"(.+)\.(lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))(?:\.weight)?")
NOT_ITS_BASE = "give the checkpoint that this adapter was trained on"
# What begins the name of a part's tensor inside VILA's model, longest first.
PREFIXES = (
    *((prefix, part, instead) for part, (prefix, instead) in FIRST_GENERATION.items()),
    ("vision_tower.vision_tower.", "vision_tower", ""),
    *((f"{part}.", part, "") for part in PARTS),
)  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the adapter: its shape, and how to read it."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


@dataclass
class Change:
    """What an adapter does to one tensor: a low-rank sum, or another tensor in its place."""

    scaling: float = 1.0
    factors: dict[str, StoredTensor] = field(default_factory=dict)
    replacement: StoredTensor | None = None

    def apply(self, weight: Tensor) -> Tensor:
        """Return the changed tensor in the dtype of `weight`, which stays as it is."""
        import torch

        if self.replacement is not None:
            weight = self.replacement.read().to(weight.dtype)
        if not self.factors:
            return weight
        factors = {name: stored.read().float() for name, stored in self.factors.items()}
        if "lora_embedding_A" in factors:
            change = (factors["lora_embedding_B"] @ factors["lora_embedding_A"]).T
        else:
            change = factors["lora_B"] @ factors["lora_A"]
        merged = change.mul_(self.scaling).add_(weight)
        if "lora_magnitude_vector" in factors:
            magnitude = factors["lora_magnitude_vector"].flatten()
            merged *= (magnitude / torch.linalg.norm(merged, dim=1)).unsqueeze(1)
        return merged.to(weight.dtype)


class MergedReader(TensorReader):
    """Reads a part's tensors as another reader does, with an adapter's changes made to them."""

    def __init__(self, base: TensorReader, changes: Mapping[str, Change]):
        super().__init__(base.tensors(), aliases=base.aliases)
        self._changes = changes

    def tensor(self, name: str) -> Tensor:
        """Return the changed tensor; raises as `TensorReader.tensor` does."""
        weight, change = super().tensor(name), self._changes.get(self.aliases.get(name, name))
        return weight if change is None else change.apply(weight)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter that has been checked against a model's configs; made by `open_adapter`.

    Args:
        changes: part → tensor → what is done to it.
        sha256: of the files that were read.
    """

    folder: Path
    config: LoraConfig
    changes: Mapping[str, Mapping[str, Change]]
    sha256: str

    def merge_into(self, checkpoint: Checkpoint) -> None:
        """Make `checkpoint` read its tensors with this adapter's changes."""
        llm = checkpoint.llm
        # A checkpoint with another reader is quantized, which no quantization takes.
        if isinstance(llm, TensorReader):
            checkpoint.llm = MergedReader(llm, self.changes["llm"])
        if self.changes["vision_tower"]:
            changes = self.changes["vision_tower"]
            checkpoint.vision = MergedReader(checkpoint.vision, changes)
        if self.changes["mm_projector"]:
            changes = self.changes["mm_projector"]
            checkpoint.projector = MergedReader(checkpoint.projector, changes)

    def to_json(self) -> dict[str, Any]:
        """Return what a report says about it."""
        every = [change for part in self.changes.values() for change in part.values()]
        return {
            "name": printable(self.folder.absolute().name),
            "base_model": None if self.config.base is None else printable(self.config.base)[:200],
            "sha256": self.sha256,
            "rank": self.config.rank,
            "alpha": self.config.alpha,
            "merged": sum(bool(change.factors) for change in every),
            "replaced": sum(change.replacement is not None for change in every),
        }


def open_adapter(folder: Path, config: VilaConfig) -> Adapter:
    """Check the adapter in `folder` against the configs of its base, reading it whole once.

    Raises:
        VilaDeployError: a file that is missing or damaged, a setting that is not followed, or a
            tensor that does not fit the base.
    """
    if not folder.is_dir():
        raise VilaDeployError("no such folder", where=folder, fix="give the adapter's folder")
    lora = load_lora_config(folder)
    found = next((folder / name for name in WEIGHT_FILES if (folder / name).exists()), None)
    if found is None:
        raise VilaDeployError(
            f"holds neither {' nor '.join(WEIGHT_FILES)}", where=folder, fix="give the adapter"
        )
    files = [found, *(path for path in [folder / TRAINED_IN_FULL] if path.exists())]
    specs = {part: dict(sizes) for part, sizes in _specs(config).items()}
    changes: dict[str, dict[str, Change]] = {part: {} for part in PARTS}
    for file in files:
        for name, stored in _stored_tensors(file).items():
            _add(changes, specs, config, lora, _Named(file, name), stored)
    for part, of_part in changes.items():
        for name, change in of_part.items():
            _check_factors(change, specs[part][name], lora, f"{found}: {name[:120]}")
    if not any(changes.values()):
        raise VilaDeployError("changes nothing", where=found, fix=NOT_ITS_BASE)
    digest = hashlib.sha256()
    for file in (folder / ADAPTER_CONFIG, *files):
        digest.update(f"{sha256_file(file)}  {file.name}\n".encode())
    return Adapter(folder, lora, changes, digest.hexdigest())


@dataclass(frozen=True)
class _Named:
    """A tensor's place in a file of the adapter, for messages."""

    file: Path
    name: str

    def error(self, what: str) -> VilaDeployError:
        where = f"{self.file}: {self.name[:160]}"
        return VilaDeployError(what, where=where, fix=NOT_ITS_BASE)


def _specs(config: VilaConfig) -> dict[str, Iterable[tuple[str, tuple[int, ...]]]]:
    specs = (llm_tensor_specs(config.llm), tower_tensor_specs(config))
    parts = (*specs, projector_tensor_specs(config))
    return {
        part: ((spec.name, spec.shape) for spec in specs)
        for part, specs in zip(PARTS, parts, strict=True)
    }


def _stored_tensors(file: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a file by name; all values are finite."""
    is_pickled = file.suffix == ".bin"
    infos = PickledFile(file, may_be_empty=True).infos() if is_pickled else read_header(file)
    read = TensorReader(infos).tensor
    for name in infos:
        read(name)
    return {name: StoredTensor(info.shape, partial(read, name)) for name, info in infos.items()}


def _add(
    changes: dict[str, dict[str, Change]],
    specs: Mapping[str, Mapping[str, tuple[int, ...]]],
    config: VilaConfig,
    lora: LoraConfig,
    named: _Named,
    stored: StoredTensor,
) -> None:
    """Record what one tensor of the adapter changes."""
    inner = named.name.removeprefix(WRAPPER)
    match = FACTOR.fullmatch(inner)
    module, factor = (match[1], match[2]) if match else (inner, None)
    # A wrapped linear's own weight or bias, where that was trained as well.
    path = (f"{module}.weight" if match else module).replace(".base_layer.", ".")
    part, name = _locate(path.replace(".modules_to_save.", "."))
    shape = specs[part].get(name)
    if shape is None:
        if part == "vision_tower" and unused_tensor(config, name):
            return
        tied = name == HEAD and config.llm.tie_word_embeddings
        raise named.error(
            "the model ties it with its embedding" if tied else "the base model has no such tensor"
        )
    if config.llm.tie_word_embeddings and part == "llm" and name == EMBEDDING:
        raise named.error("the model ties it with its head, which a merge would change too")
    change = changes[part].setdefault(name, Change())
    if factor is None:
        if stored.shape != shape:
            raise named.error(f"has shape {list(stored.shape)}, the base has {list(shape)}")
        change.replacement = stored
    else:
        change.factors[factor] = stored
        change.scaling = lora.scaling(module)
        _check_rank(named, factor, stored, lora.rank_of(module))


def _locate(path: str) -> tuple[str, str]:
    """Return the part of a checkpoint, and the tensor in it, that VILA's model calls `path`."""
    for prefix, part, instead in PREFIXES:
        if path.startswith(prefix):
            return part, instead + path.removeprefix(prefix)
    # An adapter of the language model alone, or of the first generation.
    return "llm", path


def _check_rank(named: _Named, factor: str, stored: StoredTensor, rank: int) -> None:
    if factor == "lora_magnitude_vector":
        return
    axis = 0 if factor.endswith("A") else 1
    if len(stored.shape) != 2 or stored.shape[axis] != rank:
        shape = list(stored.shape)
        raise named.error(f"has shape {shape}, {ADAPTER_CONFIG} says rank {short(rank)}")


def _check_factors(change: Change, shape: tuple[int, ...], lora: LoraConfig, where: str) -> None:
    """Raise VilaDeployError unless A and B are both there, in the base's shape."""
    names = set(change.factors)
    if not names:
        return
    if names & {"lora_embedding_A", "lora_embedding_B"}:
        needed, sizes = {"lora_embedding_A", "lora_embedding_B"}, shape[::-1]
    else:
        needed, sizes = {"lora_A", "lora_B"}, shape
        needed |= {"lora_magnitude_vector"} if lora.dora else set()
    if names != needed:
        what = f"has {', '.join(sorted(names))}, must have {', '.join(sorted(needed))}"
        raise VilaDeployError(what, where=where, fix="give the whole adapter")
    first, second = (change.factors[name] for name in sorted(names)[:2])
    found = (second.shape[0], first.shape[1])
    magnitude = change.factors.get("lora_magnitude_vector")
    rows = found[0] if magnitude is None else magnitude.shape[-1] if magnitude.shape else 0
    if found != sizes or rows != found[0]:
        what = f"is a change of {list(found)}, the base has {list(sizes)}"
        raise VilaDeployError(what, where=where, fix=NOT_ITS_BASE)
