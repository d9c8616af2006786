"""A question of a task, with what its answer is compared to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from string import ascii_uppercase

from PIL import Image

MAX_CHOICES = len(ascii_uppercase)


@dataclass(frozen=True)
class TaskImage:
    """An image that is opened when it is asked about; `name` identifies it."""

    name: str
    load: Callable[[], Image.Image]


@dataclass(frozen=True)
class Question:
    """A question and its right answers.

    Args:
        id: as its file numbers it.
        text: all that is said to the model; <image> takes the next image, without it they come
            first.
        answers: right ones; the letter of the right choice where there are choices.
        choices: their texts, A first; empty for an open question.
        metric: a name in `METRICS`.
        category: scores are given for each too.
        group: questions of one group count as one, right if all are; None: counts alone.
    """

    id: str
    text: str
    answers: tuple[str, ...]
    metric: str
    images: tuple[TaskImage, ...] = ()
    choices: tuple[str, ...] = ()
    category: str | None = None
    group: str | None = None

    @property
    def letters(self) -> str:
        """Return the letters of the choices."""
        return ascii_uppercase[: len(self.choices)]

    def read_images(self) -> list[Image.Image]:
        """Return the images, RGB and upright; one that can't be read is a VilaDeployError."""
        return [image.load() for image in self.images]

    @property
    def digest(self) -> str:
        """Return SHA-256 of everything but the pixels."""
        values = [self.id, self.text, self.answers, self.metric, self.choices, self.category]
        content = json.dumps([*values, self.group, [image.name for image in self.images]])
        return hashlib.sha256(content.encode()).hexdigest()
