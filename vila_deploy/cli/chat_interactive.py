"""A conversation at a terminal, or with questions piped in one a line, for vila-chat."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vila_deploy.cli.chat_commands import (
    COMMANDS,
    FILE_COMMANDS,
    HELP,
    QUIT,
    named_files,
    split_command,
)
from vila_deploy.cli.chat_lines import CtrlC, LineReader, on_ctrl_c
from vila_deploy.utils.errors import VilaDeployError

if TYPE_CHECKING:
    from vila_deploy.engine.sampling import SamplingParams
    from vila_deploy.runtime.conversation import Answer, Conversation, MediaSource

CONTEXT_FULL = "the context is full: this answer was cut short, /reset begins anew"
AT_PROMPT = "/exit or Ctrl-D ends the chat"
STOPPED = "(stopped)"
Loader = Callable[[Path], "MediaSource"]


def is_terminal() -> bool:
    """Return whether a person types: then an error doesn't end the conversation."""
    return sys.stdin.isatty()


def show(text: str) -> None:
    """Print a piece of an answer; control characters, which could steer a terminal, as escapes."""
    click.echo("".join(map(_harmless, text)), nl=False)
    sys.stdout.flush()


class Chat:
    """A conversation between two lines of it.

    Args:
        media: images and videos for the next question.
        loaders: what reads the files of each command that adds an image or a video.
        stop: strings that end an answer.
    """

    def __init__(
        self,
        conversation: Conversation,
        media: Sequence[MediaSource],
        sampling: SamplingParams,
        loaders: dict[str, Loader],
        stop: Sequence[str] = (),
    ):
        self.conversation, self.sampling, self.stop = conversation, sampling, stop
        self.media, self.loaders = list(media), loaders
        self.answered, self.ended = 0, False
        self._answering = self._cancelled = False

    def do(self, text: str) -> None:
        """Do a command, or answer a question; behind a command's line a question may stand.

        Raises:
            VilaDeployError: a command or a question that can't be done; the chat may go on.
        """
        verb, argument, question = split_command(text)
        if verb in QUIT:
            self.ended = True
            return
        if verb:
            self._command(verb, argument)
        if verb and question:
            self.do(question)
        elif question:
            self._ask(question)

    def interrupt(self) -> None:
        """End the answer that is being written with its next token; a handler of signals.

        Raises:
            CtrlC: there is none, or it was to end already: a step of a large model takes its time.
        """
        if self._cancelled or not self._answering:
            raise CtrlC
        self._cancelled = True

    def _command(self, verb: str, argument: str) -> None:
        if verb in FILE_COMMANDS:
            # All of them or none.
            self.media += [self.loaders[verb](path) for path in named_files(verb, argument)]
            if is_terminal():
                click.echo(f"for the next question: {_counted(self.media)}", err=True)
        elif verb == "/reset":
            self.conversation.reset()
            self.media = []
        elif verb == "/help":
            click.echo(HELP, err=True)
        else:
            raise VilaDeployError(
                f"{verb} is no command",
                fix=f"{HELP}; a space goes before a question that begins so",
            )

    def _ask(self, question: str) -> None:
        self._answering, self._cancelled = True, False
        try:
            answer: Answer = self.conversation.ask(
                question,
                self.media,
                self.sampling,
                on_text=show,
                stop=self.stop,
                cancelled=lambda: self._cancelled,
            )
        finally:
            self._answering = False
        click.echo()
        self.media, self.answered = [], self.answered + 1
        if answer.finish_reason == "context":
            click.echo(CONTEXT_FULL, err=True)
        elif answer.finish_reason == "cancelled":
            click.echo(STOPPED, err=True)


def converse(chat: Chat) -> None:
    """Answer the lines of stdin until they end.

    Raises:
        VilaDeployError: stdin is closed; in a pipe, any line that can't be done: what follows may
            depend on it.
    """
    if sys.stdin is None:
        raise VilaDeployError("no question: stdin is closed", fix="give one with -p QUESTION")
    if isinstance(sys.stdin, io.TextIOWrapper):
        # As file names are decoded; a question that is no UTF-8 gets its line later.
        sys.stdin.reconfigure(errors="surrogateescape")
    (_converse_at_terminal if is_terminal() else _answer_lines)(chat)


def _converse_at_terminal(chat: Chat) -> None:
    click.echo(HELP, err=True)
    reader = LineReader(COMMANDS)
    # Between a line and its answer, or behind that, there is nothing that Ctrl-C could end.
    with on_ctrl_c(lambda: None):
        while not chat.ended and (line := _next_line(reader)) is not None:
            try:
                with on_ctrl_c(chat.interrupt):
                    chat.do(line)
            except CtrlC:
                click.echo(f"\n{STOPPED}", err=True)
            except VilaDeployError as error:
                # A wrong path or a full context must not end what a person types.
                click.echo(f"error: {error}", err=True)


def _next_line(reader: LineReader) -> str | None:
    """Return what the person types, or None at its end; Ctrl-C throws a line away."""
    while True:
        try:
            with on_ctrl_c(_raise_ctrl_c):
                return reader.read("> ")
        except CtrlC:
            click.echo(f"\n{AT_PROMPT}", err=True)
        except EOFError:
            return None


def _raise_ctrl_c() -> None:
    raise CtrlC


def _answer_lines(chat: Chat) -> None:
    for line in sys.stdin:
        chat.do(line)
        if chat.ended:
            return
    if not chat.answered:
        raise VilaDeployError(
            "no question came through stdin", fix="give one with -p QUESTION, or one a line"
        )


def _counted(media: Sequence[MediaSource]) -> str:
    videos = sum(isinstance(item, list) for item in media)
    kinds = ((len(media) - videos, "image"), (videos, "video"))
    return ", ".join(f"{count} {kind}{'s' * (count > 1)}" for count, kind in kinds if count)


def _harmless(character: str) -> str:
    code = ord(character)
    control = (code < 0x20 and character not in "\n\t") or 0x7F <= code < 0xA0
    return f"\\x{code:02x}" if control else character
