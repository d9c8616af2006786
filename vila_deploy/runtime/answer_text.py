"""The text of an answer while its tokens come: stop strings, spaces around it, held-back ends."""

from __future__ import annotations

from collections.abc import Sequence

from vila_deploy.processing.tokenizer import IncrementalDetokenizer, Tokenizer


class AnswerText:
    """Turn tokens into text that may be shown at once.

    Text that may be the beginning of a stop string is held back until that is decided, and with
    `strip` spaces at the end until other text follows, so that the pieces together are the answer.
    `stopped` tells that a stop string came: it and what follows are no part of the text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), strip: bool = True):
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._stop = [text for text in stop if text]
        self._strip, self._started, self._held = strip, not strip, ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Return the text that may be shown behind `token`, possibly none."""
        return self._take(self._detokenizer.push(token))

    def finish(self) -> str:
        """Return the text that was held back, at the end of the answer."""
        if self.stopped:
            return ""
        piece = self._take(self._detokenizer.finish())
        if self.stopped:
            return piece
        piece, self._held = piece + self._held, ""
        return piece.rstrip() if self._strip else piece

    def _take(self, text: str) -> str:
        if self.stopped:
            return ""
        if not self._started:
            text = text.lstrip()
            self._started = bool(text)
        text = self._held + text
        # The string that is complete first, in whatever tokens the text comes.
        found = [(place + len(s), place) for s in self._stop if (place := text.find(s)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            text = text[: min(found)[1]]
            return text.rstrip() if self._strip else text
        shown = len(text) - self._undecided(text)
        if self._strip:
            shown = len(text[:shown].rstrip())
        self._held = text[shown:]
        return text[:shown]

    def _undecided(self, text: str) -> int:
        """Return the length of the longest end of `text` that begins a stop string."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
