"""Compute S2 features (Scaling on Scales): a tower's features at several image scales.

https://arxiv.org/abs/2403.13043; in numpy, for engines, with resizing as products of matrices.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from vila_deploy.checkpoint.vision_config import TilingConfig
from vila_deploy.utils.arrays import Floats

Grid = tuple[int, int]
CUBIC = -0.75  # torch's bicubic coefficient


def s2_features(features: Floats, tiling: TilingConfig, grid: Grid | None) -> Floats:
    """Return the S2 features of one image's tiles as the projector takes them.

    Args:
        features: [tiles, patches, channels], scale by scale, the tiles of each row by row.
        grid: rows and columns of tiles at the largest scale; None: one tile is used at all scales.

    Returns:
        [blocks, patches of a block, scales · channels].
    """
    if grid is None:
        return np.concatenate([features] * len(tiling.scales), axis=-1)
    maps, start = [], 0
    for index in range(len(tiling.scales)):
        side = tiling.side(index)
        rows, columns = grid if index == len(tiling.scales) - 1 else (side, side)
        maps.append(_merge_tiles(features[start : start + rows * columns], rows, columns))
        start += rows * columns
    height, width, _ = maps[tiling.output_scale].shape
    merged = np.concatenate([resize_area(m, height, width) for m in maps], axis=-1)
    if tiling.mode == "s2":
        return merged.reshape(1, height * width, -1)
    rows, columns = tiling.blocks(grid)
    blocks = merged.reshape(rows, height // rows, columns, width // columns, -1)
    return blocks.transpose(0, 2, 1, 3, 4).reshape(
        rows * columns, (height // rows) * (width // columns), -1
    )


def merge_s2_blocks(tokens: Floats, tiling: TilingConfig, grid: Grid | None) -> Floats:
    """Merge the projector's [blocks, tokens, hidden] to one image [1, blocks · tokens, hidden]."""
    if grid is None or tiling.mode == "s2":
        return tokens
    return _merge_tiles(tokens, *tiling.blocks(grid)).reshape(1, -1, tokens.shape[-1])


def _merge_tiles(tiles: Floats, rows: int, columns: int) -> Floats:
    """Merge square tiles [rows · columns, side², channels] to a map [height, width, channels]."""
    count, patches, channels = tiles.shape
    side = round(patches**0.5)
    assert count == rows * columns
    grid = tiles.reshape(rows, columns, side, side, channels).transpose(0, 2, 1, 3, 4)
    return grid.reshape(rows * side, columns * side, channels)


def resize_area(feature_map: Floats, height: int, width: int) -> Floats:
    """Resize [h, w, channels] to [height, width, channels], as torch's interpolate(mode="area")."""
    old_height, old_width, _ = feature_map.shape
    if (old_height, old_width) == (height, width):
        return feature_map
    return _resize(feature_map, area_matrix(old_height, height), area_matrix(old_width, width))


def resize_bicubic(pixels: Floats, size: int) -> Floats:
    """Resize [channels, side, side] to `size`, as torch's interpolate(mode="bicubic")."""
    if pixels.shape[-1] == size:
        return pixels
    matrix = bicubic_matrix(pixels.shape[-1], size)
    return (matrix @ pixels @ matrix.T).astype(np.float32)


def _resize(feature_map: Floats, rows: Floats, columns: Floats) -> Floats:
    tall = np.tensordot(rows, feature_map, axes=1)
    return np.tensordot(columns, tall, axes=(1, 1)).transpose(1, 0, 2)


@cache
def area_matrix(old: int, new: int) -> Floats:
    """Return [new, old]: each output is the mean of the inputs that it overlaps."""
    matrix = np.zeros((new, old), np.float32)
    for index in range(new):
        start, end = index * old // new, -(-(index + 1) * old // new)
        matrix[index, start:end] = 1 / (end - start)
    return matrix


@cache
def bicubic_matrix(old: int, new: int) -> Floats:
    """Return [new, old]: four neighbours of an output's centre, edges repeated, not antialiased."""
    matrix = np.zeros((new, old))
    for index in range(new):
        centre = (index + 0.5) * old / new - 0.5
        left = int(np.floor(centre))
        for source in range(left - 1, left + 3):
            matrix[index, min(max(source, 0), old - 1)] += _cubic(abs(centre - source))
    return matrix.astype(np.float32)


def _cubic(distance: float) -> float:
    """Return the value of Keys' cubic convolution kernel with coefficient CUBIC."""
    a = CUBIC
    if distance <= 1:
        return ((a + 2) * distance - (a + 3)) * distance**2 + 1
    return a * (((distance - 5) * distance + 8) * distance - 4)
