"""tiny-vila's whole answers through the native backend, in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.support.native_cases import TOLERANCE, built, deviation, rounded
from tests.support.paths import TINY_VILA
from tiny_vila.questions import held_out
from vila_deploy.backends.native import open_session
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.engine.sampling import SamplingParams
from vila_deploy.engine.session import OneSlot
from vila_deploy.model.vila import ReferenceSession
from vila_deploy.processing.chat_template import PROMPT_TEMPLATES, render
from vila_deploy.processing.multimodal_prompt import merge_embeddings, text_chunks
from vila_deploy.processing.tokenizer import Tokenizer, load_tokenizer
from vila_deploy.runtime.conversation import Conversation
from vila_deploy.runtime.prompt import place_images

MOST_TOKENS = 32
# Descriptions are the longest answers: 9 and 15 tokens.
SHORT, LONG = 2, 1


@dataclass(frozen=True)
class Pair:
    """An engine and the reference of the same 4-bit weights."""

    session: Any
    reference: ReferenceSession
    tokenizer: Tokenizer
    model: Any


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    checkpoint, folder = rounded(open_checkpoint(TINY_VILA)), tmp_path_factory.mktemp("native")
    with pytest.MonkeyPatch.context() as patch:
        manifest = built(folder / "engine", checkpoint, patch)
    session = open_session(folder / "engine", manifest).sequence
    tokenizer = load_tokenizer(TINY_VILA / "llm")
    yield Pair(session, ReferenceSession(checkpoint), tokenizer, manifest.model)
    session.close()


@pytest.fixture(scope="module")
def questions() -> list[Any]:
    """Descriptions of one image each, which the model never saw."""
    return held_out(3, ["description"])


def test_an_answer_up_to_its_end_is_the_references(pair: Pair, questions: list[Any]) -> None:
    """As vila-chat asks, each token chosen by the host."""
    found, expected = (
        Conversation(OneSlot(session), pair.tokenizer, pair.model, 1000).ask(
            questions[SHORT].prompt, questions[SHORT].images, SamplingParams(MOST_TOKENS)
        )
        for session in (pair.session, pair.reference)
    )
    assert found.tokens == expected.tokens
    assert found.text == questions[SHORT].answer
    assert found.finish_reason == "stop"


def test_an_answer_chosen_on_the_device_is_the_references(pair: Pair, questions: list[Any]) -> None:
    """Token, position and choice never leave the device between the prompt and the last token."""
    session, reference = pair.session, pair.reference
    placed, pixels = place_images(questions[LONG].prompt, questions[LONG].images, pair.model)
    features, expected = (s.encode_images(pixels[0].tiles) for s in (session, reference))
    assert deviation(features, expected) < TOLERANCE
    text = render(PROMPT_TEMPLATES[pair.model.prompt], [], placed)
    pieces = text_chunks(pair.tokenizer, text, pair.model.recipe)

    for each in (session, reference):
        each.truncate(0)
    logits = session.prefill(merge_embeddings(pieces, [*features], session.embed_tokens))
    wanted = reference.prefill(merge_embeddings(pieces, [*expected], reference.embed_tokens))
    assert deviation(logits, wanted) < TOLERANCE
    tokens = [int(wanted.argmax())]
    assert int(logits.argmax()) == tokens[0]
    while tokens[-1] not in pair.model.stop_token_ids and len(tokens) < MOST_TOKENS:
        wanted = reference.decode(tokens[-1])
        tokens.append(int(wanted.argmax()))
    assert session.decode_greedy(len(tokens) - 1) == tokens[1:]
    assert deviation(session._logits(), wanted) < TOLERANCE
    assert session.position == reference.position == int(session._cache.position)
    assert pair.tokenizer.decode(tokens[:-1]).strip() == questions[LONG].answer
