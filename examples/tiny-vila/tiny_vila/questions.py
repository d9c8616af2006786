"""Questions about scenes, each with its one right answer, and the sets made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from tiny_vila.scenes import COLOURS, KINDS, Scene, draw, random_scene
from vila_deploy.processing.chat_template import with_markers

# The first word of each seed: the three sets can never share an image's random numbers.
TRAINING, CALIBRATION, HELD_OUT = 1, 2, 3

Pair = tuple[str, str]
Maker = Callable[[Sequence[Scene], np.random.Generator], Pair | None]


@dataclass(frozen=True)
class Question:
    """Pictures, a prompt (image markers only where they are not all in front), and the answer."""

    kind: str
    scenes: tuple[Scene, ...]
    prompt: str
    answer: str

    @property
    def images(self) -> list[Image.Image]:
        return [draw(scene) for scene in self.scenes]


def held_out(count: int, kinds: Sequence[str] | None = None) -> list[Question]:
    """Questions for measuring, that training and calibration never see: SCORED kinds in turn."""
    return _question_set(HELD_OUT, count, kinds or SCORED)


def calibration(count: int) -> list[Question]:
    """Questions for the quantizer's calibration, of all kinds in turn."""
    return _question_set(CALIBRATION, count, list(IMAGES))


def _question_set(stream: int, count: int, kinds: Sequence[str]) -> list[Question]:
    return [
        random_question(kinds[i % len(kinds)], np.random.default_rng([stream, i]))
        for i in range(count)
    ]


def random_question(kind: str, rng: np.random.Generator) -> Question:
    """A question of `kind` about fresh scenes."""
    while True:
        scenes = tuple(random_scene(rng) for _ in range(IMAGES[kind]))
        pair = MAKERS[kind](scenes, rng)
        if pair:
            return Question(kind, scenes, *pair)


def where(place: str) -> str:
    """A place with its preposition."""
    if place == "centre":
        return "in the centre"
    return f"on the {place}" if place in ("left", "right") else f"at the {place}"


def ask_colour(scenes: Sequence[Scene], rng: np.random.Generator) -> Pair | None:
    shape = _pick(_unique(scenes[0], "kind"), rng)
    if shape is None or rng.random() < 0.3:
        shape = _pick(scenes[0].shapes, rng)
        noun = f"shape {where(shape.place)}"
    else:
        noun = shape.kind
    form = rng.choice(
        [
            f"What colour is the {noun}?",
            f"What color is the {noun}?",
            f"What is the colour of the {noun}?",
            f"Which colour does the {noun} have?",
        ]
    )
    return str(form), shape.colour


def ask_shape(scenes: Sequence[Scene], rng: np.random.Generator) -> Pair | None:
    shape = _pick(_unique(scenes[0], "colour"), rng)
    if shape is None or rng.random() < 0.5:
        shape = _pick(scenes[0].shapes, rng)
        place = where(shape.place)
        forms = [f"What shape is {place}?", f"Which shape do you see {place}?"]
    else:
        forms = [f"What shape is {shape.colour}?", f"Which shape is {shape.colour}?"]
    return str(rng.choice(forms)), shape.kind


def ask_count(scenes: Sequence[Scene], rng: np.random.Generator) -> Pair | None:
    noun, count = _counted(scenes[0], rng)
    form = rng.choice(
        [f"How many {noun} are there?", f"How many {noun} do you see?", f"Count the {noun}."]
    )
    return str(form), str(count)


def ask_place(scenes: Sequence[Scene], rng: np.random.Generator) -> Pair | None:
    by = str(rng.choice(["kind", "colour", "both"]))
    shape = _pick(_unique(scenes[0], by), rng)
    if shape is None:
        return None
    noun = {
        "kind": shape.kind,
        "colour": f"{shape.colour} shape",
        "both": f"{shape.colour} {shape.kind}",
    }[by]
    form = rng.choice([f"Where is the {noun}?", f"In which part of the picture is the {noun}?"])
    return str(form), shape.place


def ask_presence(scenes: Sequence[Scene], rng: np.random.Generator) -> Pair | None:
    scene, wanted = scenes[0], bool(rng.random() < 0.5)
    colour, kind = _any_colour(rng), _any_kind(rng)
    if wanted:
        shape = _pick(scene.shapes, rng)
        colour, kind = shape.colour, shape.kind
    elif rng.random() < 0.5:
        # A colour and a kind that are both there, only not on the same shape.
        colour, kind = _pick(scene.shapes, rng).colour, _pick(scene.shapes, rng).kind
    if bool(scene.having(kind, colour)) != wanted:
        return None
    form = rng.choice([f"Is there a {colour} {kind}?", f"Do you see a {colour} {kind}?"])
    return str(form), _yes(wanted)


def ask_description(scenes: Sequence[Scene], rng: np.random.Generator) -> Pair | None:
    form = rng.choice(
        ["Describe the picture.", "What do you see in the picture?", "Describe this image."]
    )
    parts = [f"a {shape.colour} {shape.kind} {where(shape.place)}" for shape in scenes[0].shapes]
    text = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
    return str(form), f"{text[0].upper()}{text[1:]}."


