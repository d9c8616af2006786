"""Show a long job's progress on stderr: a bar with ETA on a terminal, plain lines otherwise."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Lines come every second at first, then more and more seldom, at least once a minute.
MIN_SECONDS, MAX_SECONDS, SHARE_OF_ELAPSED = 1.0, 60.0, 0.05

Advance = Callable[..., None]
"""advance(text="", steps=1): count `steps` more as done; `text` names the current work."""


@contextmanager
def progress(total: int, description: str) -> Iterator[Advance]:
    """Yield `advance(text="", steps=1)`; `advance(text, steps=0)` only changes the text.

    Args:
        total: steps in all.
        description: the job, e.g. "quantizing".
    """
    show = _terminal if sys.stderr.isatty() else _plain
    with show(max(total, 1), description) as advance:
        yield advance


@contextmanager
def _terminal(total: int, description: str) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True), transient=False) as bar:
        task = bar.add_task(description, total=total, text="")

        def advance(text: str = "", steps: int = 1) -> None:
            bar.update(task, advance=steps, text=text)

        yield advance


@contextmanager
def _plain(total: int, description: str) -> Iterator[Advance]:
    start = time.monotonic()
    done, last_line = 0, start - MIN_SECONDS

    def advance(text: str = "", steps: int = 1) -> None:
        nonlocal done, last_line
        done += steps
        now = time.monotonic()
        pause = min(MAX_SECONDS, max(MIN_SECONDS, SHARE_OF_ELAPSED * (now - start)))
        if now - last_line < pause and done < total:
            return
        last_line = now
        elapsed = now - start
        eta = f", ETA {clock(elapsed * (total - done) / done)}" if 0 < done < total else ""
        suffix = f" ({text})" if text else ""
        line = f"{description} {done}/{total}, elapsed {clock(elapsed)}{eta}{suffix}"
        print(line, file=sys.stderr, flush=True)

    yield advance


def clock(seconds: float) -> str:
    """Return seconds as text: 12.3 → "12s", 754 → "12:34", 4000 → "1:06:40"."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{rest:02d}"
    return f"{minutes}:{rest:02d}" if minutes else f"{rest}s"
