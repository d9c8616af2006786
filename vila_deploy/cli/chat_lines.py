"""Read what a person types: editing, history, completion and pasted lines, where there are any."""

from __future__ import annotations

import json
import os
import signal
import sys
import termios
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType, ModuleType

import click

from vila_deploy.utils.files import replace_file

HISTORY_ENTRIES, HISTORY_ENTRY_CHARACTERS = 1000, 10_000
HISTORY_FILE_BYTES = 4 << 20
CTRL_C, NO_KEY = "\x03", b"\0"


class CtrlC(KeyboardInterrupt):
    """Ctrl-C, which ends a line or an answer; SIGTERM stays a KeyboardInterrupt that ends all."""


class LineReader:
    """The lines of a person at a terminal; one line may hold several if they were pasted.

    Args:
        commands: names that Tab completes at the beginning of a line; file names elsewhere.
    """

    def __init__(self, commands: Sequence[str]):
        # Without a terminal on both sides there is nothing to edit, and readline writes to stdout.
        self._readline = _load_readline() if sys.stdout.isatty() else None
        self._history = History(history_path())
        if self._readline is not None:
            _set_up(self._readline, commands)
            for entry in self._history.load():
                self._readline.add_history(entry)

    def read(self, prompt: str) -> str:
        """Return the next line.

        Raises:
            CtrlC: Ctrl-C as a key; as a signal it is the caller's.
            EOFError: Ctrl-D.
        """
        try:
            line = self._line(prompt)
        except EOFError:
            if self._readline is None:
                click.echo(err=True)
            raise
        if self._readline is not None and self._history.add(line):
            self._readline.add_history(line)
        return line

    def _line(self, prompt: str) -> str:
        if self._readline is not None:
            with nullcontext() if _is_libedit(self._readline) else _ctrl_c_is_a_key():
                line = input(prompt)
            if CTRL_C in line:
                raise CtrlC
            return line
        if sys.stdout.isatty():
            return input(prompt)
        # Answers go to a file: what they are asked with does not belong there.
        click.echo(prompt, err=True, nl=False)
        return input()


class History:
    """Lines of earlier chats in a file that only its owner may read, one JSON string a line."""

    def __init__(self, path: Path | None):
        self._path, self._last = path, ""

    def load(self) -> list[str]:
        """Return the latest entries; none if there is no file, or no readable one."""
        if self._path is None:
            return []
        try:
            with self._path.open("rb") as file:
                content = file.read(HISTORY_FILE_BYTES + 1)
        except OSError:
            return []
        entries = [entry for line in content.splitlines() if (entry := _entry(line))]
        kept = entries[-HISTORY_ENTRIES:]
        if len(entries) > 2 * HISTORY_ENTRIES or len(content) > HISTORY_FILE_BYTES:
            self._write(kept, "w")
        self._last = kept[-1] if kept else ""
        return kept

    def add(self, line: str) -> bool:
        """Append a line; return whether it is one to remember."""
        entry = line.strip()
        if entry == self._last or not is_text(entry):
            return False
        self._last = entry
        self._write([entry], "a")
        return True

    def _write(self, entries: Sequence[str], mode: str) -> None:
        """Append or replace; a chat goes on where there is no room or no permission for it."""
        if self._path is None:
            return
        lines = "".join(json.dumps(entry) + "\n" for entry in entries)
        target = self._path if mode == "a" else self._path.with_name(f".{os.getpid()}.partial")
        with suppress(OSError):
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with os.fdopen(os.open(target, _FLAGS[mode], 0o600), mode, encoding="utf-8") as file:
                file.write(lines)
            if mode == "w":
                replace_file(target, self._path)


_FLAGS = {
    "a": os.O_WRONLY | os.O_CREAT | os.O_APPEND,
    "w": os.O_WRONLY | os.O_CREAT | os.O_TRUNC,
}


