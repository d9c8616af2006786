"""Compiles a part in a process of its own, while the graphs of the next are being written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.module_command import module_command

FAILED = 1


class CompileWorker:
    """The compilation of the graph in `folder`/`part`; it ends at the latest with the context."""

    def __init__(self, folder: Path, part: str):
        self._part = part
        # Not a fork of this process: torch's threads would not survive it.
        pipe, child = subprocess.PIPE, module_command(__name__, str(folder), part)
        self.process = subprocess.Popen(child, stdout=pipe, stderr=pipe, text=True)

    def __enter__(self) -> CompileWorker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Popen's own context waits and closes the pipes.
        with self.process as process:
            process.kill()

    def versions(self) -> dict[str, str]:
        """Waits for the end; versions for the manifest, as compile_part gives them.

        Raises:
            VilaDeployError: what compile_part raised, or the process was killed.
            OSError: what writing the plan raised.
        """
        output, messages = self.process.communicate()
        code = self.process.returncode
        lines = output.splitlines()
        if code not in (0, FAILED) or not lines:
            reason = f"signal {-code}" if code < 0 else (messages.splitlines() or ["no word"])[-1]
            raise VilaDeployError(
                f"compiling part {self._part} ended before its time ({reason})",
                fix="close other programs if memory was short, and run the same command again",
            )
        return answered(lines[-1])


def answered(line: str) -> dict[str, str]:
    """What `main` said last: versions, or the exception that it ended with, raised again."""
    answer = json.loads(line)
    if "problem" in answer:
        raise VilaDeployError(**answer["problem"])
    if "os" in answer:
        raise OSError(*answer["os"])
    versions: dict[str, str] = answer["versions"]
    return versions


def main() -> None:
    """Compiles folder and part of the command line, and says on stdout how it ended."""
    from vila_deploy.backends.tensorrt.build import compile_part

    folder, part = sys.argv[1:]
    try:
        answer: dict[str, Any] = {
            "versions": compile_part(Path(folder), part, lambda text="", steps=1: None)
        }
    except VilaDeployError as error:
        where = None if error.where is None else str(error.where)
        answer = {"problem": {"what": error.what, "where": where, "fix": error.fix}}
    except OSError as error:
        answer = {"os": [error.errno, error.strerror, str(error.filename or folder)]}
    print(json.dumps(answer))
    if "versions" not in answer:
        sys.exit(FAILED)


if __name__ == "__main__":
    main()
