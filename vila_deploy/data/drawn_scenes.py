"""Images of the built-in calibration set, drawn when needed, and conversations about them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFilter, ImageFont

SIDE = 336
LETTER = """Dear neighbours,

the water will be off
on Tuesday from 9 to 11
while a pipe is mended.

Please fill a jug first.

Yours, the caretaker"""
Draw = Callable[[ImageDraw.ImageDraw, random.Random], None]


@dataclass(frozen=True)
class Scene:
    """A drawn image and what can be asked about it, as (question, answer)."""

    name: str
    background: str
    draw: Draw
    conversations: tuple[tuple[str, str], ...]
    blur: float = 0.0

    def image(self) -> Image.Image:
        """SIDE × SIDE pixels, RGB; always the same."""
        image = Image.new("RGB", (SIDE, SIDE), self.background)
        self.draw(ImageDraw.Draw(image), random.Random(self.name))
        return image.filter(ImageFilter.GaussianBlur(self.blur)) if self.blur else image


def _shapes(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    draw.ellipse((30, 40, 130, 140), fill="crimson")
    draw.rectangle((190, 50, 300, 160), fill="royalblue")
    draw.polygon([(80, 300), (160, 180), (240, 300)], fill="gold")


def _hills(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    for y in range(SIDE):
        draw.line((0, y, SIDE, y), fill=(255 - y // 4, 180 - y // 4, 90 + y // 3))
    draw.ellipse((210, 50, 280, 120), fill="lightyellow")
    for base, height, colour in ((210, 40, "olivedrab"), (260, 30, "darkgreen")):
        ridge = [(x, base - height * math.sin(x / 60 + base)) for x in range(0, SIDE + 8, 8)]
        draw.polygon([(0, SIDE), *ridge, (SIDE, SIDE)], fill=colour)


def _bars(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    draw.text((80, 12), "Boxes sold per day", fill="black", font=ImageFont.load_default(18))
    days = (("Mon", 3), ("Tue", 7), ("Wed", 5), ("Thu", 9), ("Fri", 4))
    for place, (day, count) in enumerate(days):
        left = 30 + 60 * place
        draw.rectangle((left, 290 - 25 * count, left + 40, 290), fill="steelblue")
        draw.text((left + 4, 298), day, fill="black", font=ImageFont.load_default(16))
        draw.text((left + 14, 266 - 25 * count), str(count), fill="black")
    draw.line((20, 290, 320, 290), fill="black", width=2)


def _sign(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    draw.rectangle((160, 190, 176, 336), fill="dimgray")
    draw.rectangle((40, 70, 296, 200), fill="white", outline="darkgreen", width=8)
    draw.text((70, 90), "LAKE ROAD", fill="darkgreen", font=ImageFont.load_default(36))
    draw.text((100, 145), "3 km  >>", fill="black", font=ImageFont.load_default(30))


def _face(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    draw.ellipse((68, 60, 268, 290), fill="peachpuff", outline="saddlebrown", width=3)
    draw.pieslice((60, 30, 276, 220), 180, 360, fill="saddlebrown")
    for x in (130, 206):
        draw.ellipse((x - 22, 140, x + 22, 184), outline="black", width=4)
        draw.ellipse((x - 6, 156, x + 6, 168), fill="black")
    draw.arc((125, 190, 211, 255), 20, 160, fill="firebrick", width=6)


def _berries(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    for _ in range(260):
        x, y, r = rng.randrange(SIDE), rng.randrange(SIDE), rng.randrange(6, 26)
        shade = rng.randrange(60, 200)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=(shade, shade // 6, shade // 3))


def _page(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    draw.rectangle((40, 20, 296, 320), fill="white", outline="gray")
    for row, line in enumerate(LETTER.split("\n")):
        draw.text((60, 45 + 26 * row), line, fill="black", font=ImageFont.load_default(18))


def _city(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    draw.ellipse((250, 30, 290, 70), fill="ivory")
    x = 0
    while x < SIDE:
        width, height = rng.randrange(30, 60), rng.randrange(90, 230)
        draw.rectangle((x, SIDE - height, x + width - 4, SIDE), fill="black")
        for wx in range(x + 5, x + width - 10, 10):
            for wy in range(SIDE - height + 6, SIDE - 10, 14):
                if rng.random() < 0.4:
                    draw.rectangle((wx, wy, wx + 5, wy + 7), fill="khaki")
        x += width


SCENES = (
    Scene("shapes", "whitesmoke", _shapes, (
        ("Which shapes are in the picture?", "A red circle, a blue square and a yellow triangle."),
        ("What is to the right of the circle?", "A blue square is to the right of the circle."),
        ("Describe this image in one sentence.",
         "Three simple shapes, red, blue and yellow, lie on a light grey background."),
    )),
    Scene("hills", "orange", _hills, (
        ("What time of day might it be?",
         "The orange sky and the low sun suggest that it is evening, shortly before sunset."),
        ("Describe the landscape.",
         "Two rows of rounded green hills stand under a sky that fades from orange to violet, "
         "with a pale sun above them."),
    ), blur=1.0),
    Scene("bars", "white", _bars, (
        ("On which day were the most boxes sold?", "On Thursday: nine boxes."),
        ("How many boxes were sold on Monday and Tuesday together?",
         "Three on Monday and seven on Tuesday make ten boxes."),
        ("What kind of chart is this?",
         "It is a bar chart that shows how many boxes were sold on each day of a working week."),
    )),
    Scene("sign", "skyblue", _sign, (
        ("What does the sign say?", "LAKE ROAD, 3 km, with a double arrow to the right."),
        ("Read the text and tell me how far it is.", "The sign says that it is three kilometres."),
    )),
    Scene("face", "mintcream", _face, (
        ("Describe the person.",
         "A drawn face with brown hair and round glasses looks straight ahead and smiles."),
        ("Is the person happy?", "Yes, the mouth is curved upwards in a smile."),
    )),
    Scene("berries", "darkred", _berries, (
        ("What could this be?",
         "It looks like a heap of dark red berries, slightly out of focus, seen from close by."),
        ("Which colours dominate?", "Dark red and crimson, with some nearly black spots."),
    ), blur=1.6),
    Scene("page", "tan", _page, (
        ("Summarise the letter.",
         "The caretaker tells the neighbours that there will be no water on Tuesday from nine to "
         "eleven because a pipe is mended, and asks them to fill a jug beforehand."),
        ("Who wrote the letter?", "The caretaker."),
    )),
    Scene("city", "midnightblue", _city, (
        ("Describe this image.",
         "A city skyline at night: black towers with many lit yellow windows under a dark blue "
         "sky, and a full moon at the upper right."),
        ("Where is the moon?", "The moon is near the upper right corner."),
    )),
)  # fmt: skip
