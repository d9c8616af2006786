"""model.json of a native engine: its config, and what its weights and launches need besides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.llm_config import LlmConfig, QuantizationConfig
from vila_deploy.checkpoint.variants import LLM_FAMILIES, PROJECTOR_TYPES, TOWER_FAMILIES
from vila_deploy.checkpoint.video_config import VideoConfig
from vila_deploy.checkpoint.vision_config import ImageConfig, TilingConfig, VisionConfig
from vila_deploy.kernels.launch_mode import AUTOMATIC, check_kernel_launch
from vila_deploy.utils.fields import Fields
from vila_deploy.utils.files import canonical_json, read_json_object

Row = TypeVar("Row")
# Shard of the decoder → norm → its prescale.
Prescales = dict[str, dict[str, float]]


@dataclass(frozen=True)
class ModelFile:
    """The content of model.json.

    Args:
        norm_prescales: the power of two that each norm's weight was divided by.
        in_host_memory: rows of the plan that stay in host memory.
        kernel_launch: a name in KERNEL_LAUNCHES, how the kernels of a step follow each other.
    """

    config: VilaConfig
    norm_prescales: Prescales
    in_host_memory: tuple[str, ...] = ()
    kernel_launch: str = AUTOMATIC


def write_model(path: Path, model: ModelFile) -> None:
    """Write what `read_model` reads; families and projector by the names of their tables."""
    config = model.config
    llm, vision = asdict(config.llm), asdict(config.vision)
    llm["family"] = _key(LLM_FAMILIES, config.llm.family)
    # Of the checkpoint's files; this engine has its own.
    del vision["int8_linears"]
    vision["family"] = _key(TOWER_FAMILIES, config.vision.family)
    content = {
        "config": {
            **asdict(config),
            "llm": llm,
            "vision": vision,
            "projector": _key(PROJECTOR_TYPES, config.projector),
            "video": config.video.to_json(),
        },
        "norm_units": model.norm_prescales,
        "in_host_memory": list(model.in_host_memory),
        "kernel_launch": model.kernel_launch,
    }
    path.write_text(canonical_json(content), "utf-8")


def read_model(path: Path) -> ModelFile:
    """Return what `write_model` wrote; the manifest vouches for the file.

    Raises:
        VilaDeployError: it names a kernel launch mode that this version doesn't have.
    """
    content = read_json_object(path)
    config: dict[str, Any] = content["config"]
    llm, vision = config["llm"], config["vision"]
    quantization = llm["quantization"]
    config["llm"] = LlmConfig(
        **llm
        | {
            "family": LLM_FAMILIES[llm["family"]],
            "eos_token_ids": tuple(llm["eos_token_ids"]),
            "quantization": quantization and QuantizationConfig(**quantization),
        }
    )
    config["vision"] = VisionConfig(**vision | {"family": TOWER_FAMILIES[vision["family"]]})
    image, tiling = config["image"], config["tiling"]
    means = {"mean": tuple(image["mean"]), "std": tuple(image["std"])}
    config["image"] = ImageConfig(**image | means)
    config["tiling"] = TilingConfig(**tiling | {"scales": tuple(tiling["scales"])})
    config["projector"] = PROJECTOR_TYPES[config["projector"]]
    config["video"] = _video(config, path)
    config.setdefault("generation", config["llm"].family.generation)
    # Engines made before this field leave it open.
    kernel_launch = content.get("kernel_launch", AUTOMATIC)
    check_kernel_launch(kernel_launch, str(path))
    return ModelFile(
        VilaConfig(**config), content["norm_units"], tuple(content["in_host_memory"]), kernel_launch
    )


def _video(config: dict[str, Any], path: Path) -> VideoConfig:
    """Engines made before the key "video" have the number of frames only."""
    frames = config.pop("num_video_frames", None)
    if frames is not None:
        return VideoConfig(frames)
    return VideoConfig.from_fields(Fields(config["video"], path, "config.video."))


def _key(table: Mapping[str, Row], value: Row) -> str:
    (key,) = (key for key, row in table.items() if row == value)
    return key
