"""From image to logits against numbers of the original code; each golden file has its recipe."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support import vision_cases as cases
from tests.support.original_checkpoint import session_of, write_checkpoint
from tests.support.paths import GOLDEN
from tests.support.vision_cases import assert_sample
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.checkpoint.variants import TOWER_FAMILIES
from vila_deploy.checkpoint.vision_config import ImageConfig, TilingConfig
from vila_deploy.processing.images import closest_grid, preprocess
from vila_deploy.processing.multimodal_prompt import merge_embeddings
from vila_deploy.processing.s2 import merge_s2_blocks, s2_features

S2, PREPROCESS, MERGED = (
    json.loads((GOLDEN / f"{name}.json").read_text())
    for name in ("s2", "preprocess", "merged_prompts")
)
SIGLIP = ImageConfig("resize", 30, 3, 1 / 255, (0.5,) * 3, (0.5,) * 3)
ONE_TILE = TilingConfig("single", 30, (30,))
DYNAMIC_S2: dict[str, Any] = {
    "image_aspect_ratio": "dynamic_s2", "dynamic_s2": True, "s2_scales": "30,60,90",
    "s2_max_split_size": 30, "s2_resize_output_to_scale_idx": -1,
}  # fmt: skip


@pytest.mark.parametrize("name", PREPROCESS["siglip"]["resize"])
@pytest.mark.parametrize(
    ("tower", "key", "mode"),
    [
        ("siglip_vision_model", "resize", "resize"),
        ("siglip_vision_model", "pad", "pad"),
        ("siglip_vision_model", "default", "resize"),
        ("clip_vision_model", "resize", "resize"),
        ("clip_vision_model", "pad", "pad"),
        ("clip_vision_model", "default", "crop"),
        ("intern_vit_6b", "any", "resize"),
    ],
)
def test_pixels(tower: str, key: str, mode: str, name: str) -> None:
    family = TOWER_FAMILIES[tower]
    expected = PREPROCESS[{"internvit": "intern"}.get(family.name, family.name)][key][name]
    config = ImageConfig(mode, 30, 3, 1 / 255, family.mean, family.std)
    image = cases.upright(cases.images()[name])
    (pixels,) = preprocess([image], config, ONE_TILE)
    assert_sample(pixels.tiles[0], expected)


@pytest.mark.parametrize("row", S2["grids"])
def test_grid_of_tiles(row: list[int]) -> None:
    width, height, *expected = row
    dynamic = closest_grid((width, height), 1, 12, 448)
    largest_scale = closest_grid((width, height), 9, 12, 448)
    assert [*dynamic[::-1], *largest_scale[::-1]] == expected


@pytest.mark.parametrize("size", cases.SIZES, ids=str)
def test_dynamic_tiles(size: tuple[int, int]) -> None:
    expected = S2["dynamic"]["{}x{}".format(*size)]
    tiling = TilingConfig("dynamic", 30, (30,), 0, 1, 12)
    (pixels,) = preprocess([cases.sized_image(size)], SIGLIP, tiling)
    assert pixels.grid is None
    assert len(pixels.tiles) == expected["tiles"]
    assert_sample(pixels.tiles, expected["pixels"])
    several = preprocess([cases.sized_image(size)] * 2, SIGLIP, tiling)
    assert [len(each.tiles) for each in several] == [1, 1]


@pytest.mark.parametrize("name", S2["static"])
def test_static_scales(name: str, tmp_path: Path) -> None:
    expected = S2["static"][name]
    scales = expected["scales"]
    root = write_checkpoint(
        tmp_path / "c", scales=len(scales), processor_size=scales[-1],
        s2=True, s2_scales=",".join(map(str, scales)), s2_max_split_size=30,
    )  # fmt: skip
    session, config = session_of(root), open_checkpoint(root).config
    shape, seed = expected["pixels"]
    tokens = []
    for pixels in cases.pixels(tuple(shape), seed):
        tiles = static_tiles(pixels, config.tiling)
        tokens.append(session.encode_images(tiles, (config.tiling.side(-1),) * 2)[0])
    assert_sample(np.stack(tokens), expected["tokens_column_major"])
    largest = dataclasses.replace(config.tiling, output_scale=len(scales) - 1)
    merged = []
    for pixels in cases.pixels(tuple(shape), seed):
        with torch.inference_mode():
            tiles = torch.from_numpy(static_tiles(pixels, config.tiling))
            features = session.vision.tower(tiles).numpy()
        merged.append(s2_features(features, largest, (largest.side(-1),) * 2)[0])
    assert_sample(np.stack(merged), expected["features_largest"])


def static_tiles(pixels: np.ndarray, tiling: TilingConfig) -> np.ndarray:
    """As preprocess cuts them, from pixels that are normalized already."""
    from vila_deploy.processing import images

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "normalized", lambda image, config: pixels)
        patch.setattr(images, "square", lambda image, config: image)
        return preprocess([cases.image(4, 4, 0)], SIGLIP, tiling)[0].tiles


@pytest.mark.parametrize("index", [-1, 0])
@pytest.mark.parametrize("size", cases.SIZES, ids=str)
def test_dynamic_scales(size: tuple[int, int], index: int, tmp_path: Path) -> None:
    expected = S2["dynamic_s2"]["{}x{}".format(*size)]
    changes = {**DYNAMIC_S2, "s2_resize_output_to_scale_idx": index}
    root = write_checkpoint(tmp_path / "c", qwen2=True, scales=3, **changes)
    session, config = session_of(root), open_checkpoint(root).config
    (pixels,) = preprocess([cases.sized_image(size)], config.image, config.tiling)
    assert list(pixels.grid or ()) == expected["block_size"]
    assert len(pixels.tiles) == expected["tiles"]
    assert_sample(pixels.tiles, expected["pixels"])
    wanted = expected[f"index {index}"]
    assert list(config.tiling.blocks(pixels.grid)) == wanted["block_size"]
    assert_sample(session.encode_images(pixels.tiles, pixels.grid), wanted["tokens"])
    with torch.inference_mode():
        features = session.vision.tower(torch.from_numpy(pixels.tiles)).numpy()
        merged = s2_features(features, config.tiling, pixels.grid)
        tokens = session.vision.projector(torch.from_numpy(merged)).numpy()
    assert_sample(merge_s2_blocks(tokens, config.tiling, pixels.grid), wanted["tokens"])


def test_several_images_repeat_one_scale(tmp_path: Path) -> None:
    expected = S2["dynamic_s2_without_blocks"]
    root = write_checkpoint(tmp_path / "c", qwen2=True, scales=3, **DYNAMIC_S2)
    shape, seed = expected["pixels"]
    found = session_of(root).encode_images(cases.pixels(tuple(shape), seed))
    assert_sample(found, expected["tokens"])


@pytest.mark.parametrize(
    ("case", "changes", "chunks"),
    [
        ("vila15", {}, [[1, 5, 9], [7, 8], [11, 3]]),
        ("nvila", {"qwen2": True}, [[5, 9], [7, 7, 8], [7, 11, 3]]),
        (
            "nvila_dynamic_s2_two_images",
            {"qwen2": True, "scales": 3, **DYNAMIC_S2},
            [[5, 9], [7, 7, 8], [7, 11, 3]],
        ),
        (
            "nvila_dynamic_s2_one_image",
            {"qwen2": True, "scales": 3, **DYNAMIC_S2},
            [[5, 9], [7, 8, 11, 3]],
        ),
    ],
)
def test_logits_of_a_merged_prompt(
    case: str, changes: dict[str, Any], chunks: list[list[int]], tmp_path: Path
) -> None:
    """Images in the text, NVILA's newline after each, and all logits of the prompt."""
    expected = MERGED[case]
    session = session_of(write_checkpoint(tmp_path / "c", **changes))
    shape, seed = expected["pixels"]
    grid = tuple(expected["block_sizes"][0]) if "block_sizes" in expected else None
    features = session.encode_images(cases.pixels(tuple(shape), seed), grid)
    embeds = merge_embeddings(chunks, list(features), session.embed_tokens)
    assert len(embeds) == expected["length"]
    assert_sample(embeds, expected["embeds"])
    logits = session.llm(torch.from_numpy(embeds)).numpy()
    if isinstance(expected["logits"], dict):
        assert_sample(logits, expected["logits"])
    else:
        np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-5)


def test_truncated_prompt(tmp_path: Path) -> None:
    """The original cuts what is too long at its end; calibration does so, a question is refused."""
    expected = MERGED["vila15_truncated"]
    session = session_of(write_checkpoint(tmp_path / "c"))
    shape, seed = expected["pixels"]
    features = session.encode_images(cases.pixels(tuple(shape), seed))
    embeds = merge_embeddings([[1, 5, 9], [7, 8], [11, 3]], list(features), session.embed_tokens)
    cut = embeds[: expected["max_length"]]
    assert_sample(cut, expected["embeds"])
    assert_sample(session.llm(torch.from_numpy(cut)).numpy(), expected["logits"])
