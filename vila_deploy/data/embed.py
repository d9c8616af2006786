"""Turn examples into token sequences with images between them, and those into embeddings."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vila_deploy.checkpoint import Checkpoint
from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.llm_config import EMBEDDING
from vila_deploy.data.examples import Example, LazyImage
from vila_deploy.model.vision import VisionEncoder
from vila_deploy.processing.chat_template import (
    IMAGE_MARKER,
    PROMPT_TEMPLATES,
    PromptTemplate,
    choose_template,
    render,
    render_answered,
    with_markers,
)
from vila_deploy.processing.images import preprocess
from vila_deploy.processing.multimodal_prompt import merge_embeddings, text_chunks
from vila_deploy.processing.tokenizer import Tokenizer, load_tokenizer
from vila_deploy.processing.vocabulary import check_ids
from vila_deploy.utils.arrays import Floats
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.limits import MAX_TOKENS

MIN_SAMPLE_TOKENS = 16
MAX_TEXT_CHARACTERS = 1 << 20
IMAGE_TOKEN_ID = -1


@dataclass(frozen=True)
class TokenSequence:
    """Token ids, with an image between each two chunks of text.

    Args:
        answer_tokens: how many tokens at the end are the answer's; 0: it has none.
    """

    text_chunks: list[list[int]]
    images: tuple[LazyImage, ...] = ()
    answer_tokens: int = 0


class SampleTokenizer:
    """Tokenizes examples with the conversation template of the checkpoint."""

    def __init__(self, checkpoint: Checkpoint):
        self.config = checkpoint.config
        self.tokenizer: Tokenizer = load_tokenizer(checkpoint.layout.folder("llm"))
        template = choose_template(self.config, self.tokenizer)
        self._template: PromptTemplate = PROMPT_TEMPLATES[template]

    def text_samples(self, examples: Iterable[Example], max_samples: int) -> list[TokenSequence]:
        """Return samples of at most 512 tokens, cut out of all texts joined, a BOS before each.

        Args:
            examples: without images.
        """
        limit = length_limit(self.config, 0)
        tokens: list[int] = []
        for example in examples:
            text = example.text if example.is_plain else self._rendered(example)
            ids = self.tokenizer.encode(text[:MAX_TEXT_CHARACTERS])
            check_ids(self.tokenizer, [ids], self.config.llm.vocab_size)
            tokens += self.tokenizer.bos_ids + ids
            if len(tokens) >= max_samples * limit:
                break
        starts = range(0, len(tokens), limit)
        samples = [tokens[start : start + limit] for start in starts]
        long_enough = [sample for sample in samples if len(sample) >= MIN_SAMPLE_TOKENS]
        return [TokenSequence([sample]) for sample in long_enough or samples[:1]]

    def conversation(self, example: Example) -> TokenSequence:
        """Return a question, about images or not, with its answer if it has one."""
        chunks = self._chunks(self._rendered(example))
        if example.answer is None:
            return TokenSequence(chunks, example.images)
        prompt = render(self._template, *self._marked(example))
        last_chunk, prompt_chunk = chunks[-1], self._chunks(prompt)[-1]
        # The last token of the prompt and the first of the answer may have become one.
        prompt_tokens = _common_prefix_length(last_chunk, prompt_chunk)
        return TokenSequence(chunks, example.images, len(last_chunk) - prompt_tokens)

    def _chunks(self, text: str) -> list[list[int]]:
        chunks = text_chunks(self.tokenizer, text, self.config.recipe)
        check_ids(self.tokenizer, chunks, self.config.llm.vocab_size)
        return chunks

    def _marked(self, example: Example) -> tuple[list[tuple[str, str]], str]:
        """Return earlier turns and question, with a marker for each image."""
        turns, question, images = list(example.turns), example.text, len(example.images)
        if not turns:
            return [], with_markers(question, images, self.config.image_end)
        if not any(IMAGE_MARKER in text for text in (question, *(asked for asked, _ in turns))):
            first, answer = turns[0]
            turns[0] = with_markers(first, images, self.config.image_end), answer
        return turns, question

    def _rendered(self, example: Example) -> str:
        """Return the example in the model's own conversation template."""
        turns, question = self._marked(example)
        if example.answer is None:
            return render(self._template, turns, question)
        return render_answered(self._template, question, example.answer, turns)


