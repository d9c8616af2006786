"""What the config.json files of a checkpoint say, read once and checked at the boundary."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

from vila_deploy.checkpoint.fields import Fields
from vila_deploy.checkpoint.variants import (
    IMAGE_MODES,
    LLM_FAMILIES,
    PROJECTOR_TYPES,
    PROMPT_NAMES,
    TOKEN_ORDERS,
    TOWER_FAMILIES,
    LlmFamily,
    ProjectorType,
    TowerFamily,
)
from vila_deploy.errors import VilaDeployError, short

PARTS = ("llm", "vision_tower", "mm_projector")


@dataclass(frozen=True)
class QuantizationConfig:
    """`quantization_config` of a 4-bit llm/: which format its tensors are in."""

    quant_method: str
    bits: int
    group_size: int
    zero_point: bool
    version: str


@dataclass(frozen=True)
class LlmConfig:
    family: LlmFamily
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rope_theta: float
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    quantization: QuantizationConfig | None


@dataclass(frozen=True)
class VisionConfig:
    family: TowerFamily
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    patch_size: int
    image_size: int
    hidden_act: str
    layer_norm_eps: float

    @property
    def grid(self) -> int:
        """Patches along one side of the picture."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class ImageConfig:
    """How a picture becomes pixels: RGB, resize to `size`², x·rescale, (x − mean) / std."""

    mode: str
    size: int
    resample: int
    rescale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class VilaConfig:
    llm: LlmConfig
    vision: VisionConfig
    projector: ProjectorType
    image: ImageConfig
    select_layer: int
    select_feature: str
    token_order: str
    model_max_length: int
    prompt_template: str | None = None  # None: chosen by LLM family and tokenizer

    @property
    def vision_layers_used(self) -> int:
        """Encoder layers that feed the selected hidden state; later ones are never loaded."""
        index = self.select_layer
        return index if index >= 0 else self.vision.num_layers + 1 + index

    @property
    def tokens_per_image(self) -> int:
        """Embeddings that one picture takes in the prompt."""
        return math.ceil(self.vision.grid / self.projector.window) ** 2

    @property
    def image_end(self) -> str:
        """Text whose embeddings follow each picture; empty for none."""
        return self.llm.family.image_end


def load_config(root: Path) -> VilaConfig:
    """Reads and checks every config file of the three-folder layout under `root`; no weights.

    Raises:
        VilaDeployError: a missing folder, file or key, a wrong type, or an unsupported variant.
    """
    if not os.path.isdir(root):  # noqa: PTH112  Path.is_dir raises on EACCES
        raise VilaDeployError("no such folder", where=root, fix="give the checkpoint's folder")
    fields = Fields.from_file(root / "config.json")
    if "mm_vision_tower" in fields and "llm_cfg" not in fields:
        raise fields.error(
            "mm_vision_tower",
            "the flat layout of the first generation is not supported by this version",
            f"use VILA1.5 or later, which has {', '.join(PARTS)}",
        )
    for part in PARTS:
        if not os.path.isdir(root / part):  # noqa: PTH112
            raise VilaDeployError(
                f"part {part}/ is missing", where=root, fix="download the whole checkpoint"
            )
    llm_fields = Fields.from_file(root / "llm" / "config.json")
    llm = _llm_config(llm_fields, root / "llm" / "generation_config.json")
    vision = _vision_config(Fields.from_file(root / "vision_tower" / "config.json"))
    projector_fields = Fields.from_file(root / "mm_projector" / "config.json")
    projector = PROJECTOR_TYPES[
        projector_fields.choice("mm_projector_type", PROJECTOR_TYPES, what="projector")
    ]
    config = VilaConfig(
        llm=llm,
        vision=vision,
        projector=projector,
        image=_image_config(fields, root / "vision_tower" / "preprocessor_config.json"),
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
        model_max_length=llm_fields.integer(
            "model_max_length",
            llm_fields.integer("tokenizer_model_max_length", llm.max_position_embeddings),
        ),
        prompt_template=_prompt_template(fields),
    )
    _check_quantized_sizes(llm, llm_fields)
    _check_consistency(config, fields)
    return config


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


