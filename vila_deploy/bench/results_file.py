"""Files of rows: a line for each row as it ends, read again when the same command goes on."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vila_deploy.utils.errors import VilaDeployError

ROWS, LOCK = "rows.jsonl", ".lock"
Row = dict[str, Any]


class ResultsFile:
    """The rows of one file of a results folder."""

    def __init__(self, folder: Path, name: str = ROWS):
        self.folder, self._path = folder, folder / name

    def read(self) -> list[Row]:
        """Return the rows; a last line that was cut off, as by a kill, is removed from the file.

        Raises:
            VilaDeployError: another line is no JSON object.
        """
        if not self._path.exists():
            return []
        content = self._path.read_bytes()
        complete = content.rfind(b"\n") + 1
        if complete < len(content):
            with self._path.open("r+b") as file:
                file.truncate(complete)
        rows = []
        for number, line in enumerate(content[:complete].splitlines(), 1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise VilaDeployError(
                    f"line {number} is no row",
                    where=self._path,
                    fix="remove that line, or start anew with --fresh",
                )
            rows.append(row)
        return rows

    def append(self, row: Row) -> None:
        """Add a row so that it survives a kill or a power cut right afterwards.

        Raises:
            VilaDeployError: it can't be written, as on a full disk; the rows before it are kept.
        """
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise VilaDeployError(
                f"cannot write: {error.strerror}",
                where=self._path,
                fix="free some space; finished rows are kept, and the same command goes on",
            ) from error

    def clear(self) -> None:
        """Forget all rows."""
        self._path.unlink(missing_ok=True)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other commands out of the folder until the block ends, or this process.

        Raises:
            VilaDeployError: another one is at work there.
        """
        with (self.folder / LOCK).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise VilaDeployError(
                    "another vila-bench writes its results here",
                    where=self.folder,
                    fix="wait for it, or choose another --results",
                ) from None
            yield
