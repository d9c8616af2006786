"""Prepare held-out data for an evaluation: token sequences, and which tokens are predicted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vila_deploy.checkpoint import Checkpoint
from vila_deploy.data.embed import (
    IMAGE_TOKEN_ID,
    MultimodalEmbedder,
    SampleTokenizer,
    TokenSequence,
)
from vila_deploy.data.examples import Example
from vila_deploy.utils.device import CPU
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.limits import MAX_EVALUATION_SEQUENCES as MAX_SEQUENCES


class EvaluationData:
    """Held-out examples as token sequences; images are encoded by the constructor.

    Plain texts are joined and cut into samples of at most 512 tokens, of which every token but BOS
    is predicted. A conversation is a sequence of its own, of which the answer is predicted; if it
    has none, everything after its images.

    Args:
        own: whether these are the user's examples, not the built-in ones.
        max_sequences: the first so many are taken, at most half of them about images as long as
            there are others.

    Raises:
        VilaDeployError: an image can't be read, or there is nothing to predict.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        examples: Sequence[Example],
        own: bool = False,
        max_sequences: int = MAX_SEQUENCES,
        device: torch.device = CPU,
    ):
        self.own = own
        tokenizer = SampleTokenizer(checkpoint)
        self._bos = tokenizer.tokenizer.bos_ids
        about_images = [tokenizer.conversation(e) for e in examples if e.images]
        others = [tokenizer.conversation(e) for e in examples if not (e.images or e.is_plain)]
        others += tokenizer.text_samples((e for e in examples if e.is_plain), max_sequences)
        half = max(max_sequences // 2, max_sequences - len(others))
        about_images = about_images[:half]
        self.image_sequences = len(about_images)
        self.sequences = about_images + others[: max_sequences - len(about_images)]
        self._device = device
        self._embedder = MultimodalEmbedder(checkpoint, self.sequences, device)
        self.images, self.sha256 = self._embedder.num_images, self._embedder.sha256
        self.ids = [self._embedder.ids(sequence) for sequence in self.sequences]
        if not any(bool(self.predicted(index).any()) for index in range(len(self.ids))):
            raise VilaDeployError(
                "evaluation data gives no tokens to predict", fix="give more text"
            )

    def embeds(self, checkpoint: Checkpoint) -> list[Tensor]:
        """Return float32 [positions, hidden] of each sequence, by this checkpoint's embeddings.

        Images are encoded again where its vision tower is in int8.
        """
        embedder = self._embedder
        if checkpoint.config.vision.int8_linears:
            embedder = MultimodalEmbedder(checkpoint, self.sequences, self._device)
        return [embedder.embeds(sequence, checkpoint) for sequence in self.sequences]

    def predicted(self, index: int) -> Tensor:
        """Return bool [positions] of a sequence: where the next-token distribution is compared."""
        ids, sequence = self.ids[index], self.sequences[index]
        chosen = torch.zeros(len(ids), dtype=torch.bool)
        chosen[:-1] = ids[1:] != IMAGE_TOKEN_ID
        for token in self._bos:
            chosen[:-1] &= ids[1:] != token
        chosen[: self._first_predicted(sequence, len(ids)) - 1] = False
        return chosen

    def _first_predicted(self, sequence: TokenSequence, length: int) -> int:
        total = sum(map(len, sequence.text_chunks)) + self._image_positions(sequence)
        if sequence.answer_tokens:
            return min(total - sequence.answer_tokens, length)
        return min(total - len(sequence.text_chunks[-1]), length) if sequence.images else 1

    def _image_positions(self, sequence: TokenSequence) -> int:
        return sum(self._embedder.image_tokens(image) for image in sequence.images)


def evaluation_data(
    checkpoint: Checkpoint, examples: Sequence[Example], own: bool, device: torch.device
) -> EvaluationData | None:
    """Return the data of `examples`; None if there are none."""
    return EvaluationData(checkpoint, examples, own, device=device) if examples else None
