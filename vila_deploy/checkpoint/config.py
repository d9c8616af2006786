"""Read the config.json files of a checkpoint, once, checked at the boundary."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

from vila_deploy.checkpoint.folder_layout import Layout, find_layout
from vila_deploy.checkpoint.llm_config import LlmConfig, check_quantized_sizes, load_llm_config
from vila_deploy.checkpoint.variants import (
    PROJECTOR_TYPES,
    PROMPT_NAMES,
    TOKEN_ORDERS,
    ProjectorType,
)
from vila_deploy.checkpoint.vision_config import (
    ImageConfig,
    TilingConfig,
    VisionConfig,
    load_image_config,
    load_tiling_config,
    load_vision_config,
)
from vila_deploy.utils.errors import VilaDeployError, short
from vila_deploy.utils.fields import Fields

# Lengths from here on mean that there is no limit.
UNLIMITED = 1 << 24


@dataclass(frozen=True)
class VilaConfig:
    llm: LlmConfig
    vision: VisionConfig
    projector: ProjectorType
    image: ImageConfig
    tiling: TilingConfig
    select_layer: int
    select_feature: str
    token_order: str
    model_max_length: int
    num_video_frames: int = 8
    prompt_template: str | None = None  # None: chosen by LLM family and tokenizer

    @property
    def vision_layers_used(self) -> int:
        """Encoder layers that feed the selected hidden state; later ones are never loaded."""
        index = self.select_layer
        return index if index >= 0 else self.vision.num_layers + 1 + index

    @property
    def feature_channels(self) -> int:
        """Channels of what the projector takes: the tower's, once for each scale that is joined."""
        scales = len(self.tiling.scales) if self.tiling.uses_s2 else 1
        return self.vision.hidden_size * scales

    @property
    def feature_side(self) -> int:
        """Side of the feature map that the projector takes at a time."""
        whole_map = self.tiling.mode == "s2"
        return self.vision.grid * (self.tiling.side(self.tiling.output_scale) if whole_map else 1)

    @property
    def tokens_per_block(self) -> int:
        """Embeddings that the projector makes of one such map."""
        return math.ceil(self.feature_side / self.projector.window) ** 2

    @property
    def max_tokens_per_image(self) -> int:
        """Embeddings that one image takes in the prompt, at most."""
        return self.tokens_per_block * self.tiling.max_blocks_per_image

    @property
    def image_end(self) -> str:
        """Text whose embeddings follow each image; empty for none."""
        return self.llm.family.image_end


def load_config(root: Path) -> VilaConfig:
    """Read and check every config file under `root`; no weights.

    Raises:
        VilaDeployError: a missing folder, file or key, a wrong type, or an unsupported variant.
    """
    return config_of(find_layout(root))


def config_of(layout: Layout) -> VilaConfig:
    """Return the config of a checkpoint whose files have been read; raises as load_config does."""
    fields, llm_fields, projector_fields = layout.fields, layout.llm, layout.projector
    llm = load_llm_config(llm_fields, layout.generation)
    vision = load_vision_config(layout.vision)
    projector = PROJECTOR_TYPES[
        projector_fields.choice("mm_projector_type", PROJECTOR_TYPES, what="projector")
    ]
    config = VilaConfig(
        llm=llm,
        vision=vision,
        projector=projector,
        image=load_image_config(fields, layout.preprocessor, vision),
        tiling=load_tiling_config(fields, vision),
        select_layer=fields.integer("mm_vision_select_layer", -2, low=-200, high=200),
        select_feature=fields.choice(
            "mm_vision_select_feature",
            ("cls_patch", "patch"),
            "patch" if vision.family.has_class_token else "cls_patch",
        ),
        token_order=fields.choice(
            "mm_projector_token_order",
            TOKEN_ORDERS,
            projector.token_order or llm.family.token_order,
            what="token order",
        ),
        model_max_length=_max_length(
            llm_fields,
            "model_max_length",
            _max_length(llm_fields, "tokenizer_model_max_length", llm.max_position_embeddings),
        ),
        num_video_frames=fields.integer("num_video_frames", 8, high=4096),
        prompt_template=_prompt_template(fields),
    )
    check_quantized_sizes(llm, llm_fields)
    _check_consistency(config, fields)
    return config


