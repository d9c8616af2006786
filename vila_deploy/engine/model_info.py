"""Facts about a model that a conversation needs, whichever backend runs it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.variants import GENERATIONS, Generation
from vila_deploy.checkpoint.video_config import VideoConfig
from vila_deploy.checkpoint.vision_config import ImageConfig, TilingConfig
from vila_deploy.processing.chat_template import PROMPT_TEMPLATES, choose_template, stop_token_ids
from vila_deploy.processing.images import Pixels
from vila_deploy.processing.tokenizer import Tokenizer
from vila_deploy.utils.fields import Fields


@dataclass(frozen=True)
class ModelInfo:
    """Sizes, image processing, prompt template (a key of PROMPT_TEMPLATES) and stop tokens.

    `tokens_per_block` embeddings come from each map or block of features that the projector takes;
    `generation` is a key of GENERATIONS.
    """

    hidden_size: int
    vocab_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    tokens_per_block: int
    model_max_length: int
    image: ImageConfig
    tiling: TilingConfig
    generation: str
    prompt: str
    stop_token_ids: tuple[int, ...]
    video: VideoConfig

    @property
    def recipe(self) -> Generation:
        """How images enter the prompt."""
        return GENERATIONS[self.generation]

    @property
    def image_end(self) -> str:
        """Text whose embeddings follow each image in the prompt; empty for none."""
        return self.recipe.image_end

    @property
    def num_video_frames(self) -> int:
        """Frames of a video, unless the user asks for another number."""
        return self.video.num_frames

    @property
    def max_tokens_per_image(self) -> int:
        """The most embeddings that one image takes in the prompt."""
        return self.tokens_per_block * self.tiling.max_blocks_per_image

    def image_tokens(self, pixels: Pixels) -> list[int]:
        """Return how many embeddings stand for each image marker that the pixels fill."""
        if pixels.pool is not None:
            frames, rows, columns = pixels.pool
            return [self.tokens_per_block // (rows * columns)] * (len(pixels.tiles) // frames)
        if pixels.grid is None:
            return [self.tokens_per_block] * len(pixels.tiles)
        if self.tiling.mode == "s2":
            return [self.tokens_per_block]
        rows, columns = self.tiling.blocks(pixels.grid)
        return [rows * columns * self.tokens_per_block]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "video": self.video.to_json()}

    @classmethod
    def from_config(cls, config: VilaConfig, tokenizer: Tokenizer | None) -> ModelInfo:
        """Return the facts about a checkpoint; without a tokenizer for random weights."""
        llm = config.llm
        prompt = choose_template(config, tokenizer)
        stops = set(llm.eos_token_ids)
        if tokenizer is not None:
            # The configs of some releases forget the template's own end marker.
            stops |= stop_token_ids(PROMPT_TEMPLATES[prompt], tokenizer)
        return cls(
            hidden_size=llm.hidden_size,
            vocab_size=llm.vocab_size,
            num_layers=llm.num_layers,
            num_kv_heads=llm.num_kv_heads,
            head_dim=llm.head_dim,
            tokens_per_block=config.tokens_per_block,
            model_max_length=config.model_max_length,
            image=config.image,
            tiling=config.tiling,
            generation=config.generation,
            prompt=prompt,
            stop_token_ids=tuple(sorted(stops)),
            video=config.video,
        )

    @classmethod
    def from_fields(cls, fields: Fields) -> ModelInfo:
        """Return what `to_json` wrote; a wrong type names its key."""
        image, tiling = fields.child("image"), fields.child("tiling")
        return cls(
            hidden_size=fields.integer("hidden_size"),
            vocab_size=fields.integer("vocab_size"),
            num_layers=fields.integer("num_layers"),
            num_kv_heads=fields.integer("num_kv_heads"),
            head_dim=fields.integer("head_dim"),
            tokens_per_block=fields.integer("tokens_per_block"),
            model_max_length=fields.integer("model_max_length"),
            image=ImageConfig(
                mode=image.text("mode"),
                size=image.integer("size"),
                resample=image.integer("resample", low=0),
                rescale=image.number("rescale"),
                mean=image.numbers("mean", count=3),
                std=image.numbers("std", count=3),
            ),
            tiling=TilingConfig(
                mode=tiling.text("mode"),
                tile=tiling.integer("tile"),
                scales=tuple(tiling.integers("scales", low=1)),
                output_scale=tiling.integer("output_scale", low=0),
                min_tiles=tiling.integer("min_tiles"),
                max_tiles=tiling.integer("max_tiles"),
            ),
            generation=_generation(fields),
            prompt=fields.choice("prompt", PROMPT_TEMPLATES, what="prompt template"),
            stop_token_ids=tuple(fields.integers("stop_token_ids")),
            video=_video(fields),
        )


def _generation(fields: Fields) -> str:
    """Engines made before this key tell it by the text that follows each image."""
    if "generation" in fields:
        return fields.choice("generation", GENERATIONS, what="generation")
    end = fields.text("image_end")
    return next(name for name, row in GENERATIONS.items() if row.image_end == end)


def _video(fields: Fields) -> VideoConfig:
    """Engines made before this key have the number of frames only."""
    if "video" in fields:
        return VideoConfig.from_fields(fields.child("video"))
    return VideoConfig(fields.integer("num_video_frames"))
