"""Questions typed at a terminal, or piped in one a line, for vila-chat."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vila_deploy.utils.errors import VilaDeployError

if TYPE_CHECKING:
    from vila_deploy.engine.sampling import SamplingParams
    from vila_deploy.processing.placeholders import Media
    from vila_deploy.runtime.conversation import Answer, Conversation

HELP = "/image FILE and /video FILE add images to the next question, /reset begins anew, /quit ends"
CONTEXT_FULL = "the context is full: this answer was cut short, /reset begins anew"
Loader = Callable[[Path], "Media"]


def is_terminal() -> bool:
    """Return whether a person types: then an error doesn't end the conversation."""
    return sys.stdin.isatty()


def check_input() -> None:
    """Raise VilaDeployError if there is nowhere to read questions from."""
    if sys.stdin is None:
        raise VilaDeployError("no question: stdin is closed", fix="give one with -p QUESTION")


def check_output() -> None:
    """Raise VilaDeployError if there is nowhere to write answers to."""
    if sys.stdout is None:
        raise VilaDeployError("stdout is closed", fix="send the answer to a file or /dev/null")


def show(text: str) -> None:
    """Print a piece of an answer; control characters, which could steer a terminal, as escapes."""
    click.echo("".join(map(_harmless, text)), nl=False)
    sys.stdout.flush()


def converse(
    conversation: Conversation,
    media: list[Media],
    sampling: SamplingParams,
    loaders: dict[str, Loader],
) -> None:
    """Answer the lines of stdin until they end.

    Args:
        media: images and videos for the first question.
        loaders: what reads the file of each command that adds an image or a video.

    Raises:
        VilaDeployError: in a pipe, any line that can't be done: what follows may depend on it.
    """
    terminal = is_terminal()
    if isinstance(sys.stdin, io.TextIOWrapper):
        # As file names are decoded; a question that is no UTF-8 gets its line later.
        sys.stdin.reconfigure(errors="surrogateescape")
    chat = _Chat(conversation, media, sampling, loaders)
    click.echo(HELP, err=True)
    while True:
        try:
            line = input("> " if terminal else "")
        except EOFError:
            break
        try:
            if line.strip() == "/quit":
                return
            chat.do(line)
        except VilaDeployError as error:
            # A wrong path or a full context must not end what a person types.
            if not terminal:
                raise
            click.echo(f"error: {error}", err=True)
    if not terminal and not chat.asked:
        raise VilaDeployError(
            "no question came through stdin", fix="give one with -p QUESTION, or one a line"
        )


class _Chat:
    """The state of a conversation between two lines."""

    def __init__(
        self,
        conversation: Conversation,
        media: list[Media],
        sampling: SamplingParams,
        loaders: dict[str, Loader],
    ):
        self.conversation, self.media, self.sampling = conversation, media, sampling
        self.loaders, self.asked = loaders, 0

    def do(self, line: str) -> None:
        """Do a command, or answer a question; a space before it makes any line a question."""
        verb, _, argument = line.strip().partition(" ")
        argument = argument.strip()
        if not line.startswith("/"):
            if verb:
                self._ask(line.strip())
        elif verb == "/reset":
            self.conversation.reset()
            self.media = []
        elif verb in self.loaders:
            if not argument:
                raise VilaDeployError(f"{verb} names no file", fix=f"type {verb} FILE")
            self.media.append(self.loaders[verb](Path(argument)))
        else:
            raise VilaDeployError(
                f"{verb} is no command",
                fix=f"{HELP}; a space goes before a question that begins so",
            )

    def _ask(self, question: str) -> None:
        answer: Answer = self.conversation.ask(question, self.media, self.sampling, on_text=show)
        click.echo()
        self.media, self.asked = [], self.asked + 1
        if answer.finish_reason == "context":
            click.echo(CONTEXT_FULL, err=True)


def _harmless(character: str) -> str:
    code = ord(character)
    control = (code < 0x20 and character not in "\n\t") or 0x7F <= code < 0xA0
    return f"\\x{code:02x}" if control else character
