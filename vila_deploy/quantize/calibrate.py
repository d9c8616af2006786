"""Embed calibration examples with the real model: the input of the first decoder layer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vila_deploy.checkpoint import Checkpoint
from vila_deploy.data.embed import IMAGE_TOKEN_ID, MultimodalEmbedder, SampleTokenizer
from vila_deploy.data.examples import Example, LazyImage
from vila_deploy.utils.device import CPU
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.limits import MAX_CALIBRATION_SEQUENCES as MAX_SEQUENCES


@dataclass(frozen=True)
class Calibration:
    """The embeddings [tokens, hidden] of each sequence, and counts of what is in them.

    Args:
        is_image: bool [tokens of all sequences], whether an embedding is an image's.
        images_of: the images of each sequence.
    """

    embeds: list[Tensor]
    is_image: Tensor
    text_sequences: int
    image_sequences: int
    images: int
    tokens: int
    image_tokens: int
    sha256: str
    images_of: tuple[tuple[LazyImage, ...], ...] = ()


def calibrate(
    checkpoint: Checkpoint,
    examples: Sequence[Example],
    seed: int,
    device: torch.device = CPU,
) -> Calibration:
    """Return at most 128 embedded sequences, images merged into the text as VILA does.

    Plain texts and conversations are joined and cut into samples of at most 512 tokens, as llm-awq
    does; a conversation about images is a sequence of its own, up to 512 tokens besides its
    images. Images take at most half of the sequences as long as there is text for the others.

    Raises:
        VilaDeployError: an image can't be read, or the tokenizer doesn't belong to the model.
    """
    tokenizer = SampleTokenizer(checkpoint)
    shuffled = list(examples)
    random.Random(seed).shuffle(shuffled)
    texts = tokenizer.text_samples((e for e in shuffled if not e.images), MAX_SEQUENCES)
    conversations = [tokenizer.conversation(e) for e in shuffled if e.images]
    conversations = conversations[: max(MAX_SEQUENCES // 2, MAX_SEQUENCES - len(texts))]
    sequences = conversations + texts[: MAX_SEQUENCES - len(conversations)]
    if not sequences:
        raise VilaDeployError("calibration data gives no tokens", fix="give longer texts")
    embedder = MultimodalEmbedder(checkpoint, sequences, device)
    is_image = torch.cat([embedder.ids(sequence) == IMAGE_TOKEN_ID for sequence in sequences])
    return Calibration(
        embeds=[embedder.embeds(sequence, checkpoint) for sequence in sequences],
        is_image=is_image,
        text_sequences=len(sequences) - len(conversations),
        image_sequences=len(conversations),
        images=embedder.num_images,
        tokens=len(is_image),
        image_tokens=int(is_image.sum()),
        sha256=embedder.sha256,
        images_of=tuple(sequence.images for sequence in sequences),
    )