def _max_length(fields: Fields, key: str, default: int) -> int:
    """Return a length in tokens; transformers writes 1e30 where a tokenizer has no limit."""
    value = fields.values.get(key)
    if isinstance(value, int | float) and value >= UNLIMITED:
        return default
    return fields.integer(key, default)


def with_template(config: VilaConfig, name: str | None) -> VilaConfig:
    """`config` with the prompt template that the user names; None leaves it as it is.

    Raises:
        VilaDeployError: unknown; the message lists those there are.
    """
    if name is None:
        return config
    if name not in PROMPT_NAMES:
        raise VilaDeployError(
            f"unknown prompt template {short(name)}", fix=f"choose from {', '.join(PROMPT_NAMES)}"
        )
    return replace(config, prompt_template=name)


def _prompt_template(fields: Fields) -> str | None:
    """Our own key of the root config, for models whose template the tokenizer can't tell."""
    if "prompt_template" not in fields:
        return None
    return fields.choice("prompt_template", PROMPT_NAMES, what="prompt template")


def _check_consistency(config: VilaConfig, fields: Fields) -> None:
    vision = config.vision
    if fields.boolean("mm_use_im_start_end", False):
        raise fields.error("mm_use_im_start_end", "markers around images are not supported")
    _refuse_unsupported(fields)
    keeps_all, class_token = config.select_feature == "cls_patch", vision.family.has_class_token
    if keeps_all == class_token:
        right = "patch" if class_token else "cls_patch"
        raise fields.error(
            "mm_vision_select_feature",
            f"{config.select_feature!r} doesn't fit {vision.family.name}, which has "
            f"{'a' if class_token else 'no'} class token",
            f"use {right!r}",
        )
    if not 1 <= config.vision_layers_used <= vision.num_layers:
        raise fields.error(
            "mm_vision_select_layer",
            f"{config.select_layer} is outside the tower's {vision.num_layers} layers",
        )
    expected = config.tiling.scales[-1] if config.tiling.mode == "s2" else vision.image_size
    if config.image.size != expected:
        raise fields.error(
            "image_size",
            f"preprocessor makes {config.image.size} pixels, {expected} are needed",
            "correct vision_tower/preprocessor_config.json or vision_tower/config.json",
        )
    for key, expected in (
        ("hidden_size", config.llm.hidden_size),
        ("mm_hidden_size", config.feature_channels),
    ):
        if fields.integer(key, expected) != expected:
            raise fields.error(key, f"{fields.values[key]} differs from its part's {expected}")


def _refuse_unsupported(fields: Fields) -> None:
    """Keys of later VILA code that change what it computes, at values that no release has."""
    if fields.boolean("ps3", False):
        raise fields.error("ps3", "PS3 towers are not supported")
    if fields.integer("num_time_tokens", 0, low=0):
        raise fields.error("num_time_tokens", "time tokens are not supported", "use 0")
    if "chat_template" in fields:
        raise fields.error("chat_template", "is not read", "use --prompt-template instead")
    for key, basic in (
        ("image_encoder", "BasicImageEncoder"),
        ("video_encoder", "BasicVideoEncoder"),
    ):
        if key in fields:
            target = _encoder(fields, key).text("_target_", basic)
            if target.rpartition(".")[2] != basic:
                raise fields.error(key, f"{short(target)} is not supported", f"use {basic}")


def _encoder(fields: Fields, key: str) -> Fields:
    """Return the object under `key`; VILA's own code may save its JSON text instead."""
    value = fields.values[key]
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise fields.error(key, "is no JSON object") from error
    return Fields({key: value}, fields.source, fields.prefix).child(key)
