"""Images of the built-in evaluation set; none of their scenes is among the calibration's."""

from __future__ import annotations

import math
import random

from PIL import ImageDraw, ImageFont

from vila_deploy.data.drawn_scenes import SIDE, Scene


def _clock(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    draw.ellipse((38, 38, 298, 298), fill="white", outline="black", width=8)
    for hour in range(12):
        angle = math.radians(30 * hour)
        x, y = 168 + 110 * math.sin(angle), 168 - 110 * math.cos(angle)
        draw.ellipse((x - 6, y - 6, x + 6, y + 6), fill="black")
    draw.line((168, 168, 168 + 65, 168), fill="black", width=10)
    draw.line((168, 168, 168, 72), fill="black", width=6)


def _boat(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    draw.rectangle((0, 230, SIDE, SIDE), fill="teal")
    draw.polygon([(90, 230), (250, 230), (220, 270), (120, 270)], fill="sienna")
    draw.rectangle((162, 80, 168, 230), fill="black")
    draw.polygon([(172, 84), (172, 220), (260, 220)], fill="white")
    draw.polygon([(158, 104), (158, 220), (100, 220)], fill="orangered")
    for _ in range(14):
        x, y = rng.randrange(SIDE), rng.randrange(280, SIDE)
        draw.arc((x, y, x + 30, y + 12), 180, 360, fill="azure", width=2)


def _prices(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    draw.rectangle((50, 30, 286, 306), fill="black", outline="burlywood", width=10)
    draw.text((110, 50), "CAFE NORD", fill="white", font=ImageFont.load_default(22))
    for row, (name, price) in enumerate((("Tea", "2.20"), ("Coffee", "2.80"), ("Cake", "3.50"))):
        draw.text((80, 120 + 50 * row), name, fill="khaki", font=ImageFont.load_default(24))
        draw.text((206, 120 + 50 * row), price, fill="khaki", font=ImageFont.load_default(24))


def _line_chart(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    draw.text((70, 14), "Visitors, thousands", fill="black", font=ImageFont.load_default(18))
    points = [(40, 250), (100, 220), (160, 240), (220, 130), (290, 80)]
    draw.line((30, 290, 310, 290), fill="black", width=2)
    draw.line((30, 50, 30, 290), fill="black", width=2)
    draw.line(points, fill="crimson", width=4)
    for (x, y), year in zip(points, range(2017, 2022), strict=True):
        draw.ellipse((x - 5, y - 5, x + 5, y + 5), fill="crimson")
        draw.text((x - 14, 298), str(year), fill="black", font=ImageFont.load_default(13))


def _snowman(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    draw.rectangle((0, 260, SIDE, SIDE), fill="white")
    for radius, y in ((70, 240), (50, 140), (34, 66)):
        draw.ellipse((168 - radius, y - radius, 168 + radius, y + radius), fill="snow",
                     outline="lightsteelblue", width=3)  # fmt: skip
    draw.rectangle((136, 8, 200, 36), fill="black")
    draw.polygon([(168, 64), (168, 76), (214, 72)], fill="darkorange")
    for x in (154, 180):
        draw.ellipse((x - 5, 50, x + 5, 60), fill="black")
    for _ in range(120):
        x, y = rng.randrange(SIDE), rng.randrange(SIDE)
        draw.ellipse((x, y, x + 4, y + 4), fill="white")


def _board(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    for row in range(8):
        for column in range(8):
            colour = ("wheat", "saddlebrown")[(row + column) % 2]
            left, top = 8 + 40 * column, 8 + 40 * row
            draw.rectangle((left, top, left + 40, top + 40), fill=colour)
    for column, row, colour in ((1, 2, "black"), (3, 4, "ivory"), (6, 5, "ivory")):
        left, top = 8 + 40 * column, 8 + 40 * row
        draw.ellipse((left + 6, top + 6, left + 34, top + 34), fill=colour, outline="gray", width=2)


def _wood(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    draw.rectangle((0, 280, SIDE, SIDE), fill="darkolivegreen")
    for x in range(20, SIDE, 52):
        top = rng.randrange(30, 110)
        draw.rectangle((x - 5, 200, x + 5, 290), fill="saddlebrown")
        draw.polygon([(x, top), (x - 34, 230), (x + 34, 230)], fill="forestgreen")
    draw.rectangle((140, 250, 200, 300), fill="firebrick")
    draw.polygon([(130, 250), (170, 215), (210, 250)], fill="dimgray")


def _note(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    draw.rectangle((60, 40, 276, 296), fill="lemonchiffon")
    lines = ("Shopping", "", "- 6 eggs", "- 1 l milk", "- bananas", "- candles")
    for row, line in enumerate(lines):
        draw.text((90, 60 + 36 * row), line, fill="navy", font=ImageFont.load_default(24))


SCENES = (
    Scene("clock", "lightgray", _clock, (
        ("What time does the clock show?",
         "The short hand points to the right, at three, and the long hand points straight up: it "
         "is three o'clock."),
    )),
    Scene("boat", "lightblue", _boat, (
        ("Describe this image.",
         "A small brown sailing boat with one white and one orange sail is on calm green water "
         "under a light blue sky."),
    )),
    Scene("prices", "tan", _prices, (
        ("How much do a coffee and a piece of cake cost together?",
         "The coffee is 2.80 and the cake is 3.50, so together they cost 6.30."),
    )),
    Scene("visitors", "white", _line_chart, (
        ("What does the chart show?",
         "It is a line chart of the number of visitors, in thousands, for the years from 2017 to "
         "2021. After a small dip in 2019 the number rises steeply until 2021."),
    )),
    Scene("snowman", "slategray", _snowman, (
        ("What is in the picture, and what is the weather like?",
         "A snowman with a black hat and an orange carrot for a nose stands in the snow. It is "
         "snowing, and the sky is grey."),
    )),
    Scene("board", "black", _board, (
        ("How many pieces are on the board, and of which colours?",
         "There are three round pieces on the board: two white ones and a black one."),
    )),
    Scene("wood", "lightcyan", _wood, (
        ("Describe the image in detail.",
         "A small red hut with a grey roof stands in front of a row of dark green fir trees with "
         "brown trunks. The ground is dark green and the sky is pale."),
    ), blur=1.0),
    Scene("note", "peru", _note, (
        ("What is on the shopping list?",
         "The list names six eggs, one litre of milk, bananas and candles."),
    )),
)  # fmt: skip
