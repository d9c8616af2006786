"""Calibration through the real model: examples become what enters the first decoder layer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vila_deploy.checkpoint import Checkpoint
from vila_deploy.data.embed import PICTURE_ID, MultimodalEmbedder, SampleTokenizer
from vila_deploy.data.examples import Example
from vila_deploy.utils.device import CPU
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.limits import MAX_CALIBRATION_SEQUENCES as MAX_SEQUENCES


@dataclass(frozen=True)
class Calibration:
    """The embeddings [tokens, hidden] of each sequence, and what they are made of.

    Args:
        is_image: bool [tokens of all sequences], which embeddings come from pictures.
    """

    embeds: list[Tensor]
    is_image: Tensor
    text_sequences: int
    image_sequences: int
    images: int
    tokens: int
    image_tokens: int
    sha256: str


def calibrate(
    checkpoint: Checkpoint,
    examples: Sequence[Example],
    seed: int,
    device: torch.device = CPU,
) -> Calibration:
    """At most 128 sequences, pictures spliced into the text the way VILA does it.

    Plain texts and conversations are joined and cut into blocks of at most 512 tokens, as llm-awq
    does; a conversation about pictures is a sequence of its own, up to 512 tokens besides its
    pictures. Pictures take at most half of the sequences as long as there is text for the others.

    Raises:
        VilaDeployError: a picture can't be read, or the tokenizer doesn't belong to the model.
    """
    made = SampleTokenizer(checkpoint)
    shuffled = list(examples)
    random.Random(seed).shuffle(shuffled)
    blocks = made.blocks((e for e in shuffled if not e.pictures), MAX_SEQUENCES)
    conversations = [made.conversation(e) for e in shuffled if e.pictures]
    conversations = conversations[: max(MAX_SEQUENCES // 2, MAX_SEQUENCES - len(blocks))]
    sequences = conversations + blocks[: MAX_SEQUENCES - len(conversations)]
    if not sequences:
        raise VilaDeployError("calibration data gives no tokens", fix="give longer texts")
    splicer = MultimodalEmbedder(checkpoint, sequences, device)
    is_image = torch.cat([splicer.ids(sequence) == PICTURE_ID for sequence in sequences])
    return Calibration(
        embeds=[splicer.embeds(sequence, checkpoint) for sequence in sequences],
        is_image=is_image,
        text_sequences=len(sequences) - len(conversations),
        image_sequences=len(conversations),
        images=splicer.num_pictures,
        tokens=len(is_image),
        image_tokens=int(is_image.sum()),
        sha256=splicer.sha256,
    )
