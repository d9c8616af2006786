"""Read the config of the vision tower, of its pixels and of the tiles of an image."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vila_deploy.checkpoint.int8_tower import read_int8_linears
from vila_deploy.checkpoint.variants import ACTIVATIONS, IMAGE_MODES, TOWER_FAMILIES, TowerFamily
from vila_deploy.utils.errors import short
from vila_deploy.utils.fields import Fields

MAX_PIXELS = 8192
MAX_SCALES, MAX_TILES = 8, 64


@dataclass(frozen=True)
class VisionConfig:
    """A tower; `qkv_bias` and `qk_norm` vary only in InternViT.

    `int8_linears`: full names of the linears that the checkpoint stores in int8.
    """

    family: TowerFamily
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    patch_size: int
    image_size: int
    hidden_act: str
    layer_norm_eps: float
    qkv_bias: bool = True
    qk_norm: bool = False
    int8_linears: tuple[str, ...] = ()

    @property
    def grid(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def positions(self) -> int:
        """Rows of the position embedding."""
        return self.grid**2 + self.family.has_class_token


@dataclass(frozen=True)
class ImageConfig:
    """How an image becomes pixels: RGB, a square of `size`, x·rescale, (x − mean) / std.

    `mode`: "resize" stretches it, "pad" fills it up with the mean colour, "crop" scales the shorter
    side and takes the middle.
    """

    mode: str
    size: int
    resample: int
    rescale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class TilingConfig:
    """How an image is cut into tiles of the tower's size, and which of their features are joined.

    `mode`:
    - "single": an image is one tile.
    - "s2": the image at each of `scales` (sides in pixels, rising), cut into tiles; the features
      of all scales are resized to the map of scale `output_scale` and lie side by side in channels.
    - "dynamic_s2": likewise, but the largest scale has `min_tiles` to `max_tiles` tiles in the grid
      that fits the image's shape best.
    - "dynamic": such a grid at one scale and a small copy of the image, each tile an image of
      its own in the prompt.

    `tile` is the side of a tile in pixels.
    """

    mode: str
    tile: int
    scales: tuple[int, ...]
    output_scale: int = 0
    min_tiles: int = 1
    max_tiles: int = 1

    @property
    def uses_s2(self) -> bool:
        return self.mode in ("s2", "dynamic_s2")

    @property
    def cuts_single_images(self) -> bool:
        """Whether the only image of a prompt is cut into more tiles than each of several."""
        return self.mode in ("dynamic", "dynamic_s2")

    def side(self, scale: int) -> int:
        """Tiles along one side of the image at `scale`."""
        return self.scales[scale] // self.tile

    def blocks(self, grid: tuple[int, int] | None) -> tuple[int, int]:
        """Rows and columns of tile-sized blocks in the joined map of dynamic_s2.

        Args:
            grid: rows and columns of tiles at the largest scale; None: the image is one tile.
        """
        if grid is None:
            return 1, 1
        if self.output_scale == len(self.scales) - 1:
            return grid
        return self.side(self.output_scale), self.side(self.output_scale)

    @property
    def max_tiles_per_image(self) -> int:
        """Tiles that go through the tower for one image, at most."""
        if self.mode == "single":
            return 1
        if self.mode == "dynamic":
            return self.max_tiles + (self.max_tiles > 1)
        lower = sum(self.side(index) ** 2 for index in range(len(self.scales) - 1))
        last = self.max_tiles if self.mode == "dynamic_s2" else self.side(-1) ** 2
        return lower + last

    @property
    def max_blocks_per_image(self) -> int:
        """Times that the projector's tokens of one map or block enter the prompt, at most."""
        if self.mode == "dynamic":
            return self.max_tiles_per_image
        if self.mode == "dynamic_s2":
            largest = self.output_scale == len(self.scales) - 1
            return self.max_tiles if largest else self.side(self.output_scale) ** 2
        return 1


def load_vision_config(fields: Fields) -> VisionConfig:
    """Read vision_tower/config.json."""
    family = TOWER_FAMILIES[fields.choice("model_type", TOWER_FAMILIES, what="vision tower")]
    _check_architecture(fields, family)
    hidden = fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads", high=4096)
    if hidden % heads:
        raise fields.error("num_attention_heads", f"{heads} does not divide hidden_size {hidden}")
    size = fields.integer("image_size", high=MAX_PIXELS)
    patch = fields.integer("patch_size", high=MAX_PIXELS)
    if size < patch:
        raise fields.error("patch_size", f"{patch} is larger than image_size {size}")
    if fields.integer("num_channels", 3) != 3:
        raise fields.error("num_channels", "must be 3")
    internvit = family.name == "internvit"
    if internvit and fields.text("norm_type", "rms_norm") != "rms_norm":
        raise fields.error("norm_type", "only rms_norm is supported")
    return VisionConfig(
        family=family,
        hidden_size=hidden,
        num_layers=fields.integer("num_hidden_layers", high=1024),
        num_heads=heads,
        intermediate_size=fields.integer("intermediate_size"),
        patch_size=patch,
        image_size=size,
        hidden_act=fields.choice("hidden_act", ACTIVATIONS, family.activation, what="activation"),
        layer_norm_eps=fields.number("layer_norm_eps", family.norm_epsilon, low=1e-12, high=1.0),
        qkv_bias=fields.boolean("qkv_bias", False) if internvit else True,
        qk_norm=fields.boolean("qk_normalization", True) if internvit else False,
        int8_linears=read_int8_linears(fields),
    )


def _check_architecture(fields: Fields, family: TowerFamily) -> None:
    """Raise where `architectures`, by which VILA chooses the tower's class, is another family's."""
    names = fields.values.get("architectures")
    if names and family.architecture not in str(names).lower():
        raise fields.error(
            "architectures",
            f"{short(names)} contradicts model_type {fields.text('model_type')}",
            "correct one of them",
        )


