"""What a conversation needs to know of a model, whichever backend runs it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.fields import Fields
from vila_deploy.checkpoint.vision_config import ImageConfig
from vila_deploy.model.prompts import PROMPT_TEMPLATES, choose_template, stop_token_ids
from vila_deploy.model.tokenizer import Tokenizer


@dataclass(frozen=True)
class ModelDescription:
    """Sizes, image processing, prompt template (a key of PROMPT_TEMPLATES) and stop tokens.

    `image_end` is text whose embeddings follow each picture in the prompt; empty for none.
    """

    hidden_size: int
    vocab_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    tokens_per_image: int
    model_max_length: int
    image: ImageConfig
    image_end: str
    prompt: str
    stop_token_ids: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_fields(cls, fields: Fields) -> ModelDescription:
        """Reads what `to_json` wrote; a wrong type names its key."""
        image = fields.child("image")
        return cls(
            hidden_size=fields.integer("hidden_size"),
            vocab_size=fields.integer("vocab_size"),
            num_layers=fields.integer("num_layers"),
            num_kv_heads=fields.integer("num_kv_heads"),
            head_dim=fields.integer("head_dim"),
            tokens_per_image=fields.integer("tokens_per_image"),
            model_max_length=fields.integer("model_max_length"),
            image=ImageConfig(
                mode=image.text("mode"),
                size=image.integer("size"),
                resample=image.integer("resample", low=0),
                rescale=image.number("rescale"),
                mean=image.numbers("mean", count=3),
                std=image.numbers("std", count=3),
            ),
            image_end=fields.text("image_end"),
            prompt=fields.choice("prompt", PROMPT_TEMPLATES, what="prompt template"),
            stop_token_ids=tuple(fields.integers("stop_token_ids")),
        )


def describe(config: VilaConfig, tokenizer: Tokenizer | None) -> ModelDescription:
    """The description of a checkpoint; `tokenizer` None means random weights without text."""
    llm = config.llm
    prompt = choose_template(config, tokenizer)
    stops = set(llm.eos_token_ids)
    if tokenizer is not None:
        # The configs of some releases forget the template's own end marker.
        stops |= stop_token_ids(PROMPT_TEMPLATES[prompt], tokenizer)
    return ModelDescription(
        hidden_size=llm.hidden_size,
        vocab_size=llm.vocab_size,
        num_layers=llm.num_layers,
        num_kv_heads=llm.num_kv_heads,
        head_dim=llm.head_dim,
        tokens_per_image=config.tokens_per_image,
        model_max_length=config.model_max_length,
        image=config.image,
        image_end=config.image_end,
        prompt=prompt,
        stop_token_ids=tuple(sorted(stops)),
    )
