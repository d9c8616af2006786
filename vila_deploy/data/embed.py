"""Examples as token ids with pictures between them, and those as the model's input embeddings."""

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
from vila_deploy.data.examples import Example, Picture
from vila_deploy.model.vision import VisionEncoder
from vila_deploy.processing.chat_template import (
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
from vila_deploy.utils.arrays import Floats
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.limits import MAX_TOKENS

MIN_BLOCK_TOKENS = 16
MAX_TEXT_CHARACTERS = 1 << 20
PICTURE_ID = -1


@dataclass(frozen=True)
class TokenSequence:
    """Token ids, with a picture between each two pieces.

    Args:
        answer_tokens: how many tokens at the end are the answer's; 0: it has none.
    """

    pieces: list[list[int]]
    pictures: tuple[Picture, ...] = ()
    answer_tokens: int = 0


class SampleTokenizer:
    """Makes token sequences of examples, in the conversation template of the checkpoint."""

    def __init__(self, checkpoint: Checkpoint):
        self.config = checkpoint.config
        self.tokenizer: Tokenizer = load_tokenizer(checkpoint.layout.folder("llm"))
        template = choose_template(self.config, self.tokenizer)
        self._template: PromptTemplate = PROMPT_TEMPLATES[template]

    def blocks(self, examples: Iterable[Example], most: int) -> list[TokenSequence]:
        """Texts without pictures as one stream of tokens, each after a BOS, cut into blocks."""
        limit = length_limit(self.config, 0)
        stream: list[int] = []
        for example in examples:
            text = example.text if example.is_plain else self._rendered(example)
            stream += self.tokenizer.bos_ids + self.tokenizer.encode(text[:MAX_TEXT_CHARACTERS])
            if len(stream) >= most * limit:
                break
        starts = range(0, len(stream), limit)
        blocks = [stream[start : start + limit] for start in starts]
        kept = [block for block in blocks if len(block) >= MIN_BLOCK_TOKENS] or blocks[:1]
        return [TokenSequence([block]) for block in kept]

    def conversation(self, example: Example) -> TokenSequence:
        """A question about pictures or not, with its answer if it has one."""
        pieces = self._pieces(self._rendered(example))
        if example.answer is None:
            return TokenSequence(pieces, example.pictures)
        asked = render(self._template, [], self._question(example))
        last, prompt = pieces[-1], self._pieces(asked)[-1]
        # The last token of the prompt and the first of the answer may have become one.
        asked_tokens = _same_at_the_start(last, prompt)
        return TokenSequence(pieces, example.pictures, len(last) - asked_tokens)

    def _pieces(self, text: str) -> list[list[int]]:
        return text_chunks(self.tokenizer, text, self.config.image_end)

    def _question(self, example: Example) -> str:
        return with_markers(example.text, len(example.pictures), self.config.image_end)

    def _rendered(self, example: Example) -> str:
        """The example as a turn of the model's own conversation template."""
        question = self._question(example)
        if example.answer is None:
            return render(self._template, [], question)
        return render_answered(self._template, question, example.answer)


def _same_at_the_start(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def length_limit(config: VilaConfig, num_images: int) -> int:
    """The most positions that a sequence with so many pictures is given."""
    longest = MAX_TOKENS + num_images * config.tokens_per_block
    return min(longest, config.model_max_length, config.llm.max_position_embeddings)


class MultimodalEmbedder:
    """Embeds token sequences as the model does; holds the features of their pictures.

    `sha256` is of the token ids and pixels of all of them. The tower is in memory only while this
    is made.

    Raises:
        VilaDeployError: a picture can't be read.
    """

    def __init__(
        self, checkpoint: Checkpoint, sequences: Sequence[TokenSequence], device: torch.device
    ):
        self._config = checkpoint.config
        digest = hashlib.sha256()
        pictures = {p.name: p for sequence in sequences for p in sequence.pictures}
        self._features = _encode(checkpoint, pictures, digest, device)
        # By number: the same pictures may lie in another folder tomorrow.
        numbers = {name: number for number, name in enumerate(pictures)}
        for sequence in sequences:
            shown = [numbers[picture.name] for picture in sequence.pictures]
            digest.update(repr((sequence.pieces, shown)).encode())
        self.sha256 = digest.hexdigest()
        self.num_pictures = len(pictures)

    def ids(self, sequence: TokenSequence) -> Tensor:
        """int64 [positions]; PICTURE_ID where a picture's embedding stands."""
        ids = list(sequence.pieces[0])
        for picture, piece in zip(sequence.pictures, sequence.pieces[1:], strict=True):
            ids += [PICTURE_ID] * self.picture_tokens(picture) + piece
        return torch.tensor(ids[: self._limit(sequence)], dtype=torch.int64)

    def picture_tokens(self, picture: Picture) -> int:
        """How many positions it takes."""
        return len(self._features[picture.name])

    def embeds(self, sequence: TokenSequence, checkpoint: Checkpoint) -> Tensor:
        """float32 [positions, hidden], with the token embeddings of `checkpoint`.

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

        own = [self._features[picture.name] for picture in sequence.pictures]
        return torch.from_numpy(
            merge_embeddings(sequence.pieces, own, embed_tokens)[: self._limit(sequence)]
        )

    def _limit(self, sequence: TokenSequence) -> int:
        return length_limit(self._config, len(sequence.pictures))


def _encode(
    checkpoint: Checkpoint,
    pictures: dict[str, Picture],
    digest: hashlib._Hash,
    device: torch.device,
) -> dict[str, Floats]:
    """Features [tokens, hidden] of each picture."""
    if not pictures:
        return {}
    config = checkpoint.config
    encoder = VisionEncoder(config, checkpoint.vision, checkpoint.projector).to(device)
    features: dict[str, NDArray[np.float32]] = {}
    for name, picture in pictures.items():
        # As if it were one of several: cut into dynamic tiles, pictures would drown the text.
        (pixels,) = preprocess([picture.load()], config.image, config.tiling, alone=False)
        digest.update(pixels.tiles.tobytes())
        tiles = torch.from_numpy(pixels.tiles).to(device)
        features[name] = encoder(tiles, pixels.grid)[0].cpu().numpy()
    return features
