"""What libraries print beside a program's own output, seen by the shell that started it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vila_deploy.utils.own_stdout import imports_print_to_stderr, libraries_print_to_stderr

PROGRAM = """
import os
import sys
from vila_deploy.utils.own_stdout import imports_print_to_stderr, libraries_print_to_stderr
print("before")
with libraries_print_to_stderr():
    os.write(1, b"compiled code\\n")
    with imports_print_to_stderr():
        print("imported code")
    print("own")
    sys.stdout.flush()
    print("not flushed")
os.write(1, b"after\\n")
print("last")
"""


def test_stdout_holds_the_programs_own_lines_alone() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.stdout.split() == ["before", "own", "not", "flushed", "after", "last"]
    assert done.stderr.splitlines() == ["compiled code", "imported code"]


def test_a_replaced_stdout_stays(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout
    with libraries_print_to_stderr(), imports_print_to_stderr():
        print("a library")
    assert sys.stdout is before
    assert capsys.readouterr() == ("", "a library\n")
