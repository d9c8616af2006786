"""Images, pixels and tiny weights from seeds, for comparing the image path with the original's.

Imported by the tests and by whoever records tests/golden/{towers,s2,preprocess,merged_prompts}.json
again: see "recipe" there. Needs numpy and PIL only; every array is float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageOps

ORIENTATION = 0x0112  # the EXIF tag; 6 means: turn by 90 degrees clockwise to see it upright

# The towers: 5x5 patches, an odd grid, so that downsampling has to pad.
HIDDEN, LAYERS, HEADS, INTERMEDIATE, PATCH, IMAGE = 48, 3, 3, 96, 6, 30
PATCHES = (IMAGE // PATCH) ** 2
TOWER = {
    "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_channels": 3, "image_size": IMAGE, "patch_size": PATCH,
}  # fmt: skip
SIGLIP = TOWER | {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}  # no pooling head
CLIP = TOWER | {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
INTERN = TOWER | {"hidden_act": "gelu", "layer_norm_eps": 1e-6}  # + qk_normalization, qkv_bias

# The language models.
LLM = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 256,
    "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
LLAMA = LLM | {"rope_theta": 10000.0, "rms_norm_eps": 1e-5}
QWEN2 = LLM | {"rope_theta": 1000000.0, "rms_norm_eps": 1e-6}
LLM_HIDDEN = 32

# Two images in a prompt: the first generations mark them by an index, NVILA by a token's id.
VILA15_PROMPT = (1, 5, 9, -200, 7, 8, -200, 11, 3)
NVILA_IMAGE, NVILA_NEWLINE = 60, 7
NVILA_PROMPT = (5, 9, 60, 7, 8, 60, 11, 3)
NVILA_ONE_IMAGE_PROMPT = (5, 9, 60, 8, 11, 3)

# Images of ten aspect ratios (width, height) for the tiling rules.
SIZES = (
    (640, 480), (480, 640), (1000, 300), (300, 1000), (512, 512),
    (1920, 1080), (100, 37), (33, 99), (50, 50), (2000, 1000),
)  # fmt: skip


def images() -> dict[str, Image.Image]:
    """Six small images; "exif" lies on its side with EXIF orientation 6, see `upright`."""
    made = {
        "portrait": image(40, 64, 1),
        "landscape": image(64, 40, 2),
        "tiny": image(3, 2, 3),
        "gray": Image.fromarray(_bytes((20, 50), 4)),
        "rgba": Image.fromarray(_bytes((47, 33, 4), 5)),
    }
    lying = image(36, 52, 6)
    exif = lying.getexif()
    exif[ORIENTATION] = 6
    file = BytesIO()
    lying.save(file, "PNG", exif=exif)
    made["exif"] = Image.open(file)
    return made


def upright(image: Image.Image) -> Image.Image:
    """The image as its EXIF orientation wants it seen, without that tag."""
    return ImageOps.exif_transpose(image)


def sized_image(size: tuple[int, int]) -> Image.Image:
    """The RGB image of that (width, height), such as those of SIZES."""
    return image(*size, seed=size[0] * 10007 + size[1])


def image(width: int, height: int, seed: int) -> Image.Image:
    """An RGB image: coarse patches, which survive downsampling, under fine noise."""
    return Image.fromarray(_bytes((height, width, 3), seed))


def _bytes(shape: tuple[int, ...], seed: int) -> np.ndarray:
    random = np.random.RandomState(seed)
    coarse = random.randint(0, 192, (11, 11, *shape[2:]))
    rows = np.arange(shape[0]) * 11 // shape[0]
    columns = np.arange(shape[1]) * 11 // shape[1]
    fine = random.randint(0, 64, shape)
    return (coarse[rows[:, None], columns] + fine).astype(np.uint8)


def pixels(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Uniform in [-1, 1), as normalized pixel values are."""
    return np.random.RandomState(seed).uniform(-1, 1, shape).astype(np.float32)


def siglip_weights(seed: int = 11) -> dict[str, np.ndarray]:
    """By their names in vision_tower/; without the pooling head."""
    return draw(_transformer_tower("vision_model.", classes=0), seed)


def clip_weights(seed: int = 12) -> dict[str, np.ndarray]:
    """By their names in a CLIP vision model: a class token, no bias on the patches."""
    return draw(_transformer_tower("vision_model.", classes=1), seed)


def _transformer_tower(prefix: str, classes: int) -> dict[str, tuple[int, ...]]:
    embeddings = f"{prefix}embeddings"
    shapes: dict[str, tuple[int, ...]] = {
        f"{embeddings}.patch_embedding.weight": (HIDDEN, 3, PATCH, PATCH),
        f"{embeddings}.position_embedding.weight": (PATCHES + classes, HIDDEN),
        **_affine(f"{prefix}post_layernorm", HIDDEN),
    }
    if classes:
        shapes[f"{embeddings}.class_embedding"] = (HIDDEN,)
        shapes |= _affine(f"{prefix}pre_layrnorm", HIDDEN)
    else:
        shapes[f"{embeddings}.patch_embedding.bias"] = (HIDDEN,)
    for index in range(LAYERS):
        layer = f"{prefix}encoder.layers.{index}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _affine(f"{layer}.self_attn.{name}", HIDDEN, HIDDEN)
        shapes |= _affine(f"{layer}.mlp.fc1", INTERMEDIATE, HIDDEN)
        shapes |= _affine(f"{layer}.mlp.fc2", HIDDEN, INTERMEDIATE)
        shapes |= _affine(f"{layer}.layer_norm1", HIDDEN)
        shapes |= _affine(f"{layer}.layer_norm2", HIDDEN)
    return shapes


