"""Ask a model questions, as many at once as it holds."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from vila_deploy.engine.sampling import SamplingParams
from vila_deploy.harness.subject import Subject
from vila_deploy.processing.placeholders import Media
from vila_deploy.runtime.continuous_batching import ContinuousBatcher
from vila_deploy.runtime.image_cache import ImageCache
from vila_deploy.runtime.prompt import Message, Prompt, check_prompt_length, prepare_prompt
from vila_deploy.runtime.request import Event, Failed, Finished, GenerationRequest
from vila_deploy.utils.errors import VilaDeployError

Reply = str | VilaDeployError
"""What a model has said, or why it couldn't be asked."""
Key = TypeVar("Key")


@dataclass(frozen=True)
class Inquiry:
    """What to ask and how.

    Args:
        text: <image> takes the next image; without it media come first.
        media: reads images and videos, when it is this inquiry's turn.
        stop: strings that end the answer.
    """

    text: str
    media: Callable[[], Sequence[Media]]
    sampling: SamplingParams
    stop: tuple[str, ...] = ()


def ask(inquiries: Iterable[tuple[Key, Inquiry]], subject: Subject) -> Iterator[tuple[Key, Reply]]:
    """Yield the reply to each inquiry, as soon as there is one, in any order."""
    batcher = ContinuousBatcher(
        subject.session, subject.tokenizer, subject.model.stop_token_ids, ImageCache()
    )
    done: deque[tuple[Key, Reply]] = deque()
    waiting = 0
    for key, inquiry in inquiries:
        try:
            prompt = _prompt(inquiry, subject)
        except VilaDeployError as error:
            yield key, error
            continue
        request = GenerationRequest(prompt, inquiry.sampling, inquiry.stop)
        batcher.submit(request, partial(_keep, done, key))
        waiting += 1
        # Each that waits holds its images; one more than there are slots keeps all of them busy.
        while waiting > subject.session.slots:
            yield _next(batcher, done)
            waiting -= 1
    for _ in range(waiting):
        yield _next(batcher, done)


def _prompt(inquiry: Inquiry, subject: Subject) -> Prompt:
    message = Message("user", (*inquiry.media(), inquiry.text))
    prompt = prepare_prompt([message], subject.model, subject.tokenizer)
    check_prompt_length(len(prompt), subject.max_input_len)
    return prompt


def _next(batcher: ContinuousBatcher, done: deque[tuple[Key, Reply]]) -> tuple[Key, Reply]:
    while not done:
        batcher.step()
    return done.popleft()


def _keep(done: deque[tuple[Key, Reply]], key: Key, event: Event) -> None:
    if isinstance(event, Failed):
        done.append((key, event.error))
    elif isinstance(event, Finished):
        done.append((key, event.text))
