"""What the commands of a chat say: /image and the files that it names."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from vila_deploy.utils.errors import VilaDeployError

QUIT = ("/exit", "/quit")
FILE_COMMANDS = ("/image", "/video")
COMMANDS = (*FILE_COMMANDS, "/reset", "/help", *QUIT)
HELP = (
    "/image FILE… and /video FILE… add images to the next question, /reset begins anew, /exit ends"
)


def split_command(text: str) -> tuple[str, str, str]:
    """Return the command that `text` begins with, its argument, and the lines behind it.

    The command is "" if `text` is a question: a space before a slash makes it one.
    """
    if not text.startswith("/"):
        return "", "", text.strip()
    line, _, rest = text.partition("\n")
    verb, _, argument = line.strip().partition(" ")
    return verb, argument.strip(), rest.strip()


def named_files(verb: str, argument: str) -> list[Path]:
    """Return the files that the argument of `verb` names, as a shell would read it.

    Quotes and backslashes keep spaces, ~ is the home folder. A name with spaces that is a file's as
    it stands needs neither.

    Raises:
        VilaDeployError: no file, or a quote that is not closed.
    """
    if not argument:
        raise VilaDeployError(f"{verb} names no file", fix=f"type {verb} FILE")
    whole = Path(argument)
    if os.path.exists(argument):  # noqa: PTH110  Path.exists raises where a name is too long
        return [whole]
    try:
        words = shlex.split(argument)
    except ValueError as error:
        raise VilaDeployError(
            f"{verb} has a quote that is not closed", fix="close it, or put a backslash before it"
        ) from error
    return [_expanded(word) for word in words]


def _expanded(word: str) -> Path:
    try:
        return Path(word).expanduser()
    except RuntimeError as error:
        raise VilaDeployError(
            "there is no such user, or no home folder", where=word, fix="give the whole path"
        ) from error
