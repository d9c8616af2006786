"""How an answer is scored: one function a metric, 0 to 1."""

from __future__ import annotations

import re
from collections.abc import Callable
from random import Random

from vila_deploy.harness.edit_distance import anls
from vila_deploy.harness.mmmu_scoring import find_choice, open_answer_is_right, parse_choice
from vila_deploy.harness.question import Question
from vila_deploy.harness.vqa_normalize import normalize

# People who must agree for an answer to be wholly right (Antol et al. 2015).
AGREEING = 3
SCIENCE_ANSWER = re.compile(r"The answer is ([A-Z]).")
SCIENCE_LETTERS = "ABCDE"
LETTER_ENDS = ("", ".", ":", ")", ",")
Metric = Callable[[str, Question, Random], float]
"""metric(answer, question, guess): `guess` draws where a protocol does."""


def exact(answer: str, question: Question, guess: Random) -> float:
    """Score 1 if the answer without outer spaces is a right one, letter by letter."""
    return float(answer.strip() in [right.strip() for right in question.answers])


def vqa(answer: str, question: Question, guess: Random) -> float:
    """Score VQA accuracy: min(1, n/3) for n people who said so, averaged over leaving out each.

    With fewer than four answers there is nobody to leave out: 1 if it equals one of them.
    """
    given, said = normalize(answer), [normalize(right) for right in question.answers]
    equal = said.count(given)
    if len(said) <= AGREEING:
        return float(equal > 0)
    others = equal * min(1.0, (equal - 1) / AGREEING)
    return (others + (len(said) - equal) * min(1.0, equal / AGREEING)) / len(said) if equal else 0.0


def choice(answer: str, question: Question, guess: Random) -> float:
    """Score 1 if MMMU's script finds a right letter in the answer."""
    return float(parse_choice(answer, question.choices, guess) in question.answers)


def mmmu_open(answer: str, question: Question, guess: Random) -> float:
    """Score 1 if MMMU's script finds a right value in the answer."""
    return float(open_answer_is_right(answer, question.answers))


def document(answer: str, question: Question, guess: Random) -> float:
    """Score the greatest ANLS with a right answer."""
    return max(anls(answer, right) for right in question.answers)


def yes_or_no(answer: str, question: Question, guess: Random) -> float:
    """Score 1 for the right one; "no" is what says no in its first sentence (POPE)."""
    words = answer.strip().split(".")[0].replace(",", "").split(" ")
    said = "no" if {"No", "not", "no"} & set(words) else "yes"
    return float(said in question.answers)


def science(answer: str, question: Question, guess: Random) -> float:
    """Score 1 for the right letter: alone, before a period, or behind "The answer is"."""
    answer = answer.strip()
    if answer not in tuple(SCIENCE_LETTERS):
        named = SCIENCE_ANSWER.findall(answer)
        begins = answer[:1] in tuple(SCIENCE_LETTERS) and answer[1:2] == "."
        answer = answer[0] if begins else named[0] if len(named) == 1 else ""
    return float(answer in tuple(question.letters) and answer in question.answers)


def gqa(answer: str, question: Question, guess: Random) -> float:
    """Score 1 if the answer in lower case without a period at its end is a right one."""
    return float(answer.strip().rstrip(".").lower() in question.answers)


def letter(answer: str, question: Question, guess: Random) -> float:
    """Score 1 if the answer begins with or names the right letter; nothing is guessed (MMBench)."""
    answer = answer.strip()
    begins = answer[:1] in tuple(question.letters) and answer[1:2] in LETTER_ENDS
    found = answer[0] if begins else find_choice(answer, question.choices)
    return float(found in question.answers)


METRICS: dict[str, Metric] = {
    "exact": exact,
    "vqa": vqa,
    "choice": choice,
    "anls": document,
    "mmmu-open": mmmu_open,
    "yes-no": yes_or_no,
    "science": science,
    "gqa": gqa,
    "letter": letter,
}
# What rows of one's own may name.
OWN_METRICS = ("exact", "vqa", "choice", "anls")
