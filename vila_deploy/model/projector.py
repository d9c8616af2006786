"""The reference mm_projector: windows of vision features become tokens, an MLP maps them."""

from __future__ import annotations

import math

from torch import Tensor, nn

from vila_deploy.checkpoint.variants import PROJECTOR_NORM_EPSILON, PROJECTOR_TYPES, ProjectorType


class Downsample(nn.Module):
    """Concatenates each window × window block of the feature grid; an odd grid is zero-padded.

    [batch, side², channels] → [batch, ceil(side/window)², channels·window²], with the tokens in
    row-major order, or column by column as VILA1.5 was trained (`order`).
    """

    def __init__(self, window: int, order: str):
        super().__init__()
        self.window, self.order = window, order

    def forward(self, features: Tensor) -> Tensor:
        batch, count, channels = features.shape
        side, window = math.isqrt(count), self.window
        grid = features.view(batch, side, side, channels)
        pad = -side % window
        grid = nn.functional.pad(grid, (0, 0, 0, pad, 0, pad))
        out = (side + pad) // window
        blocks = grid.view(batch, out, window, out, window, channels)
        outer = (1, 3) if self.order == "row" else (3, 1)
        return blocks.permute(0, *outer, 2, 4, 5).flatten(3).flatten(1, 2)


class Projector(nn.Sequential):
    """The layers of a row of PROJECTOR_TYPES, numbered as on disk.

    [batch, patches, vision_hidden_size] → [batch, tokens, hidden_size].

    Args:
        vision_hidden_size: channels of the tower's features.
        hidden_size: channels of the LLM's embeddings.
        kind: which row.
        order: "row" or "column", see Downsample.
    """

    def __init__(
        self,
        vision_hidden_size: int,
        hidden_size: int,
        kind: ProjectorType = PROJECTOR_TYPES["mlp_downsample"],
        order: str = "column",
    ):
        shapes = kind.shapes(vision_hidden_size, hidden_size)
        super().__init__(
            *(_step(step, shapes.get(i), kind.window, order) for i, step in enumerate(kind.steps))
        )


def _step(step: str, shape: tuple[int, ...] | None, window: int, order: str) -> nn.Module:
    if step == "downsample":
        return Downsample(window, order)
    if step == "gelu":
        return nn.GELU()
    assert shape is not None
    if step == "norm":
        return nn.LayerNorm(shape[0], eps=PROJECTOR_NORM_EPSILON)
    return nn.Linear(shape[1], shape[0])
