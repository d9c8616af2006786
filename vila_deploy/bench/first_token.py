"""Time to first token of a question about one image, split into its parts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from PIL import Image

from vila_deploy.processing.chat_template import PROMPT_TEMPLATES, render
from vila_deploy.processing.images import Pixels, preprocess
from vila_deploy.processing.multimodal_prompt import merge_embeddings, prompt_length, text_chunks
from vila_deploy.runtime.conversation import encode_images
from vila_deploy.runtime.open_engine import OpenedEngine
from vila_deploy.runtime.prompt import place_images
from vila_deploy.utils.arrays import Floats
from vila_deploy.utils.errors import VilaDeployError

QUESTION = "Describe the picture."  # as in all recorded results
# A model with random weights has no tokenizer: the text before and behind the image as token ids.
UNTOKENIZED_CHUNKS = ([1] * 40, [1] * 20)
REPEAT_UNTIL_S, MAX_REPEATS = 3.0, 5
Result = TypeVar("Result")


@dataclass(frozen=True)
class FirstToken:
    """Medians in milliseconds of `preprocess`, `vision`, `prefill` and their sum, `total`.

    `last_embed` [1, hidden] is the prompt's last token, `logits` [vocab] what follows it.
    """

    medians_ms: dict[str, float]
    runs: int
    last_embed: Floats
    logits: Floats


def noise_image() -> Image.Image:
    """Return a landscape image of 640 × 480 random pixels."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8))


def prompt_tokens(engine: OpenedEngine, image: Image.Image) -> int:
    """Return how many tokens the question about `image` takes."""
    chunks, pixels = _prompt(engine, image)
    image_tokens = [count for one in pixels for count in engine.model.image_tokens(one)]
    return prompt_length(chunks, image_tokens)


def check_room(engine: OpenedEngine, image: Image.Image, answer_tokens: int) -> None:
    """Raise VilaDeployError unless the question and an answer of that length fit."""
    needed = prompt_tokens(engine, image) + answer_tokens
    if needed > engine.session.max_seq_len:
        raise VilaDeployError(
            f"the benchmark needs {needed} positions, this engine has {engine.session.max_seq_len}",
            fix=f"build it with --max-seq-len {needed} or more",
        )


def measure_first_token(
    engine: OpenedEngine,
    image: Image.Image,
    until_s: float = REPEAT_UNTIL_S,
    max_runs: int = MAX_REPEATS,
) -> FirstToken:
    """Time the question about `image` at least once, and again until `until_s` or `max_runs`."""
    runs: list[dict[str, float]] = []
    start = time.perf_counter()
    while not runs or (len(runs) < max_runs and time.perf_counter() - start < until_s):
        run, last_embed, logits = _time_parts(engine, image)
        runs.append(run)
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    medians |= {"total": sum(medians.values())}
    return FirstToken(medians, len(runs), last_embed, logits)


def _prompt(engine: OpenedEngine, image: Image.Image) -> tuple[list[list[int]], list[Pixels]]:
    """Return the text chunks of a question about `image`, and its pixels."""
    template, recipe = PROMPT_TEMPLATES[engine.model.prompt], engine.model.recipe
    question, pixels = place_images(QUESTION, [image], engine.model)
    if engine.tokenizer is not None:
        return text_chunks(engine.tokenizer, render(template, [], question), recipe), pixels
    first, last = UNTOKENIZED_CHUNKS
    between: list[list[int]] = [[] for _ in engine.model.image_tokens(pixels[0])[1:]]
    return [list(first), *between, list(last)], pixels


def _time_parts(
    engine: OpenedEngine, image: Image.Image
) -> tuple[dict[str, float], Floats, Floats]:
    """Return milliseconds of preprocessing, vision and prefill; last embedding and logits."""
    session, (chunks, _) = engine.session, _prompt(engine, image)
    session.keep(0, 0)
    preprocess_ms, pixels = _timed_ms(
        lambda: preprocess([image], engine.model.image, engine.model.tiling)
    )
    vision_ms, features = _timed_ms(lambda: encode_images(session, pixels))

    def prefill() -> tuple[Floats, Floats]:
        embeds = merge_embeddings(chunks, features, session.embed_tokens)
        return embeds[-1:], session.prefill(0, embeds)

    prefill_ms, (last_embed, logits) = _timed_ms(prefill)
    parts = {"preprocess": preprocess_ms, "vision": vision_ms, "prefill": prefill_ms}
    return parts, last_embed, logits


def _timed_ms(call: Callable[[], Result]) -> tuple[float, Result]:
    start = time.perf_counter()
    result = call()
    return (time.perf_counter() - start) * 1e3, result
