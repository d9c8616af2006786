"""Scenes of coloured shapes and how they are drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": (215, 35, 40),
    "yellow": (245, 225, 50),
    "green": (40, 150, 60),
    "blue": (40, 80, 205),
    "black": (20, 20, 22),
    "white": (250, 250, 250),
}
KINDS = ("circle", "square", "triangle")
# The image is divided into 3 × 3 places, in reading order; a place holds at most one shape.
PLACES = (
    "top left",
    "top",
    "top right",
    "left",
    "centre",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
MAX_SHAPES = 3
CANVASES = ((160, 160), (192, 160), (160, 192), (224, 168), (168, 224), (240, 240))


@dataclass(frozen=True)
class Shape:
    """One shape; `radius` and `offset` are fractions of a place's shorter side and of its size."""

    kind: str
    colour: str
    place: str
    radius: float
    offset: tuple[float, float]
    turn: float


@dataclass(frozen=True)
class Scene:
    """What an image shows, shapes in reading order; `seed` fixes its background and shades."""

    shapes: tuple[Shape, ...]
    canvas: tuple[int, int]
    seed: int

    def having(
        self, kind: str | None = None, colour: str | None = None, place: str | None = None
    ) -> list[Shape]:
        """The shapes that agree with everything given."""
        return [
            shape
            for shape in self.shapes
            if kind in (None, shape.kind)
            and colour in (None, shape.colour)
            and place in (None, shape.place)
        ]


def random_scene(rng: np.random.Generator, max_shapes: int = MAX_SHAPES) -> Scene:
    """1 to `max_shapes` shapes of a few kinds and colours, so that several are often alike."""
    kinds = rng.permutation(KINDS)[: rng.integers(1, len(KINDS) + 1)]
    colours = rng.permutation(list(COLOURS))[: rng.integers(2, len(COLOURS) + 1)]
    count = int(rng.integers(1, max_shapes + 1))
    shapes = []
    for place in sorted(rng.choice(len(PLACES), count, replace=False)):
        radius = float(rng.uniform(0.34, 0.46))
        room = 0.48 - radius
        shapes.append(
            Shape(
                kind=str(rng.choice(kinds)),
                colour=str(rng.choice(colours)),
                place=PLACES[place],
                radius=radius,
                offset=(float(rng.uniform(-room, room)), float(rng.uniform(-room, room))),
                turn=float(rng.uniform(-0.25, 0.25)),
            )
        )
    canvas = CANVASES[rng.integers(len(CANVASES))]
    return Scene(tuple(shapes), canvas, int(rng.integers(1 << 31)))


def draw(scene: Scene) -> Image.Image:
    """The image of a scene: shapes on a grey background with a gradient and some grain."""
    rng = np.random.default_rng(scene.seed)
    width, height = scene.canvas
    slope_x, slope_y = rng.uniform(-14, 14, 2)
    ramp = slope_x * np.linspace(-1, 1, width) + slope_y * np.linspace(-1, 1, height)[:, None]
    grain = 3 * rng.standard_normal((height, width), np.float32)
    grey = (rng.uniform(115, 165) + ramp).astype(np.float32) + grain
    tinted = grey[..., None] + rng.uniform(-6, 6, 3).astype(np.float32)
    image = Image.fromarray(tinted.clip(0, 255).astype(np.uint8), "RGB")
    pen = ImageDraw.Draw(image)
    for shape in scene.shapes:
        shade = np.array(COLOURS[shape.colour]) + rng.uniform(-12, 12, 3)
        fill = tuple(int(v) for v in shade.clip(0, 255))
        row, column = divmod(PLACES.index(shape.place), 3)
        x = (column + 0.5 + shape.offset[0]) * width / 3
        y = (row + 0.5 + shape.offset[1]) * height / 3
        radius = shape.radius * min(width, height) / 3
        if shape.kind == "circle":
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        else:
            pen.polygon(_outline(shape, x, y, radius), fill=fill)
    return image


def _outline(shape: Shape, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """Corners of a polygon, as points on circles around (x, y); the first one points up."""
    count, start = (4, -math.pi / 4) if shape.kind == "square" else (3, -math.pi / 2)
    angles = [start + shape.turn + 2 * math.pi * i / count for i in range(count)]
    return [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles]
