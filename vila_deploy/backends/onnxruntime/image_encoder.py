"""Encode images with the ONNX graphs of a vision tower and projector."""

from __future__ import annotations

from pathlib import Path

from vila_deploy.backends.onnxruntime import files
from vila_deploy.backends.onnxruntime.inference import load_graph, run_each, vision_options
from vila_deploy.checkpoint.vision_config import TilingConfig
from vila_deploy.processing.s2 import merge_s2_blocks, s2_features
from vila_deploy.utils.arrays import Floats


class ImageEncoder:
    """Run vision/ of an engine folder; the image part of a Session.

    Args:
        folder: of the engine.
        threads: threads of one operator; 0 leaves the choice to onnxruntime.
    """

    def __init__(self, folder: Path, tiling: TilingConfig, threads: int = 0):
        self._tiling = tiling
        graph = folder / files.VISION / files.GRAPH
        self._vision = load_graph(graph, threads=threads, options=vision_options())
        if tiling.uses_s2:
            projector = folder / files.VISION / files.PROJECTOR_GRAPH
            self._projector = load_graph(projector, threads=threads)

    def encode_images(self, pixels: Floats, grid: tuple[int, int] | None = None) -> Floats:
        """Return features [images, tokens, hidden] of tiles [tiles, 3, size, size], one by one."""
        return self.merge_tiles(self.encode_tiles(pixels), grid)

    def encode_tiles(self, pixels: Floats) -> Floats:
        """Return what the graph of the tower makes of tiles, each by itself."""
        return run_each(self._vision, pixels)

    def merge_tiles(self, features: Floats, grid: tuple[int, int] | None) -> Floats:
        """Return the projected features [images, tokens, hidden] of all tiles of an image."""
        if not self._tiling.uses_s2:
            return features
        blocks = s2_features(features, self._tiling, grid)
        return merge_s2_blocks(run_each(self._projector, blocks), self._tiling, grid)