def _llm_config(fields: Fields, generation_file: Path) -> LlmConfig:
    architectures = fields.values.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    if not isinstance(name, str) or name not in LLM_FAMILIES:
        raise fields.error(
            "architectures",
            f"unknown LLM family {short(name)}",
            f"this version supports {', '.join(sorted(LLM_FAMILIES))}",
        )
    family = LLM_FAMILIES[name]
    hidden = fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads", high=4096)
    kv_heads = fields.integer("num_key_value_heads", heads, high=4096)
    if hidden % heads and "head_dim" not in fields:
        raise fields.error("num_attention_heads", f"{heads} does not divide hidden_size {hidden}")
    if heads % kv_heads:
        raise fields.error("num_key_value_heads", f"{kv_heads} does not divide {heads} heads")
    head_dim = fields.integer("head_dim", hidden // heads, high=4096)
    if head_dim % 2:
        raise fields.error("head_dim", f"must be even for rotary embedding, found {head_dim}")
    fields.choice("hidden_act", ("silu",), "silu", what="activation")
    _refuse_rope_scaling(fields)
    for flag, expected in (("attention_bias", family.qkv_bias), ("mlp_bias", False)):
        if fields.boolean(flag, expected) != expected:
            raise fields.error(flag, f"{family.name} always has {str(expected).lower()} here")
    if fields.boolean("use_sliding_window", False):
        raise fields.error("use_sliding_window", "sliding-window attention is not supported")
    if os.path.lexists(generation_file):
        generation = Fields.from_file(generation_file)
    else:
        generation = Fields({}, generation_file)
    vocab = fields.integer("vocab_size")
    stops = {
        *fields.integers("eos_token_id", [], high=vocab - 1),
        *generation.integers("eos_token_id", [], high=vocab - 1),
    }
    bos = fields.integer("bos_token_id", -1, low=-1, high=vocab - 1)
    return LlmConfig(
        family=family,
        hidden_size=hidden,
        num_layers=fields.integer("num_hidden_layers", high=1024),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=fields.integer("intermediate_size"),
        vocab_size=vocab,
        rope_theta=_rope_theta(fields),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6, low=1e-12, high=1.0),
        max_position_embeddings=fields.integer("max_position_embeddings", 2048),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        bos_token_id=bos if bos >= 0 else None,
        eos_token_ids=tuple(sorted(stops)),
        quantization=_quantization_config(fields),
    )


def _check_quantized_sizes(config: LlmConfig, fields: Fields) -> None:
    """AutoAWQ's layout: whole groups along the inputs, whole words of 8 along the outputs."""
    if config.quantization is None:
        return
    group = config.quantization.group_size
    inputs = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads × head_dim": config.num_heads * config.head_dim,
    }
    outputs = {**inputs, "num_key_value_heads × head_dim": config.num_kv_heads * config.head_dim}
    for key, unit, sizes in (
        ("quantization_config.group_size", group, inputs),
        ("quantization_config.version", 8, outputs),
    ):
        for what, size in sizes.items():
            if size % unit:
                raise fields.error(key, f"{unit} does not divide {what} {size}")


def _rope_theta(fields: Fields) -> float:
    """transformers 5 writes `rope_parameters.rope_theta`, earlier versions a key of its own."""
    if "rope_parameters" in fields:
        return fields.child("rope_parameters").number("rope_theta", 10000.0, low=1.0)
    return fields.number("rope_theta", 10000.0, low=1.0)


def _refuse_rope_scaling(fields: Fields) -> None:
    for key in ("rope_scaling", "rope_parameters"):
        if key in fields:
            scaling = fields.child(key)
            kind = scaling.text("rope_type", scaling.text("type", "default"))
            if kind != "default":
                raise fields.error(
                    key, f"rope type {short(kind)} is not supported", "use 'default'"
                )
            if scaling.number("partial_rotary_factor", 1.0) != 1.0:
                raise fields.error(key, "partial rotary embedding is not supported")