def intern_weights(
    qk_normalization: bool = True, qkv_bias: bool = False, seed: int = 13
) -> dict[str, np.ndarray]:
    """By InternViT's names, which have no prefix; q, k and v are one layer."""
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (1, 1, HIDDEN),
        "embeddings.position_embedding": (1, PATCHES + 1, HIDDEN),
        "embeddings.patch_embedding.weight": (HIDDEN, 3, PATCH, PATCH),
        "embeddings.patch_embedding.bias": (HIDDEN,),
    }
    for index in range(LAYERS):
        layer = f"encoder.layers.{index}"
        shapes |= _affine(f"{layer}.attn.qkv", 3 * HIDDEN, HIDDEN)
        if not qkv_bias:
            del shapes[f"{layer}.attn.qkv.bias"]
        shapes |= _affine(f"{layer}.attn.proj", HIDDEN, HIDDEN)
        shapes |= _affine(f"{layer}.mlp.fc1", INTERMEDIATE, HIDDEN)
        shapes |= _affine(f"{layer}.mlp.fc2", HIDDEN, INTERMEDIATE)
        norms = ["norm1.weight", "norm2.weight", "ls1", "ls2"]
        if qk_normalization:
            norms += ["attn.q_norm.weight", "attn.k_norm.weight"]
        shapes |= {f"{layer}.{name}": (HIDDEN,) for name in norms}
    return draw(shapes, seed)


def projector_weights(
    channels: int = HIDDEN, hidden: int = LLM_HIDDEN, seed: int = 14
) -> dict[str, np.ndarray]:
    """Of mlp_downsample, by their names in mm_projector/; `channels` of one patch."""
    shapes = _affine("layers.1", 4 * channels) | _affine("layers.2", hidden, 4 * channels)
    return draw(shapes | _affine("layers.4", hidden, hidden), seed)


def llama_weights(seed: int = 15) -> dict[str, np.ndarray]:
    """By their names in llm/."""
    return draw(_llm(biases=False), seed)


def qwen2_weights(seed: int = 16) -> dict[str, np.ndarray]:
    """By their names in llm/: as llama's, with biases on q, k and v."""
    return draw(_llm(biases=True), seed)


def _llm(biases: bool) -> dict[str, tuple[int, ...]]:
    width, inner, half = LLM_HIDDEN, 64, LLM_HIDDEN // 2  # two of four heads hold keys and values
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (64, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (64, width),
    }
    for index in range(2):
        layer = f"model.layers.{index}"
        for name, rows, columns in (
            ("self_attn.q_proj", width, width), ("self_attn.k_proj", half, width),
            ("self_attn.v_proj", half, width), ("self_attn.o_proj", width, width),
            ("mlp.gate_proj", inner, width), ("mlp.up_proj", inner, width),
            ("mlp.down_proj", width, inner),
        ):  # fmt: skip
            shapes[f"{layer}.{name}.weight"] = (rows, columns)
            if biases and name[-6:] in ("q_proj", "k_proj", "v_proj"):
                shapes[f"{layer}.{name}.bias"] = (rows,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}.{name}.weight"] = (width,)
    return shapes


def _affine(name: str, *weight: int) -> dict[str, tuple[int, ...]]:
    """A linear layer (out, in) or a norm (width,), both with a bias."""
    return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}


def draw(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Normal values in the sorted order of the names, scaled by what the name says it is."""
    random = np.random.RandomState(seed)
    drawn = {}
    for name in sorted(shapes):
        values = random.standard_normal(shapes[name])
        if "class_embedding" in name or "position_embedding" in name:
            values *= 0.5
        elif name.endswith(".bias"):
            values *= 0.1
        elif values.ndim == 1:  # norms and layer scales
            values = 1 + 0.1 * values
        else:
            values *= np.prod(values.shape[1:]) ** -0.5
        drawn[name] = values.astype(np.float32)
    return drawn


def sample(array: np.ndarray, count: int = 64) -> dict[str, Any]:
    """What a golden file keeps of an array: `count` values, evenly strided, and three means.

    "values" is flatten()[::step][:count], step odd; "wave" is the mean of the elements times
    cos(0, 1, 2, ...), which changes when elements trade positions. Rounded to 8 digits.
    To compare: sample(actual, len(golden["values"])).
    """
    flat = np.asarray(array).reshape(-1)
    exact = flat.astype(np.float64)
    step = max(1, flat.size // count - 1) | 1
    means = {
        "mean": exact.mean(),
        "abs_mean": np.abs(exact).mean(),
        "wave": (exact * np.cos(np.arange(flat.size, dtype=np.float64))).mean(),
    }
    return {
        "shape": list(np.shape(array)),
        "step": step,
        "values": [digits(value) for value in flat[::step][:count].tolist()],
        **{name: digits(float(value)) for name, value in means.items()},
    }


def digits(value: float) -> float:
    """Rounded to 8 significant digits; whole numbers stay whole."""
    return value if isinstance(value, int) else float(f"{value:.8g}")


def assert_sample(array: np.ndarray, expected: dict[str, Any], tolerance: float = 1e-5) -> None:
    found = sample(array, count=len(expected["values"]))
    assert found["shape"] == expected["shape"]
    np.testing.assert_allclose(found["values"], expected["values"], rtol=0, atol=tolerance)
    for name in ("mean", "abs_mean", "wave"):
        assert abs(found[name] - expected[name]) < tolerance
