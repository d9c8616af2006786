"""Bring answers into the form in which VQA accuracy compares them.

The rules of the VQA evaluation server, as llava/eval/m4c_evaluator.py of NVlabs/VILA has them from
Facebook's mmf, with their known quirks: scores are comparable only if those are kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

ARTICLES = ("a", "an", "the")
NUMBER_WORDS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}
MARKS = ';/[]"{}()=+\\_-><@`,?!'
COMMA_IN_NUMBER = re.compile(r"(?<=\d),+(?=\d)")
# "(?!<=" is the original's: it takes every period that no digit follows.
PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")
# Of the original's call, which gives a flag where the number of replacements belongs.
MOST_PERIODS = int(re.UNICODE)
# Words that are completed where one apostrophe is missing; others, such as "shes", are left.
CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
    might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
    someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't
    what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's
    who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd
    you'd've you'll you're you've
"""


def normalize(answer: str) -> str:
    """Return `answer` in lower case without articles and marks, numbers up to ten as digits."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    words = (NUMBER_WORDS.get(word, word) for word in _without_marks(text).lower().split())
    return " ".join(COMPLETED.get(word, word) for word in words if word not in ARTICLES)


def _without_marks(text: str) -> str:
    """Remove a mark that stands beside a space anywhere, else put a space in its place."""
    number = COMMA_IN_NUMBER.search(text) is not None
    without = text
    for mark in MARKS:
        loose = f"{mark} " in text or f" {mark}" in text or number
        without = without.replace(mark, "" if loose else " ")
    return PERIOD.sub("", without, count=MOST_PERIODS)


def _completed() -> Iterator[tuple[str, str]]:
    for word in CONTRACTIONS.split():
        for place in (index for index, letter in enumerate(word) if letter == "'"):
            yield word[:place] + word[place + 1 :], word
    # The one entry that goes the other way.
    yield "somebody'd", "somebodyd"


COMPLETED = dict(_completed())
