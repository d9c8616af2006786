"""Find the parts of a checkpoint: in three folders (VILA layout), or in one.

One folder is what the first generation has, and what SGLang's classes for NVILA read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from vila_deploy.checkpoint.variants import KNOWN_TOWERS, ONE_FOLDERS
from vila_deploy.utils.errors import VilaDeployError, printable, short
from vila_deploy.utils.fields import Fields
from vila_deploy.utils.files import read_json_object

ADAPTER_CONFIG, ADAPTER_FILES = "adapter_config.json", ("adapter_", "non_lora_")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
PARTS = ("llm", "vision_tower", "mm_projector")
# What begins the names of a flat checkpoint's tensors, and what begins them in the part's folder.
Prefixes = Mapping[str, tuple[str, str]]
FIRST_GENERATION = {
    "vision_tower": ("model.vision_tower.vision_tower.", ""),
    "mm_projector": ("model.mm_projector.", "layers."),
}
BY_PART = {part: (f"{part}.", "") for part in PARTS}
# Keys of a one-folder config.json that three folders have elsewhere, or not at all.
ONE_FOLDER_KEYS = ("text_config", "vision_config", "quantization_config", "auto_map", "dtype",
                   "torch_dtype", "image_token_id", "video_token_id")  # fmt: skip
Value = TypeVar("Value")


@dataclass(frozen=True)
class Layout:
    """The config files of a checkpoint as read, whichever way it is laid out.

    `prefixes` has the parts whose tensors lie in a flat checkpoint under names of their own.
    """

    root: Path
    flat: bool
    fields: Fields
    llm: Fields
    generation: Fields
    vision: Fields
    preprocessor: Fields
    projector: Fields
    prefixes: Prefixes = field(default_factory=dict)

    def folder(self, part: str) -> Path:
        """Where weights, and for llm the tokenizer, lie."""
        return self.root if self.flat else self.root / part

    def folders(self) -> tuple[Path, ...]:
        return (self.root,) if self.flat else tuple(self.root / part for part in PARTS)


def find_layout(root: Path) -> Layout:
    """Read every config file of the checkpoint at `root`.

    Raises:
        VilaDeployError: a folder or file that is missing or no JSON, or a tower that only its
            publisher's files describe.
    """
    _refuse_other_folders(root)
    fields = Fields.from_file(root / "config.json")
    if "mm_vision_tower" in fields and not _is_folder(root / "llm"):
        return _flat(root, fields)
    if "text_config" in fields and not _is_folder(root / "llm"):
        return _one_folder(root, fields)
    for part in PARTS:
        if not _is_folder(root / part):
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


# Methods of Path raise where a name is too long or a folder may not be entered.
def _is_folder(path: Path) -> bool:
    return os.path.isdir(path)  # noqa: PTH112


def _is_file(path: Path) -> bool:
    return os.path.isfile(path)  # noqa: PTH113


def _refuse_other_folders(root: Path) -> None:
    """Raise VilaDeployError where `root` is another folder or file than a checkpoint's."""
    if not _is_folder(root):
        fix = "give the checkpoint's folder"
        if _is_file(root):
            raise VilaDeployError("is a file", where=root, fix=fix)
        if len(root.parts) == 1 and root.name:
            fix += f", or a repository of the hub, such as Efficient-Large-Model/{root}"
        raise VilaDeployError("no such folder", where=root, fix=fix)
    _refuse_adapter(root)
    config = root / "config.json"
    if not os.path.lexists(config) and _is_file(root / "manifest.json"):
        raise VilaDeployError(
            "is an engine, not a checkpoint", where=root, fix="give the checkpoint's folder"
        )
    if any(_is_folder(root / part) for part in PARTS):
        return
    absolute = Path(os.path.abspath(root))  # noqa: PTH100  links stay as they are
    if absolute.name in PARTS and _is_file(absolute.parent / config.name):
        raise VilaDeployError(
            "is one part of a checkpoint", where=root, fix=f"give the folder {absolute.parent}"
        )
    if os.path.lexists(config):
        return
    # A hub's cache keeps them below snapshots/, several formats of vila-quantize lie side by side.
    inside = sorted(root.glob("*/config.json")) or sorted(root.glob("snapshots/*/config.json"))
    fix = f"give the folder {inside[0].parent}" if inside else "give the checkpoint's folder"
    raise VilaDeployError("holds no config.json", where=root, fix=fix)


