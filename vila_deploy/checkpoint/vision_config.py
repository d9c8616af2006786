"""What vision_tower/ says of the tower and of its pixels, checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vila_deploy.checkpoint.fields import Fields
from vila_deploy.checkpoint.variants import IMAGE_MODES, TOWER_FAMILIES, TowerFamily


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


def load_vision_config(fields: Fields) -> VisionConfig:
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


def load_image_config(root_fields: Fields, preprocessor_file: Path) -> ImageConfig:
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