def _quantization_config(fields: Fields) -> QuantizationConfig | None:
    if "quantization_config" not in fields:
        return None
    child = fields.child("quantization_config")
    return QuantizationConfig(
        quant_method=child.choice("quant_method", ("awq",), what="quantization method"),
        bits=child.integer("bits", low=4, high=4),
        group_size=child.integer("group_size", low=1),
        zero_point=child.boolean("zero_point", True),
        version=child.choice("version", ("gemm", "GEMM"), "gemm", what="AWQ layout").lower(),
    )


def _vision_config(fields: Fields) -> VisionConfig:
    name = fields.choice("model_type", TOWER_FAMILIES, what="vision tower")
    hidden = fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads", high=4096)
    if hidden % heads:
        raise fields.error("num_attention_heads", f"{heads} does not divide hidden_size {hidden}")
    size, patch = fields.integer("image_size", high=8192), fields.integer("patch_size", high=8192)
    if size < patch:
        raise fields.error("patch_size", f"{patch} is larger than image_size {size}")
    if fields.integer("num_channels", 3) != 3:
        raise fields.error("num_channels", "must be 3")
    return VisionConfig(
        family=TOWER_FAMILIES[name],
        hidden_size=hidden,
        num_layers=fields.integer("num_hidden_layers", high=1024),
        num_heads=heads,
        intermediate_size=fields.integer("intermediate_size"),
        patch_size=patch,
        image_size=size,
        hidden_act=fields.choice(
            "hidden_act", ("gelu_pytorch_tanh", "gelu"), "gelu_pytorch_tanh", what="activation"
        ),
        layer_norm_eps=fields.number("layer_norm_eps", 1e-6, low=1e-12, high=1.0),
    )


def _image_config(root_fields: Fields, preprocessor_file: Path) -> ImageConfig:
    fields = Fields.from_file(preprocessor_file)
    size = fields.child("size")
    height, width = size.integer("height", high=8192), size.integer("width", high=8192)
    if height != width:
        raise fields.error("size", f"must be square, found {height} by {width}")
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if not fields.boolean(step, True):
            raise fields.error(step, "pictures are always resized, rescaled and normalized")
    std = fields.numbers("image_std", count=3)
    if min(std) < 1e-6:
        raise fields.error("image_std", f"must be positive, found {std}")
    return ImageConfig(
        mode=root_fields.choice("image_aspect_ratio", IMAGE_MODES, "resize", what="image mode"),
        size=height,
        resample=fields.integer("resample", 3, low=0, high=5),
        rescale=fields.number("rescale_factor", 1 / 255, low=1e-9, high=1.0),
        mean=fields.numbers("image_mean", count=3),
        std=std,
    )


def _check_consistency(config: VilaConfig, fields: Fields) -> None:
    for key, what in (
        ("s2", "multi-scale towers are"),
        ("dynamic_s2", "multi-scale towers are"),
        ("mm_use_im_start_end", "markers around pictures are"),
    ):
        if fields.boolean(key, False):
            raise fields.error(key, f"{what} not supported by this version")
    if config.select_feature == "patch" and not config.vision.family.has_class_token:
        raise fields.error(
            "mm_vision_select_feature",
            f"'patch' drops a class token, which {config.vision.family.name} has not",
            "use 'cls_patch'",
        )
    if not 1 <= config.vision_layers_used <= config.vision.num_layers:
        raise fields.error(
            "mm_vision_select_layer",
            f"{config.select_layer} is outside the tower's {config.vision.num_layers} layers",
        )
    if config.image.size != config.vision.image_size:
        raise fields.error(
            "image_size",
            f"preprocessor makes {config.image.size} pixels, the tower takes "
            f"{config.vision.image_size}",
            "correct vision_tower/preprocessor_config.json or vision_tower/config.json",
        )
    for key, expected in (
        ("hidden_size", config.llm.hidden_size),
        ("mm_hidden_size", config.vision.hidden_size),
    ):
        if fields.integer(key, expected) != expected:
            raise fields.error(key, f"{fields.values[key]} differs from its part's {expected}")