def ask_comparison(scenes: Sequence[Scene], rng: np.random.Generator) -> Pair | None:
    return COMPARISONS[rng.integers(len(COMPARISONS))](scenes, rng)


def _which_has_more(scenes: Sequence[Scene], rng: np.random.Generator) -> Pair | None:
    noun, first, second = _counted_twice(scenes, rng)
    if first == second:
        return None
    form = rng.choice(
        [
            f"Which picture has more {noun}, the first or the second?",
            f"Are there more {noun} in the first or in the second picture?",
        ]
    )
    return str(form), "first" if first > second else "second"


def _as_many(scenes: Sequence[Scene], rng: np.random.Generator) -> Pair | None:
    wanted = bool(rng.random() < 0.5)
    for _ in range(6):
        noun, first, second = _counted_twice(scenes, rng)
        if (first == second) == wanted and first + second > 0:
            return f"Do both pictures have the same number of {noun}?", _yes(wanted)
    return None


def _which_has(scenes: Sequence[Scene], rng: np.random.Generator) -> Pair | None:
    side = int(rng.integers(2))
    shape = _pick(scenes[side].shapes, rng)
    if scenes[1 - side].having(shape.kind, shape.colour):
        return None
    return f"Which picture has a {shape.colour} {shape.kind}?", ("first", "second")[side]


def _about_one(scenes: Sequence[Scene], rng: np.random.Generator) -> Pair | None:
    side = int(rng.integers(2))
    name = ("first", "second")[side]
    if rng.random() < 0.5:
        shape = _pick(_unique(scenes[side], "kind"), rng)
        if shape is None:
            return None
        return f"What colour is the {shape.kind} in the {name} picture?", shape.colour
    noun, count = _counted(scenes[side], rng)
    return f"How many {noun} are in the {name} picture?", str(count)


def ask_in_context(scenes: Sequence[Scene], rng: np.random.Generator) -> Pair:
    """Counting by example, as in the VILA paper: two images with counts, then one without."""
    kinds: list[str] = []
    for scene in scenes:
        others = [kind for kind in KINDS if kind not in kinds]
        seen = [kind for kind in others if scene.having(kind)]
        kinds.append(_pick(seen if seen and rng.random() < 0.85 else others, rng))
    lines = [
        f"<image>\n{kind}s: {len(scene.having(kind))}"
        for scene, kind in zip(scenes, kinds, strict=True)
    ]
    question, answer = "\n".join(lines).rsplit(" ", 1)
    return question, answer


COMPARISONS: tuple[Maker, ...] = (_which_has_more, _as_many, _which_has, _about_one)
MAKERS: dict[str, Maker] = {
    "colour": ask_colour,
    "shape": ask_shape,
    "count": ask_count,
    "place": ask_place,
    "presence": ask_presence,
    "description": ask_description,
    "comparison": ask_comparison,
    "in-context count": ask_in_context,
}
# How many images each kind of question is about.
IMAGES = {kind: 1 for kind in MAKERS} | {"comparison": 2, "in-context count": 3}

# What a score is about. Descriptions and yes-or-no questions are for looking at, scored on request.
SCORED = ("colour", "shape", "count", "place", "comparison", "in-context count")


def vocabulary_text(count: int) -> Iterator[str]:
    """Prompts and answers to train a tokenizer on."""
    for i in range(count):
        kind = list(MAKERS)[i % len(MAKERS)]
        question = random_question(kind, np.random.default_rng([TRAINING, 0, i]))
        yield with_markers(question.prompt, len(question.scenes))
        yield f" {question.answer}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _any_kind(rng: np.random.Generator) -> str:
    return str(rng.choice(KINDS))


def _any_colour(rng: np.random.Generator) -> str:
    return str(rng.choice(list(COLOURS)))


def _pick(items: Sequence, rng: np.random.Generator):
    return items[rng.integers(len(items))] if items else None


def _unique(scene: Scene, by: str) -> list:
    """The shapes that their kind, their colour or both tell from all others."""
    return [
        shape
        for shape in scene.shapes
        if len(
            scene.having(
                shape.kind if by != "colour" else None, shape.colour if by != "kind" else None
            )
        )
        == 1
    ]


def _noun(scenes: Sequence[Scene], rng: np.random.Generator) -> tuple[str, dict[str, str]]:
    """Something to count, mostly something that is there, as words and as filters."""
    seen = _pick([shape for scene in scenes for shape in scene.shapes], rng)
    absent = rng.random() < 0.2
    kind = _any_kind(rng) if absent else seen.kind
    colour = _any_colour(rng) if absent else seen.colour
    form = rng.random()
    if form < 0.5:
        return f"{kind}s", {"kind": kind}
    if form < 0.7:
        return f"{colour} shapes", {"colour": colour}
    if form < 0.8:
        return f"{colour} {kind}s", {"kind": kind, "colour": colour}
    return "shapes", {}


def _counted(scene: Scene, rng: np.random.Generator) -> tuple[str, int]:
    noun, filters = _noun([scene], rng)
    return noun, len(scene.having(**filters))


def _counted_twice(scenes: Sequence[Scene], rng: np.random.Generator) -> tuple[str, int, int]:
    noun, filters = _noun(scenes, rng)
    first, second = (len(scene.having(**filters)) for scene in scenes)
    return noun, first, second
