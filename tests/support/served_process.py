"""vila-serve as a user starts it: a process of its own on a free port."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.commands import BIN

ADDRESS = re.compile(r"answers at (http://\S+) ")


@contextmanager
def vila_serve(engine: Path, *options: str) -> Iterator[str]:
    """Yield the address of a server; it must end with exit code 0 when it is told to."""
    words = [BIN / "vila-serve", engine, "--port", "0", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout
        found = ADDRESS.search(process.stdout.readline())
        assert found, "vila-serve did not start"
        yield found[1]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
