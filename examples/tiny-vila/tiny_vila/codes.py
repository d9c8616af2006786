"""What the eye should tell the language model: a fixed code for every possible scene.

A code is a sum of word embeddings, one row for each image token: its position, the place that lies
there, and the kind and colour of the shape at that place. Training the tower and projector to give
these codes, and the language model to understand them, are two tasks that run side by side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor

from tiny_vila.model import LLM, TOKENS_PER_IMAGE
from tiny_vila.scenes import COLOURS, KINDS, PLACES, Scene

SIDE = 5
# The image tokens (column by column) in which the centres of the 3 × 3 places lie.
CENTRES = [SIDE * column + row for row in (0, 2, 3) for column in (0, 2, 3)]
STD = 0.5


class Codes:
    """Codes made of `embeddings` [vocabulary, hidden], which are the language model's own."""

    def __init__(self, tokenizer: Tokenizer, embeddings: Tensor):
        def word(text: str) -> Tensor:
            (token,) = tokenizer.encode(f" {text}", add_special_tokens=False).ids
            return embeddings[token]

        generator = torch.Generator().manual_seed(1)
        self.kinds = torch.stack([word(kind) for kind in KINDS])
        self.colours = torch.stack([word(colour) for colour in COLOURS])
        self.empty = torch.randn(TOKENS_PER_IMAGE, LLM["hidden_size"], generator=generator) * STD
        for place, token in zip(PLACES, CENTRES, strict=True):
            self.empty[token] += sum(word(part) for part in place.split())

    def features(self, scenes: Sequence[Scene]) -> Tensor:
        """[scenes, tokens, hidden]."""
        features = self.empty.repeat(len(scenes), 1, 1)
        for row, scene in zip(features, scenes, strict=True):
            for shape in scene.shapes:
                kind, colour = KINDS.index(shape.kind), list(COLOURS).index(shape.colour)
                row[CENTRES[PLACES.index(shape.place)]] += self.kinds[kind] + self.colours[colour]
        return features

    def share_read(self, features: Tensor, scenes: Sequence[Scene]) -> float:
        """Share of places whose nearest code is the right one."""
        nothing = torch.zeros(1, LLM["hidden_size"])
        both = self.kinds[:, None] + self.colours[None]
        table = torch.cat([nothing, both.flatten(0, 1)])
        found = features[:, CENTRES] - self.empty[CENTRES]
        wanted = self.features(scenes)[:, CENTRES] - self.empty[CENTRES]
        nearest = [torch.cdist(x.flatten(0, 1), table).argmin(-1) for x in (found, wanted)]
        return (nearest[0] == nearest[1]).float().mean().item()


def prepare_embeddings(tokenizer: Tokenizer, embeddings: Tensor) -> None:
    """Fills the embedding table: spread evenly, a word's plural beside its singular."""
    embeddings.normal_(std=STD)
    for kind in KINDS:
        (one,) = tokenizer.encode(f" {kind}", add_special_tokens=False).ids
        for text in (f" {kind}s", f"{kind}s"):
            many = tokenizer.encode(text, add_special_tokens=False).ids
            if len(many) == 1:
                embeddings[many[0]] = embeddings[one] + 0.3 * embeddings[many[0]]
