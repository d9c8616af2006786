"""The reference vision encoder: tower, S2 (Scaling-on-Scales) features, projector."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.weight_source import WeightSource
from vila_deploy.model.projector import Projector
from vila_deploy.model.towers import VisionTower

Grid = tuple[int, int]


class VisionEncoder(nn.Module):
    """Pixels of tiles [tiles, 3, size, size] → LLM embeddings."""

    def __init__(
        self,
        config: VilaConfig,
        tower: WeightSource,
        projector: WeightSource,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.tiling = config.tiling
        self.tower = VisionTower(config.vision, config.vision_layers_used, tower, dtype)
        with torch.device("meta"):
            self.projector = Projector(
                config.feature_channels,
                config.llm.hidden_size,
                config.projector,
                config.token_order,
            )
        for index in config.projector.shapes(1, 1):
            prefix, layer = config.projector.prefix(index), self.projector.get_submodule(str(index))
            names = layer.state_dict()
            state = {name: projector.tensor(f"{prefix}.{name}").to(dtype) for name in names}
            layer.load_state_dict(state, strict=True, assign=True)
        self.eval().requires_grad_(False)

    @torch.inference_mode()
    def forward(self, pixels: Tensor, grid: Grid | None = None) -> Tensor:
        """Return embeddings [images, tokens, hidden].

        Args:
            grid: None: every tile is an image of its own. (rows, columns): the tiles are one image
                at all its scales, and this is how those of the largest lie.
        """
        return self.encode(pixels, grid)

    def encode(self, pixels: Tensor, grid: Grid | None = None) -> Tensor:
        """Return what `forward` does, with a gradient for parameters that ask for it."""
        features = self.tower(pixels)
        if not self.tiling.uses_s2:
            return self.projector(features)
        if grid is None:
            return self.projector(features.repeat(1, 1, len(self.tiling.scales)))
        joined = self._s2_features(features, grid)
        if self.tiling.mode == "s2":
            return self.projector(joined.flatten(2).transpose(1, 2))
        rows, columns = self.tiling.blocks(grid)
        tokens = self.projector(_split(joined, rows, columns).flatten(2).transpose(1, 2))
        return _merge(tokens, rows, columns).flatten(2).transpose(1, 2)

    def _s2_features(self, features: Tensor, grid: Grid) -> Tensor:
        """Return S2 features [1, scales · channels, height, width] of [tiles, patches, …]."""
        maps, start = [], 0
        for index in range(len(self.tiling.scales)):
            side = self.tiling.side(index)
            last = index == len(self.tiling.scales) - 1
            rows, columns = grid if last else (side, side)
            maps.append(_merge(features[start : start + rows * columns], rows, columns))
            start += rows * columns
        assert start == len(features)
        size = maps[self.tiling.output_scale].shape[-2:]
        return torch.cat([interpolate(m.float(), size, mode="area").to(m.dtype) for m in maps], 1)


def _merge(tiles: Tensor, rows: int, columns: int) -> Tensor:
    """Return one map [1, channels, height, width] of tiles [rows · columns, side², channels]."""
    side = round(tiles.shape[1] ** 0.5)
    grid = tiles.unflatten(0, (rows, columns)).unflatten(2, (side, side))
    return grid.permute(4, 0, 2, 1, 3).flatten(3).flatten(1, 2)[None]


def _split(feature_map: Tensor, rows: int, columns: int) -> Tensor:
    """Return blocks [rows · columns, channels, height/rows, …] of a map [1, channels, …]."""
    blocks = feature_map[0].unflatten(1, (rows, -1)).unflatten(3, (columns, -1))
    return blocks.permute(1, 3, 0, 2, 4).flatten(0, 1)
