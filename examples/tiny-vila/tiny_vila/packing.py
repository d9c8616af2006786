"""Training sequences: many questions about the same images in one sequence.

A pack is a shared prefix (system sentence and images) followed by one branch for each question.
A branch sees the prefix and itself, at the positions it would have alone, so that it trains exactly
what a single question looks like while the images are computed once. A conversation is an
ordinary multi-turn prompt: a sequence that is all prefix.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from tiny_vila.model import EOS, PAD, TEMPLATE, tokenize
from tiny_vila.questions import IMAGES, MAKERS, Pair, ask_in_context
from tiny_vila.scenes import KINDS, Scene, random_scene
from vila_deploy.processing.chat_template import render, with_markers

IGNORED = -100
SINGLE = [kind for kind, images in IMAGES.items() if images == 1 and kind != "description"]


@dataclass
class Packed:
    """Token ids and, for each, its target, position, branch (0 is the prefix) and weight.

    Tokens weigh alike, or an answer of n tokens √n in all (`even_answers`).
    """

    scenes: tuple[Scene, ...]
    even_answers: bool = False
    tokens: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    branches: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    def add(self, tokens: list[int], learn: bool, start: int, branch: int) -> int:
        """Appends tokens from position `start` on; gives the position after them."""
        self.tokens += tokens
        self.targets += tokens if learn else [IGNORED] * len(tokens)
        self.positions += range(start, start + len(tokens))
        self.branches += [branch] * len(tokens)
        self.weights += [len(tokens) ** -0.5 if self.even_answers else 1.0] * len(tokens)
        return start + len(tokens)


@dataclass
class Batch:
    """Packed sequences, padded: all [batch, length], the mask [batch, 1, length, length]."""

    scenes: list[Scene]
    tokens: Tensor
    targets: Tensor
    weights: Tensor
    positions: Tensor
    mask: Tensor


def random_pack(
    tokenizer: Tokenizer, rng: np.random.Generator, max_shapes: int, even_answers: bool
) -> Packed:
    """A pack about one, two or three images, or now and then a conversation about one."""
    pairs: list[Pair] = []
    while not pairs:  # of two images that are alike there may be nothing to ask
        images = int(rng.choice([1, 2, 3], p=[0.5, 0.35, 0.15]))
        scenes = tuple(random_scene(rng, max_shapes) for _ in range(images))
        pairs = questions_about(scenes, rng)
    if images == 1 and rng.random() < 0.15:
        turns = [pairs[i] for i in rng.permutation(len(pairs))]
        return conversation(tokenizer, Packed(scenes, even_answers), turns)
    return pack(tokenizer, Packed(scenes, even_answers), pairs)


def questions_about(scenes: tuple[Scene, ...], rng: np.random.Generator) -> list[Pair]:
    """Many different questions about the same images."""
    if len(scenes) == 1:
        kinds = ["description", *SINGLE, *SINGLE]
    elif len(scenes) == 2:
        kinds = ["comparison"] * 10
    else:
        prompt, _ = ask_in_context(scenes, rng)
        examples = prompt.rsplit("\n", 1)[0]
        return [(f"{examples}\n{kind}s:", str(len(scenes[-1].having(kind)))) for kind in KINDS]
    pairs = [MAKERS[kind](scenes, rng) for kind in kinds]
    return [pair for pair in pairs if pair]


def pack(tokenizer: Tokenizer, packed: Packed, pairs: list[Pair]) -> Packed:
    """Every question as a branch behind what all their prompts begin with."""
    prompts = [
        tokenize(tokenizer, render(TEMPLATE, [], with_markers(prompt, len(packed.scenes))))
        for prompt, _ in pairs
    ]
    shared = 0
    while len({tuple(p[: shared + 1]) for p in prompts}) == 1 and shared < len(prompts[0]) - 1:
        shared += 1
    packed.add(prompts[0][:shared], False, 0, 0)
    for branch, (prompt, (_, answer)) in enumerate(zip(prompts, pairs, strict=True), 1):
        end = packed.add(prompt[shared:], False, shared, branch)
        packed.add(_answer(tokenizer, answer), True, end, branch)
    return packed


def conversation(tokenizer: Tokenizer, packed: Packed, pairs: list[Pair]) -> Packed:
    """The questions as turns of one conversation."""
    end = seen = 0
    turns: list[Pair] = []
    for prompt, answer in pairs:
        question = prompt if turns else with_markers(prompt, len(packed.scenes))
        ids = tokenize(tokenizer, render(TEMPLATE, turns, question))
        end = packed.add(ids[seen:], False, end, 0)
        end = packed.add(_answer(tokenizer, answer), True, end, 0)
        turns.append((question, answer))
        seen = end
    return packed


def _answer(tokenizer: Tokenizer, answer: str) -> list[int]:
    return [*tokenizer.encode(f" {answer}", add_special_tokens=False).ids, EOS]


def collate(packs: list[Packed]) -> Batch:
    """Pads to the longest; a token attends to earlier ones of its branch and of the prefix."""
    length = max(len(p.tokens) for p in packs)

    def padded(name: str, value: float) -> Tensor:
        rows = [getattr(p, name) for p in packs]
        return torch.tensor([row + [value] * (length - len(row)) for row in rows])

    branches = padded("branches", -1)
    same = (branches[:, None, :] == branches[:, :, None]) | (branches == 0)[:, None, :]
    allowed = same & torch.ones(length, length, dtype=torch.bool).tril()
    return Batch(
        scenes=[scene for p in packs for scene in p.scenes],
        tokens=padded("tokens", PAD),
        targets=padded("targets", IGNORED),
        weights=padded("weights", 0.0),
        positions=padded("positions", 0),
        mask=allowed[:, None],
    )
