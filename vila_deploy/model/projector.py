"""mm_projector: neighbouring vision features become one token, then an MLP maps it to the LLM."""

from __future__ import annotations

import math

from torch import Tensor, nn


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
    """`mlp_downsample`: Downsample, LayerNorm, Linear, GELU, Linear; parameters named as on disk.

    Args:
        vision_hidden_size: channels of the tower's features.
        hidden_size: channels of the LLM's embeddings.
        window: side of the block that becomes one token.
        order: "row" or "column", see Downsample.
    """

    def __init__(self, vision_hidden_size: int, hidden_size: int, window: int, order: str):
        width = vision_hidden_size * window**2
        super().__init__(
            Downsample(window, order),
            nn.LayerNorm(width, eps=1e-5),
            nn.Linear(width, hidden_size),
            nn.GELU(),
            nn.Linear(hidden_size, hidden_size),
        )
