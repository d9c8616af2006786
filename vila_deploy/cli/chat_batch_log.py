"""Keep finished rows of a batch beside its output, so that --resume goes on from them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.files import check_new, write_file

Result = dict[str, Any]


class BatchLog:
    """Results as they come, one JSON line each behind a first one that says what was asked for.

    Args:
        out: the file to write in the end; the log is OUT.partial.
        job: whatever the results depend on, as JSON.

    Raises:
        VilaDeployError: `out` exists, its folder does not, an earlier run's log is there without
            `resume`, or it is that of another job.
    """

    def __init__(self, out: Path, job: Any, resume: bool):
        self.out, self.path = out, log_path(out)
        self.results: dict[str, Result] = {}
        # Through JSON, as it will be read again.
        self._job = json.loads(json.dumps(job))
        going_on = self.path.exists()
        if going_on and not resume:
            raise VilaDeployError(
                "was left by an earlier run",
                where=self.path,
                fix="add --resume to go on from there, or remove it",
            )
        if going_on:
            self._load()
        if not self.path.exists():
            check_new(out, kind="file")
        self._file: IO[str] | None = None

    def add(self, name: str, result: Result) -> None:
        """Write the result of the row `name` at once."""
        if self._file is None:
            self._open()
        self.results[name] = result
        self._write([name, result])

    def finish(self, names: Sequence[str], failed: Callable[[Result], bool]) -> int:
        """Write `out` in the order of `names`; return how many of its rows have failed.

        The log stays while there are such, for --resume.
        """
        rows = [self.results[name] for name in names]
        failures = sum(map(failed, rows))
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_file(self.out, "".join(lines), errors="backslashreplace")
        if not failures:
            self.close()
            self.path.unlink(missing_ok=True)
        return failures

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> None:
        new = not self.path.exists()
        self._file = self.path.open("a", encoding="ascii")
        if new:
            self._write(self._job)
        elif not self.path.read_bytes().endswith(b"\n"):
            # A run that was killed while it wrote.
            self._file.write("\n")

    def _write(self, value: Any) -> None:
        assert self._file is not None
        self._file.write(json.dumps(value) + "\n")
        self._file.flush()

    def _load(self) -> None:
        lines = [_parse(line) for line in self.path.read_bytes().split(b"\n")]
        if lines == [None]:
            # Killed before its first line was complete.
            self.path.unlink()
            return
        if lines[0] != self._job:
            raise VilaDeployError(
                "belongs to a run with another engine, question or options",
                where=self.path,
                fix="repeat those, or remove it",
            )
        for line in lines[1:]:
            match line:
                case [str(name), dict(result)]:
                    self.results[name] = result


def log_path(out: Path) -> Path:
    """Return where results are kept until `out` is complete."""
    return out.with_name(f"{out.name}.partial")


def _parse(line: bytes) -> Any:
    """Return what a line holds; None for one that was cut short."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
