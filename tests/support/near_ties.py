"""How near another program's greedy answer is to our engine's where the two differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vila_deploy.engine.session import Session
from vila_deploy.processing.chat_template import PROMPT_TEMPLATES, render
from vila_deploy.processing.multimodal_prompt import merge_embeddings, text_chunks
from vila_deploy.runtime.conversation import encode_images
from vila_deploy.runtime.open_engine import OpenedEngine, open_engine
from vila_deploy.runtime.prompt import Media, place_images
from vila_deploy.utils.arrays import Floats

Question = tuple[Sequence[Media], str]


def margins(engine: Path, questions: Sequence[Question], answers: Sequence[str]) -> list[float]:
    """Return, for each greedy answer that isn't our engine's, how near it is to a tie.

    That is our engine's logit of its own token less that of the other program's at the first token
    that differs, as a share of the logits' standard deviation.

    Raises:
        AssertionError: no token of the vocabulary leads to an answer.
    """
    with open_engine(engine) as opened:
        found = (
            _margin(opened, images, prompt, answer)
            for (images, prompt), answer in zip(questions, answers, strict=True)
        )
        return [margin for margin in found if margin is not None]


def _margin(
    opened: OpenedEngine, images: Sequence[Media], question: str, answer: str
) -> float | None:
    session, tokenizer = opened.session, opened.tokenizer
    assert tokenizer is not None
    session.keep(0, 0)
    logits = session.prefill(0, _prompt(opened, session, images, question))
    tokens: list[int] = []
    while True:
        best = int(logits.argmax())
        stops = best in opened.model.stop_token_ids
        text = tokenizer.decode(tokens).strip()
        if stops and text == answer:
            return None
        if stops or not answer.startswith(tokenizer.decode([*tokens, best]).strip()):
            break
        tokens.append(best)
        logits = session.decode([0], [best])[0]
    for other in np.argsort(-logits)[1:]:
        if other in opened.model.stop_token_ids:
            leads = text == answer
        else:
            longer = tokenizer.decode([*tokens, int(other)]).strip()
            leads = longer != text and answer.startswith(longer)
        if leads:
            return float((logits[best] - logits[other]) / logits.std())
    raise AssertionError(f"no token leads from {text!r} to {answer!r}")


def _prompt(
    opened: OpenedEngine, session: Session, images: Sequence[Media], question: str
) -> Floats:
    assert opened.tokenizer is not None
    placed, pixels = place_images(question, images, opened.model)
    text = render(PROMPT_TEMPLATES[opened.model.prompt], [], placed)
    chunks = text_chunks(opened.tokenizer, text, opened.model.recipe)
    return merge_embeddings(chunks, encode_images(session, pixels), session.embed_tokens)
