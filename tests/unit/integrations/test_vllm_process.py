"""vLLM as a process behind vila-serve: how its end is noticed."""

from __future__ import annotations

import sys
import threading

import pytest

from vila_deploy.integrations.vllm.command import Command
from vila_deploy.integrations.vllm.process import running
from vila_deploy.utils.errors import VilaDeployError


def python(program: str) -> Command:
    return Command((sys.executable, "-c", program), {})


def test_an_end_by_itself_is_told() -> None:
    told = threading.Event()
    with running(python("import sys; sys.exit(3)")) as process:
        process.on_end(told.set)
        assert told.wait(30)
        with pytest.raises(VilaDeployError, match="ended with exit code 3"):
            process.check_running()


def test_an_end_that_was_asked_for_is_not() -> None:
    told = threading.Event()
    with running(python("import time; time.sleep(600)")) as process:
        process.on_end(told.set)
    assert process.wait() < 0
    assert not told.wait(0.5)
