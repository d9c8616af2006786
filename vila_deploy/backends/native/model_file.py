"""model.json: a VilaConfig as an engine keeps it, units of its packed norms, what is where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.llm_config import LlmConfig, QuantizationConfig
from vila_deploy.checkpoint.variants import LLM_FAMILIES, PROJECTOR_TYPES, TOWER_FAMILIES
from vila_deploy.checkpoint.vision_config import ImageConfig, TilingConfig, VisionConfig
from vila_deploy.utils.files import canonical_json, read_json_object

Row = TypeVar("Row")
# Part of the decoder → norm → its unit.
Units = dict[str, dict[str, float]]


def write_model(
    path: Path, config: VilaConfig, norm_units: Units, in_host_memory: Sequence[str] = ()
) -> None:
    """Writes what `read_model` reads; families and projector by the names of their tables."""
    llm, vision = asdict(config.llm), asdict(config.vision)
    llm["family"] = _key(LLM_FAMILIES, config.llm.family)
    vision["family"] = _key(TOWER_FAMILIES, config.vision.family)
    content = {
        **asdict(config),
        "llm": llm,
        "vision": vision,
        "projector": _key(PROJECTOR_TYPES, config.projector),
    }
    text = canonical_json(
        {"config": content, "norm_units": norm_units, "in_host_memory": list(in_host_memory)}
    )
    path.write_text(text, "utf-8")


def read_model(path: Path) -> tuple[VilaConfig, Units, tuple[str, ...]]:
    """The config, the units of the norms and what stays in host memory, as `plan_engine` has it.

    The manifest vouches for the file.
    """
    content = read_json_object(path)
    found: dict[str, Any] = content["config"]
    llm, vision = found["llm"], found["vision"]
    quantization = llm["quantization"]
    found["llm"] = LlmConfig(
        **llm
        | {
            "family": LLM_FAMILIES[llm["family"]],
            "eos_token_ids": tuple(llm["eos_token_ids"]),
            "quantization": quantization and QuantizationConfig(**quantization),
        }
    )
    found["vision"] = VisionConfig(**vision | {"family": TOWER_FAMILIES[vision["family"]]})
    image, tiling = found["image"], found["tiling"]
    means = {"mean": tuple(image["mean"]), "std": tuple(image["std"])}
    found["image"] = ImageConfig(**image | means)
    found["tiling"] = TilingConfig(**tiling | {"scales": tuple(tiling["scales"])})
    found["projector"] = PROJECTOR_TYPES[found["projector"]]
    return VilaConfig(**found), content["norm_units"], tuple(content["in_host_memory"])


def _key(table: Mapping[str, Row], row: Row) -> str:
    (key,) = (key for key, each in table.items() if each == row)
    return key
