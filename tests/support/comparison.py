"""Greedy tokens of an engine beside those of the reference that holds the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.engine.sampling import SamplingParams
from vila_deploy.engine.session import SequenceSession, Session
from vila_deploy.model.vila import ReferenceSession
from vila_deploy.processing.chat_template import PROMPT_TEMPLATES, render
from vila_deploy.processing.multimodal_prompt import merge_embeddings, text_chunks
from vila_deploy.runtime.conversation import encode_images
from vila_deploy.runtime.generate import generate
from vila_deploy.runtime.open_engine import open_engine
from vila_deploy.runtime.prompt import Media, place_images
from vila_deploy.utils.arrays import Floats

Prompt = tuple[Sequence[Media], str]
NEW_TOKENS = 64
SAMPLING = SamplingParams(NEW_TOKENS)
# Share of the standard deviation of a token's logits. Seen so far: logits 0.0005 apart, for one
# token of 1280, on processors with AVX-512.
TIE = 1e-3


def greedy_tokens_of_both(
    checkpoint: Path, engine: Path, prompts: Sequence[Prompt], tie: float = TIE
) -> list[tuple[list[int], list[int]]]:
    """(reference's tokens, engine's tokens) for each prompt; stop tokens do not stop them.

    Processors add in different orders: at a near-tie of two tokens, either is right.

    The reference reads prompt and engine's answer at once and gives its most likely token at every
    position: up to the first that differs, these are the tokens that it would have decoded itself.
    """
    reference = ReferenceSession(open_checkpoint(checkpoint))
    pairs = []
    with open_engine(engine) as opened:
        assert opened.tokenizer is not None
        template = PROMPT_TEMPLATES[opened.model.prompt]
        for images, question in prompts:
            placed, pixels = place_images(question, images, opened.model)
            text = render(template, [], placed)
            chunks = text_chunks(opened.tokenizer, text, opened.model.recipe)

            def embed(session: Session | SequenceSession) -> Floats:
                features = encode_images(session, pixels)  # noqa: B023
                return merge_embeddings(chunks, features, session.embed_tokens)  # noqa: B023

            tokens = list(generate(opened.session, embed(opened.session), (), SAMPLING))
            prompt = embed(reference)
            sequence = np.concatenate([prompt, reference.embed_tokens(tokens[:-1])])
            logits = reference.llm(torch.from_numpy(sequence))[len(prompt) - 1 :]
            pairs.append((_likeliest(logits, tokens, tie), tokens))
    return pairs


def _likeliest(logits: torch.Tensor, tokens: list[int], tie: float) -> list[int]:
    """Return the most likely token at every position; of several within `tie` that of `tokens`."""
    best, likeliest = logits.max(-1)
    given = torch.tensor(tokens)
    tied = best - logits[range(len(tokens)), given] <= tie * logits.std(-1)
    return torch.where(tied, given, likeliest).tolist()


def noise(seed: int) -> Image.Image:
    """An image of smooth noise: any image will do for comparing numbers."""
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 256, (7, 9, 3), np.uint8))
    return small.resize((200, 150), Image.Resampling.BICUBIC)