def _common_prefix_length(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def length_limit(config: VilaConfig, num_images: int) -> int:
    """Return the most positions that a sequence with so many images is given."""
    longest = MAX_TOKENS + num_images * config.tokens_per_block
    return min(longest, config.model_max_length, config.llm.max_position_embeddings)


class MultimodalEmbedder:
    """Embeds token sequences as the model does; holds the features of their images.

    `sha256` is of the token ids and pixels of all of them. The vision tower is in memory only
    during construction.

    Raises:
        VilaDeployError: an image can't be read.
    """

    def __init__(
        self, checkpoint: Checkpoint, sequences: Sequence[TokenSequence], device: torch.device
    ):
        self._config = checkpoint.config
        digest = hashlib.sha256()
        images = {p.name: p for sequence in sequences for p in sequence.images}
        self._features = _encode(checkpoint, images, digest, device)
        # Images by number: names are paths, and the same images may be in another folder tomorrow.
        numbers = {name: number for number, name in enumerate(images)}
        for sequence in sequences:
            image_numbers = [numbers[image.name] for image in sequence.images]
            digest.update(repr((sequence.text_chunks, image_numbers)).encode())
        self.sha256 = digest.hexdigest()
        self.num_images = len(images)

    def ids(self, sequence: TokenSequence) -> Tensor:
        """Return int64 [positions]; IMAGE_TOKEN_ID where an image's embeddings are."""
        ids = list(sequence.text_chunks[0])
        for image, chunk in zip(sequence.images, sequence.text_chunks[1:], strict=True):
            ids += [IMAGE_TOKEN_ID] * self.image_tokens(image) + chunk
        return torch.tensor(ids[: self._limit(sequence)], dtype=torch.int64)

    def image_tokens(self, image: LazyImage) -> int:
        """Return how many positions an image takes."""
        return len(self._features[image.name])

    def embeds(self, sequence: TokenSequence, checkpoint: Checkpoint) -> Tensor:
        """Return float32 [positions, hidden], with the token embeddings of `checkpoint`.

        Raises:
            VilaDeployError: the tokenizer doesn't belong to the model.
        """
        table = checkpoint.llm.tensor(EMBEDDING)

        def embed_tokens(ids: Sequence[int]) -> Floats:
            if ids and max(ids) >= len(table):
                raise VilaDeployError(
                    f"its token {max(ids)} is outside the embedding of {len(table)} rows",
                    where=checkpoint.layout.folder("llm"),
                    fix="use the tokenizer files that belong to this checkpoint",
                )
            return table[torch.tensor(list(ids), dtype=torch.int64)].float().numpy()

        features = [self._features[image.name] for image in sequence.images]
        embeds = merge_embeddings(sequence.text_chunks, features, embed_tokens)
        return torch.from_numpy(embeds[: self._limit(sequence)])

    def _limit(self, sequence: TokenSequence) -> int:
        return length_limit(self._config, len(sequence.images))


def _encode(
    checkpoint: Checkpoint,
    images: dict[str, LazyImage],
    digest: hashlib._Hash,
    device: torch.device,
) -> dict[str, Floats]:
    """Return the features [tokens, hidden] of each image."""
    if not images:
        return {}
    config = checkpoint.config
    encoder = VisionEncoder(config, checkpoint.vision, checkpoint.projector).to(device)
    features: dict[str, NDArray[np.float32]] = {}
    for name, image in images.items():
        # As if it were one of several: cut into dynamic tiles, images would drown the text.
        (pixels,) = preprocess([image.load()], config.image, config.tiling, alone=False)
        digest.update(pixels.tiles.tobytes())
        tiles = torch.from_numpy(pixels.tiles).to(device)
        features[name] = encoder(tiles, pixels.grid)[0].cpu().numpy()
    return features
