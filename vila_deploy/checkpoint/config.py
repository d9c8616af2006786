"""Read the config.json files of a checkpoint, once, checked at the boundary."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from vila_deploy.checkpoint.decoding_config import check_decoding
from vila_deploy.checkpoint.folder_layout import Layout, find_layout
from vila_deploy.checkpoint.generation import generation_of, prompt_template
from vila_deploy.checkpoint.llm_config import LlmConfig, check_quantized_linears, load_llm_config
from vila_deploy.checkpoint.variants import (
    GENERATIONS,
    PROJECTOR_TYPES,
    TOKEN_ORDERS,
    Generation,
    ProjectorType,
)
from vila_deploy.checkpoint.video_config import VideoConfig, load_video_config
from vila_deploy.checkpoint.vision_config import (
    ImageConfig,
    TilingConfig,
    VisionConfig,
    load_image_config,
    load_tiling_config,
    load_vision_config,
)
from vila_deploy.utils.errors import short
from vila_deploy.utils.fields import Fields

# Lengths from here on mean that there is no limit.
UNLIMITED = 1 << 24


@dataclass(frozen=True)
class VilaConfig:
    """What the config files of a checkpoint say; `generation` is a key of GENERATIONS.

    `prompt_template` None: chosen by LLM family and tokenizer.
    """

    llm: LlmConfig
    vision: VisionConfig
    projector: ProjectorType
    image: ImageConfig
    tiling: TilingConfig
    select_layer: int
    select_feature: str
    token_order: str
    model_max_length: int
    generation: str
    video: VideoConfig = field(default_factory=VideoConfig)
    prompt_template: str | None = None

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
        return _feature_side(self.vision, self.tiling)

    @property
    def tokens_per_block(self) -> int:
        """Embeddings that the projector makes of one such map."""
        return math.ceil(self.feature_side / self.projector.window) ** 2

    @property
    def max_tokens_per_image(self) -> int:
        """Embeddings that one image takes in the prompt, at most."""
        return self.tokens_per_block * self.tiling.max_blocks_per_image

    @property
    def tokens_per_video(self) -> int:
        """Embeddings that a video of the model's own frames takes, with a line end behind each."""
        places = self.video.marker_tokens(self.video.num_frames, self.tokens_per_block)
        return sum(places) + len(places)

    @property
    def recipe(self) -> Generation:
        """How images enter the prompt."""
        return GENERATIONS[self.generation]

    @property
    def image_end(self) -> str:
        """Text whose embeddings follow each image in the prompt; empty for none."""
        return self.recipe.image_end


def load_config(root: Path, template: str | None = None) -> VilaConfig:
    """Read and check every config file under `root`; no weights.

    Args:
        template: the prompt template that the user names; None: what the configs say.

    Raises:
        VilaDeployError: a missing folder, file or key, a wrong type, or an unsupported variant.
    """
    return config_of(find_layout(root), template)


def config_of(layout: Layout, template: str | None = None) -> VilaConfig:
    """Do what `load_config` does, for a checkpoint whose config files have been read."""
    fields, llm_fields, projector_fields = layout.fields, layout.llm, layout.projector
    _refuse_unsupported(fields)
    llm = load_llm_config(llm_fields, layout.generation)
    vision = load_vision_config(layout.vision)
    projector = PROJECTOR_TYPES[
        projector_fields.choice("mm_projector_type", PROJECTOR_TYPES, what="projector")
    ]
    generation = generation_of(fields, llm.family)
    tiling = load_tiling_config(fields, vision)
    config = VilaConfig(
        llm=llm,
        vision=vision,
        projector=projector,
        image=load_image_config(fields, layout.preprocessor, vision),
        tiling=tiling,
        select_layer=fields.integer("mm_vision_select_layer", -2, low=-200, high=200),
        select_feature=fields.choice(
            "mm_vision_select_feature",
            ("cls_patch", "patch"),
            "patch" if vision.family.has_class_token else "cls_patch",
        ),
        token_order=fields.choice(
            "mm_projector_token_order",
            TOKEN_ORDERS,
            projector.token_order or GENERATIONS[generation].token_order,
            what="token order",
        ),
        model_max_length=_max_length(
            llm_fields,
            "model_max_length",
            _max_length(llm_fields, "tokenizer_model_max_length", llm.max_position_embeddings),
        ),
        generation=generation,
        video=load_video_config(
            fields, math.ceil(_feature_side(vision, tiling) / projector.window)
        ),
        prompt_template=prompt_template(fields, llm_fields, llm.family, template),
    )
    if generation != "nvila":
        check_decoding(layout.generation)
    check_quantized_linears(llm, llm_fields)
    _check_consistency(config, fields)
    return config


def _feature_side(vision: VisionConfig, tiling: TilingConfig) -> int:
    return vision.grid * (tiling.side(tiling.output_scale) if tiling.mode == "s2" else 1)


def _max_length(fields: Fields, key: str, default: int) -> int:
    """Return a length in tokens; transformers writes 1e30 where a tokenizer has no limit."""
    value = fields.values.get(key)
    if isinstance(value, int | float) and value >= UNLIMITED:
        return default
    return fields.integer(key, default)


def _check_consistency(config: VilaConfig, fields: Fields) -> None:
    vision = config.vision
    if config.video.pools and config.tiling.mode == "s2":
        raise fields.error("s2", "must be false with TSPVideoEncoder, which no release has with S2")
    if fields.boolean("mm_use_im_start_end", False):
        raise fields.error("mm_use_im_start_end", "markers around images are not supported")
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
    """Raise for models of VILA's family whose vision encoders choose what they look at."""
    kind = fields.values.get("model_type")
    if fields.boolean("ps3", False) or (isinstance(kind, str) and "topdown" in kind):
        key = "ps3" if "ps3" in fields else "model_type"
        raise fields.error(key, "PS3 towers (VILA-HD) are not supported", "use another model")
    gaze = next((key for key in fields.values if "autogaze" in key or "gazing" in key), None)
    if gaze is not None:
        raise fields.error(
            short(gaze), "AutoGaze (NVILA-8B-HD-Video) is not supported", "use NVILA-8B-Video"
        )
    if fields.integer("video_max_tiles", 1) != 1:
        raise fields.error("video_max_tiles", "frames of a video are not cut into tiles", "use 1")
