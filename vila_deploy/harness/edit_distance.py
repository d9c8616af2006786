"""Levenshtein's distance, and the similarity of answers that documents are scored by."""

from __future__ import annotations

# Below this similarity an answer is another one, not the same with slips of reading.
ANLS_THRESHOLD = 0.5


def edit_distance(first: str, second: str) -> int:
    """Return how many characters to insert, delete or replace to make one text the other."""
    previous = list(range(len(second) + 1))
    for row, letter in enumerate(first, 1):
        current = [row]
        for column, other in enumerate(second, 1):
            replaced = previous[column - 1] + (letter != other)
            current.append(min(previous[column] + 1, current[-1] + 1, replaced))
        previous = current
    return previous[-1]


def anls(answer: str, right: str) -> float:
    """Return the normalized Levenshtein similarity, 0 below ANLS_THRESHOLD (Biten et al. 2019)."""
    answer, right = (" ".join(text.lower().split()) for text in (answer, right))
    longest = max(len(answer), len(right))
    # Two texts of such lengths can't be similar enough; saves time on runaway answers.
    if abs(len(answer) - len(right)) > longest * ANLS_THRESHOLD:
        return 0.0
    similarity = 1 - edit_distance(answer, right) / longest if longest else 1.0
    return similarity if similarity >= ANLS_THRESHOLD else 0.0
