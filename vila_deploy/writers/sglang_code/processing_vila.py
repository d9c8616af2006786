"""Turn a prompt, images and videos into what SGLang's classes for NVILA take.

SGLang runs this file from the checkpoint's folder, where processor_config.json has the settings.
Source: `mm_utils.py` and `model/llava_arch.py` in llava/ of NVlabs/VILA.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import AutoTokenizer, BatchFeature, ProcessorMixin
from transformers.utils.hub import cached_file

SETTINGS_FILE = "processor_config.json"


class NVILAProcessor(ProcessorMixin):
    """Processor of one prompt; `settings` are the keys of processor_config.json.

    mode: dynamic (each tile is an image of its own) or dynamic_s2 (tiles of several scales).
    tile, min_tiles, max_tiles, scales: how an image that is alone in its prompt is cut.
    rescale, mean, std: value → (value · rescale - mean) / std.
    tokens_per_block: embeddings of a tile, or of a tile of the last scale.
    first_ids, image_end_ids: token ids that begin the prompt and that follow each image.
    """

    attributes = ["tokenizer"]  # noqa: RUF012
    tokenizer_class = "AutoTokenizer"

    def __init__(self, tokenizer: Any = None, settings: dict[str, Any] | None = None, **_: Any):
        self.tokenizer, self.settings = tokenizer, settings or {}
        self.image_token, self.video_token = tokenizer.image_token, tokenizer.video_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        self.chat_template = tokenizer.chat_template

    @classmethod
    def from_pretrained(cls, name: str, **kwargs: Any) -> NVILAProcessor:  # type: ignore[override]
        """Return the processor of the checkpoint `name`, a folder or a repository."""
        revision = {"revision": kwargs["revision"]} if kwargs.get("revision") else {}
        file = cached_file(name, SETTINGS_FILE, **revision)
        settings = json.loads(Path(str(file)).read_text("utf-8"))["settings"]
        # Without this transformers asks whether to run the config's code, beside this file.
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True, **revision)
        return cls(tokenizer, settings)

    def __call__(
        self,
        text: str | Sequence[str],
        images: Sequence[Any] | None = None,
        videos: Sequence[Sequence[Any]] | None = None,
        num_frames: int = 8,
        **_: Any,
    ) -> BatchFeature:
        """Return input_ids [1, tokens], pixels, and the arrangement of tiles of several scales.

        Raises:
            ValueError: markers and images or videos differ in number.
        """
        prompt = text if isinstance(text, str) else text[0]
        shown = [self._rgb(image) for image in images or []]
        frames = [self._frames(video, num_frames) for video in videos or []]
        output: dict[str, Any] = {}
        if len(shown) == 1 and not frames:
            tiles, grid = self._tiles(shown[0])
            counts = [self._tokens(tiles, grid)]
            if grid is not None:
                output["block_sizes"] = [grid]
            else:
                prompt = prompt.replace(self.image_token, f"{self.image_token}\n" * len(tiles))
                counts = counts * len(tiles)
        else:
            tiles = [self._resized(image) for image in shown]
            counts = [self._tokens([tile], None) for tile in tiles]
        if tiles:
            output["pixel_values"] = self._pixels(tiles)
        if frames:
            output["pixel_values_videos"] = self._pixels([f for video in frames for f in video])
        ids = self._input_ids(prompt, counts, [len(video) for video in frames])
        return BatchFeature({"input_ids": torch.tensor([ids]), **output})

    def _input_ids(self, prompt: str, counts: list[int], frames: list[int]) -> list[int]:
        """Return token ids with each marker's place filled.

        Args:
            counts: tokens of each image marker.
            frames: of each video.
        """
        image, video = re.escape(self.image_token), re.escape(self.video_token)
        first, *rest = re.split(f"({image}|{video})", prompt)
        markers, texts = rest[0::2], rest[1::2]
        found = markers.count(self.image_token), markers.count(self.video_token)
        if found != (len(counts), len(frames)):
            raise ValueError(
                f"the prompt has {found[0]} {self.image_token} and {found[1]} {self.video_token} "
                f"for {len(counts)} images and {len(frames)} videos"
            )
        ids = [*self.settings["first_ids"], *self._encode(first)]
        next_count, next_frames = iter(counts), iter(frames)
        end = self.settings["image_end_ids"]
        for marker, following in zip(markers, texts, strict=True):
            if marker == self.image_token:
                ids += [self.image_token_id] * next(next_count) + end
            else:
                frame = [self.video_token_id] * self.settings["tokens_per_block"] + end
                ids += frame * next(next_frames)
            # As it follows a special token, which some tokenizers treat as no beginning.
            ids += self._encode(self.image_token + following)[1:]
        return ids

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _tokens(self, tiles: list[Image.Image], grid: tuple[int, int] | None) -> int:
        rows, columns = grid or (1, 1)
        return rows * columns * int(self.settings["tokens_per_block"])

    def _tiles(self, image: Image.Image) -> tuple[list[Image.Image], tuple[int, int] | None]:
        """Return the tiles of an image that is alone, and their grid at the last scale."""
        settings = self.settings
        rows, columns = self._grid(image.size)
        if settings["mode"] == "dynamic":
            tiles = list(self._cut(image, rows, columns))
            return (tiles, None) if len(tiles) == 1 else ([*tiles, self._resized(image)], None)
        sides = [scale // settings["scales"][0] for scale in settings["scales"][:-1]]
        tiles = [tile for side in sides for tile in self._cut(image, side, side)]
        return [*tiles, *self._cut(image, rows, columns)], (rows, columns)

    def _grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return rows and columns of the grid nearest to the image's shape (width, height).

        Of equally near ones a larger one wins if its area is below twice the image's.
        """
        least, most = self.settings["min_tiles"], self.settings["max_tiles"]
        tile, (width, height) = self.settings["tile"], size
        sides = range(1, most + 1)
        grids = [(c, r) for c in sides for r in sides if least <= c * r <= most]
        best, smallest = (1, 1), float("inf")
        for columns, rows in sorted(grids, key=lambda grid: grid[0] * grid[1]):
            difference = abs(width / height - columns / rows)
            large = width * height > 0.5 * tile * tile * columns * rows
            if difference < smallest or (difference == smallest and large):
                best, smallest = (columns, rows), difference
        return best[1], best[0]

    def _cut(self, image: Image.Image, rows: int, columns: int) -> Iterator[Image.Image]:
        tile = self.settings["tile"]
        stretched = image.resize((columns * tile, rows * tile))
        for y in range(0, rows * tile, tile):
            for x in range(0, columns * tile, tile):
                yield stretched.crop((x, y, x + tile, y + tile))

    def _resized(self, image: Image.Image) -> Image.Image:
        return image.resize((self.settings["tile"], self.settings["tile"]))

    def _frames(self, video: Sequence[Any], count: int) -> list[Image.Image]:
        """Return at most `count` evenly spaced frames, the first and the last among them."""
        chosen = np.linspace(0, len(video) - 1, min(count, len(video))).round().astype(int)
        return [self._resized(self._rgb(video[index])) for index in chosen]

    def _rgb(self, image: Any) -> Image.Image:
        if not isinstance(image, Image.Image):
            image = Image.fromarray(np.asarray(image))
        return ImageOps.exif_transpose(image).convert("RGB")

    def _pixels(self, tiles: list[Image.Image]) -> torch.Tensor:
        """Return normalized pixels [tiles, 3, tile, tile]."""
        rescale, mean, std = (
            np.asarray(self.settings[name], np.float32) for name in ("rescale", "mean", "std")
        )
        values = np.stack([np.asarray(tile, np.float32) for tile in tiles])
        return torch.from_numpy(((values * rescale - mean) / std).transpose(0, 3, 1, 2).copy())