def history_path() -> Path | None:
    """Return where the XDG base directory specification puts it; None without a home."""
    state = os.environ.get("XDG_STATE_HOME", "")
    try:
        # The specification has relative paths ignored.
        folder = Path(state) if Path(state).is_absolute() else Path.home() / ".local" / "state"
    except RuntimeError:
        return None
    return folder / "vila-deploy" / "chat-history.jsonl"


def is_text(entry: str) -> bool:
    """Return whether a line is text that was typed, not a file's content that was pasted."""
    if not 0 < len(entry) <= HISTORY_ENTRY_CHARACTERS:
        return False
    # Control characters, and the surrogates as which bytes that are no UTF-8 arrive.
    return all(c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") for c in entry)


@contextmanager
def on_ctrl_c(do: Callable[[], None]) -> Iterator[None]:
    """Call `do`, which may raise, on Ctrl-C."""

    def handle(signum: int, frame: FrameType | None) -> None:
        do()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def _ctrl_c_is_a_key() -> Iterator[None]:
    """Let the terminal hand over Ctrl-C like other keys, for what `_set_up` has bound to it.

    As a signal it makes the terminal throw away the keys before it, and readline waits for one that
    it was told of and that is gone: no Ctrl-C ends that. Python, too, hears of a signal that comes
    between two keys only with the next one.
    """
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    settings = [*before[:-1], list(before[-1])]
    settings[-1][termios.VINTR] = NO_KEY
    termios.tcsetattr(terminal, termios.TCSANOW, settings)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, before)


def _entry(line: bytes) -> str:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return ""
    return entry if isinstance(entry, str) and is_text(entry) else ""


def _load_readline() -> ModuleType | None:
    try:
        import readline
    except ImportError:
        return None
    return readline


def _is_libedit(readline: ModuleType) -> bool:
    return "libedit" in (readline.__doc__ or "")


def _set_up(readline: ModuleType, commands: Sequence[str]) -> None:
    # Ours leaves out what is no text.
    readline.set_auto_history(False)
    if _is_libedit(readline):
        readline.parse_and_bind("bind ^I rl_complete")
    else:
        readline.parse_and_bind("tab: complete")
        # Pasted lines are one question; Python switches this off.
        readline.parse_and_bind("set enable-bracketed-paste on")
        # Alt+Enter begins another line: the next character, as it is, and that is a new line.
        readline.parse_and_bind(r'"\e\C-m": "\C-v\C-j"')
        # Ctrl-C ends the line with that character in it.
        for command in (r'"\C-c": "\C-v\C-c\C-m"', *_CTRL_C_OF_VI):
            readline.parse_and_bind(command)
    readline.set_completer_delims(" ")
    found: list[str] = []

    def complete(text: str, state: int) -> str | None:
        if state == 0:
            at_start = readline.get_begidx() == 0
            found[:] = _commands(text, commands) if at_start else _files(text)
        return found[state] if state < len(found) else None

    readline.set_completer(complete)


_CTRL_C_OF_VI = (
    "$if mode=vi",
    "set keymap vi-command",
    r'"\C-c": "i\C-v\C-c\C-m"',
    "set keymap vi-insert",
    "$endif",
)


def _commands(text: str, commands: Sequence[str]) -> list[str]:
    return [f"{name} " for name in commands if name.startswith(text)] if text else []


def _files(text: str) -> list[str]:
    """Return the paths that begin with `text`; a folder ends with a slash, a file with a space."""
    head, slash, beginning = text.rpartition("/")
    try:
        paths = sorted(Path(head + slash or ".").expanduser().iterdir())
    except (OSError, RuntimeError):
        return []
    return [
        f"{head}{slash}{path.name}{'/' if path.is_dir() else ' '}"
        for path in paths
        # A name with a space would need quotes, which readline's delimiters don't know.
        if path.name.startswith(beginning) and " " not in path.name
        if beginning or not path.name.startswith(".")
    ]