def _refuse_adapter(root: Path) -> None:
    """Raise VilaDeployError where LoRA fine-tuning has left an adapter and no weights."""
    for folder in (root, root / "llm"):
        adapter = folder / ADAPTER_CONFIG
        if not _is_file(adapter) or any(_is_folder(folder / part) for part in PARTS):
            continue
        weights = (file.name for file in folder.iterdir() if file.suffix in WEIGHT_SUFFIXES)
        if not all(name.startswith(ADAPTER_FILES) for name in weights):
            continue
        base = read_json_object(adapter).get("base_model_name_or_path")
        name = printable(base)[:200] if isinstance(base, str) and base else "its base model"
        raise VilaDeployError(
            f"is a LoRA adapter of {name}, not a checkpoint",
            where=folder,
            fix="vila-quantize BASE --lora ADAPTER merges it into that model and quantizes both; "
            "for fp16, merge it with peft's merge_and_unload and give the merged folder",
        )


def _flat(root: Path, fields: Fields) -> Layout:
    """Return the layout of one config.json for all, which only names the tower."""
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
        prefixes=FIRST_GENERATION,
    )


def _one_folder(root: Path, fields: Fields) -> Layout:
    """Return the layout of one config.json with the others in it, and its class's defaults."""
    architectures = fields.values.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    if not isinstance(name, str) or name not in ONE_FOLDERS:
        raise fields.error(
            "architectures",
            f"unknown class {short(name)} of a one-folder checkpoint",
            f"this version supports {', '.join(ONE_FOLDERS)}",
        )
    row = ONE_FOLDERS[name]
    text = dict(fields.child("text_config").values)
    text.setdefault("architectures", ["Qwen2ForCausalLM"])
    if "quantization_config" in fields:
        text["quantization_config"] = fields.values["quantization_config"]
    return Layout(
        root=root,
        flat=True,
        fields=Fields({**row.fixed, **fields.values}, fields.source),
        llm=Fields(text, fields.source, "text_config."),
        generation=_optional(root / "generation_config.json"),
        vision=fields.child("vision_config"),
        preprocessor=Fields.from_file(root / "preprocessor_config.json"),
        projector=Fields({"mm_projector_type": row.projector, **_projector(fields)}, fields.source),
        prefixes=BY_PART,
    )


def _projector(fields: Fields) -> dict[str, Any]:
    key = "mm_projector_type"
    return {key: fields.values[key]} if key in fields else {}


def _optional(file: Path) -> Fields:
    return Fields.from_file(file) if os.path.lexists(file) else Fields({}, file)


def split_flat(tensors: Mapping[str, Value], prefixes: Prefixes) -> dict[str, dict[str, Value]]:
    """Return a flat checkpoint's tensors by part, under the names that they have in VILA layout."""
    parts: dict[str, dict[str, Value]] = {part: {} for part in PARTS}
    for name, value in tensors.items():
        for part, (prefix, instead) in prefixes.items():
            if name.startswith(prefix):
                parts[part][instead + name.removeprefix(prefix)] = value
                break
        else:
            parts["llm"][name] = value
    return parts


def part_configs(layout: Layout) -> dict[str, dict[str, Any]]:
    """Return a flat checkpoint's config files as in VILA layout, by path."""
    parts = {f"{part}_cfg": {"_name_or_path": f"./{part}"} for part in PARTS}
    root = dict(layout.fields.values)
    if layout.prefixes is BY_PART:
        root = {key: value for key, value in root.items() if key not in ONE_FOLDER_KEYS}
        root |= {"architectures": ["LlavaLlamaModel"], "model_type": "llava_llama"}
    return {
        "config.json": {**root, **parts},
        "llm/config.json": layout.llm.values,
        "vision_tower/config.json": layout.vision.values,
        "vision_tower/preprocessor_config.json": layout.preprocessor.values,
        "mm_projector/config.json": layout.projector.values,
    }


def llm_config_values(layout: Layout) -> dict[str, Any]:
    """Return llm/config.json without what it says of the weights that are read."""
    own = ("quantization_config", "weights_file")
    return {key: value for key, value in layout.llm.values.items() if key not in own}