def load_image_config(root: Fields, preprocessor: Fields, vision: VisionConfig) -> ImageConfig:
    """Read `image_aspect_ratio` of the root config and vision_tower/preprocessor_config.json."""
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if not preprocessor.boolean(step, True):
            raise preprocessor.error(step, "images are always resized, rescaled and normalized")
    family = vision.family
    std = preprocessor.numbers("image_std", family.std, count=3)
    if min(std) < 1e-6:
        raise preprocessor.error("image_std", f"must be positive, found {std}")
    asked = root.choice(
        "image_aspect_ratio",
        IMAGE_MODES,
        "square" if family.crops else "resize",
        what="image mode",
    )
    mode = IMAGE_MODES[asked]
    if mode == "processor":
        mode = "crop" if family.crops else "resize"
    return ImageConfig(
        mode=mode,
        size=_processor_size(preprocessor, vision),
        resample=preprocessor.integer("resample", 3, low=0, high=5),
        rescale=preprocessor.number("rescale_factor", 1 / 255, low=1e-9, high=1.0),
        mean=preprocessor.numbers("image_mean", family.mean, count=3),
        std=std,
    )


def _processor_size(fields: Fields, vision: VisionConfig) -> int:
    """Side of the square; CLIP's is its crop's, InternViT's processor writes none."""
    key = "crop_size" if "crop_size" in fields else "size"
    if key not in fields:
        return vision.image_size
    if vision.family.crops and not fields.boolean("do_center_crop", True):
        raise fields.error("do_center_crop", "the middle of the image is always taken")
    if key == "crop_size" and "size" in fields and _side(fields, "size") != _side(fields, key):
        raise fields.error(
            "size", "the shorter side must be scaled to crop_size, which is then cut out"
        )
    return _side(fields, key)


def _side(fields: Fields, key: str) -> int:
    """Return a square's side, in any of the ways in which image processors write it."""
    if isinstance(fields.values[key], int):
        return fields.integer(key, high=MAX_PIXELS)
    size = fields.child(key)
    if "shortest_edge" in size:
        return size.integer("shortest_edge", high=MAX_PIXELS)
    height, width = (size.integer(name, high=MAX_PIXELS) for name in ("height", "width"))
    if height != width:
        raise fields.error(key, f"must be square, found {height} by {width}")
    return height


def load_tiling_config(root: Fields, vision: VisionConfig) -> TilingConfig:
    """Read the keys about scales and tiles of the root config.

    The tile is the tower's square: `s2_max_split_size` and the smallest scale must be the same.
    """
    tile, mode = vision.image_size, _tiling_mode(root)
    if mode == "single":
        return TilingConfig(mode, tile, (tile,))
    low, high = root.integer("min_tiles", 1), root.integer("max_tiles", 12)
    if not low <= high <= MAX_TILES:
        raise root.error(
            "max_tiles", f"must be in min_tiles {low}..{MAX_TILES}, found {high}", "use 12"
        )
    if mode == "dynamic":
        return TilingConfig(mode, tile, (tile,), 0, low, high)
    scales = _scales(root, tile)
    output = root.integer(
        "s2_resize_output_to_scale_idx", 0, low=-len(scales), high=len(scales) - 1
    )
    output %= len(scales)
    if mode == "s2":
        return TilingConfig(mode, tile, scales, output)
    least = (scales[-1] // scales[0]) ** 2
    if least > high:
        raise root.error(
            "max_tiles", f"{high} is fewer than the {least} tiles of the largest scale"
        )
    return TilingConfig(mode, tile, scales, output, least, high)


def _tiling_mode(root: Fields) -> str:
    dynamic_s2, static_s2 = root.boolean("dynamic_s2", False), root.boolean("s2", False)
    aspect = root.values.get("image_aspect_ratio")
    if dynamic_s2 != (aspect == "dynamic_s2"):
        wanted, key = ("false", "true")[aspect == "dynamic_s2"], "dynamic_s2"
        raise root.error(key, f"must be {wanted}, as image_aspect_ratio is {short(aspect)}")
    if static_s2 and (dynamic_s2 or aspect == "dynamic"):
        raise root.error("s2", f"must be false, as image_aspect_ratio is {short(aspect)}")
    if dynamic_s2:
        return "dynamic_s2"
    if static_s2:
        return "s2"
    return "dynamic" if aspect == "dynamic" else "single"


def _scales(root: Fields, tile: int) -> tuple[int, ...]:
    """`s2_scales` as "448,896,1344" or as a list; each must be whole tiles."""
    value = root.values.get("s2_scales", "")
    parts = value.split(",") if isinstance(value, str) else value
    try:
        # Through text, so that neither true nor 448.5 passes for an integer.
        scales = sorted(int(str(part)) for part in parts)
    except (TypeError, ValueError):
        scales = []
    limit = tile * math.isqrt(MAX_TILES)
    if not 1 <= len(scales) <= MAX_SCALES or not 1 <= scales[0] <= scales[-1] <= limit:
        raise root.error(
            "s2_scales", f"must be 1 to {MAX_SCALES} sizes in pixels up to {limit}, such as "
            f'"{tile},{2 * tile}"'
        )  # fmt: skip
    if scales[0] != tile or any(scale % tile for scale in scales):
        raise root.error(
            "s2_scales", f"{scales} must be multiples of the tower's {tile} pixels, from {tile} on"
        )
    split = root.integer("s2_max_split_size", tile, high=MAX_PIXELS)
    if split != tile:
        raise root.error("s2_max_split_size", f"{split} differs from the tower's {tile} pixels")
    return tuple(scales)
