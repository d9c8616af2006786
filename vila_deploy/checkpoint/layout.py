"""Where the parts of a checkpoint lie: in three folders, or in one as in the first generation."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from vila_deploy.checkpoint.fields import Fields
from vila_deploy.checkpoint.variants import KNOWN_TOWERS
from vila_deploy.errors import VilaDeployError

PARTS = ("llm", "vision_tower", "mm_projector")
# What begins the names of a flat checkpoint's tensors, and what begins them in the part's folder.
FLAT_PREFIXES = {
    "vision_tower": ("model.vision_tower.vision_tower.", ""),
    "mm_projector": ("model.mm_projector.", "layers."),
}
Value = TypeVar("Value")


@dataclass(frozen=True)
class Layout:
    """The config files of a checkpoint as read, whichever way it is laid out."""

    root: Path
    flat: bool
    fields: Fields
    llm: Fields
    generation: Fields
    vision: Fields
    preprocessor: Fields
    projector: Fields

    def folder(self, part: str) -> Path:
        """Where weights, and for llm the tokenizer, lie."""
        return self.root if self.flat else self.root / part

    def folders(self) -> tuple[Path, ...]:
        return (self.root,) if self.flat else tuple(self.root / part for part in PARTS)


def find_layout(root: Path) -> Layout:
    """Reads every config file of the checkpoint at `root`.

    Raises:
        VilaDeployError: a folder or file that is missing or no JSON, or a tower that only its
            publisher's files describe.
    """
    if not os.path.isdir(root):  # noqa: PTH112  Path.is_dir raises on EACCES
        raise VilaDeployError("no such folder", where=root, fix="give the checkpoint's folder")
    fields = Fields.from_file(root / "config.json")
    if "mm_vision_tower" in fields and not os.path.isdir(root / "llm"):  # noqa: PTH112
        return _flat(root, fields)
    for part in PARTS:
        if not os.path.isdir(root / part):  # noqa: PTH112
            raise VilaDeployError(
                f"part {part}/ is missing", where=root, fix="download the whole checkpoint"
            )
    tower = root / "vision_tower"
    return Layout(
        root=root,
        flat=False,
        fields=fields,
        llm=Fields.from_file(root / "llm" / "config.json"),
        generation=_optional(root / "llm" / "generation_config.json"),
        vision=Fields.from_file(tower / "config.json"),
        preprocessor=Fields.from_file(tower / "preprocessor_config.json"),
        projector=Fields.from_file(root / "mm_projector" / "config.json"),
    )


def _flat(root: Path, fields: Fields) -> Layout:
    """One config.json for all, which only names the tower."""
    name = fields.choice("mm_vision_tower", KNOWN_TOWERS, what="vision tower")
    tower, preprocessor = KNOWN_TOWERS[name]
    llm = {key: value for key, value in fields.values.items() if not key.startswith("mm_")}
    if llm.get("architectures") == ["LlavaLlamaForCausalLM"]:
        llm |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    kind = fields.text("mm_projector_type", "linear")
    return Layout(
        root=root,
        flat=True,
        fields=fields,
        llm=Fields(llm, fields.source),
        generation=_optional(root / "generation_config.json"),
        vision=Fields(dict(tower), fields.source, f"{name}: "),
        preprocessor=Fields(dict(preprocessor), fields.source, f"{name}: "),
        projector=Fields({"mm_projector_type": kind}, fields.source),
    )


def _optional(file: Path) -> Fields:
    return Fields.from_file(file) if os.path.lexists(file) else Fields({}, file)


def split_flat(tensors: Mapping[str, Value]) -> dict[str, dict[str, Value]]:
    """A flat checkpoint's tensors by part, under the names that they have in that part's folder."""
    parts: dict[str, dict[str, Value]] = {part: {} for part in PARTS}
    for name, value in tensors.items():
        for part, (prefix, instead) in FLAT_PREFIXES.items():
            if name.startswith(prefix):
                parts[part][instead + name.removeprefix(prefix)] = value
                break
        else:
            parts["llm"][name] = value
    return parts


def part_configs(layout: Layout) -> dict[str, dict[str, Any]]:
    """What the config files of three folders would hold, by path; of a flat checkpoint only."""
    parts = {f"{part}_cfg": {"_name_or_path": f"./{part}"} for part in PARTS}
    return {
        "config.json": {**layout.fields.values, **parts},
        "llm/config.json": layout.llm.values,
        "vision_tower/config.json": layout.vision.values,
        "vision_tower/preprocessor_config.json": layout.preprocessor.values,
        "mm_projector/config.json": layout.projector.values,
    }


def llm_config_values(layout: Layout) -> dict[str, Any]:
    """What llm/config.json says apart from a quantization."""
    return {key: value for key, value in layout.llm.values.items() if key != "quantization_config"}
