"""Environments of other programs, each made once and kept, and why one can't be made."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

# Where environments are kept between runs; git ignores it.
FOLDER = Path(
    os.environ.get("VILA_DEPLOY_BASELINES", Path(__file__).resolve().parent / "baselines")
)
COMPLETE = "complete"
# Why environments could not be made in this run, lest several rows wait for the same network.
_unavailable: dict[str, str] = {}
# A package index that can't be reached is given up after this.
PIP_OPTIONS = ("--quiet", "--disable-pip-version-check", "--retries", "1", "--timeout", "15")
NETWORK_SIGNS = ("connection", "resolution", "resolve", "timed out", "network", "no matching")


class Unavailable(Exception):
    """A program can't be timed here; the message says in one line what is missing."""


def environment(
    name: str, packages: Sequence[str], variables: Mapping[str, str] | None = None
) -> Path:
    """Return the folder of the environment `name`, made now unless it is there.

    Args:
        packages: what pip installs into it.
        variables: added to the process environment of pip.

    Raises:
        Unavailable: it can't be made; nothing of it is left then.
    """
    folder = FOLDER / name
    if (folder / COMPLETE).exists():
        return folder
    if name in _unavailable:
        raise Unavailable(_unavailable[name])
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        _run([sys.executable, "-m", "venv", str(folder)], {}, "python -m venv fails")
        install = [str(folder / "bin" / "python"), "-m", "pip", "install", *PIP_OPTIONS, *packages]
        _run(install, variables or {}, f"pip install {' '.join(packages)} fails")
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, Unavailable):
            _unavailable[name] = str(error)
        raise
    (folder / COMPLETE).touch()
    return folder


def _run(command: Sequence[str], variables: Mapping[str, str], problem: str) -> None:
    done = subprocess.run(
        command, env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return
    output = done.stderr + done.stdout
    if any(sign in output.casefold() for sign in NETWORK_SIGNS):
        raise Unavailable(f"{problem}: the package index has not been reached")
    raise Unavailable(f"{problem}: {last_line(output)}")


def why_ended(code: int, messages: str) -> str:
    """Return in one line why a program ended: the signal that it died of, or what it said."""
    if code >= 0:
        return last_line(messages)
    name = signal.Signals(-code).name
    more = "; Linux ends programs so when memory runs out" if name == "SIGKILL" else ""
    return f"its process died of {name}{more}"


def last_line(text: str) -> str:
    """Return the last line of a program's messages that says something, shortened."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.casefold()]
    return (errors or lines or ["it says nothing"])[-1][:200]
