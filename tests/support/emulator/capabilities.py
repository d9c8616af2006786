"""Which compute capabilities compiled kernels are executed for."""

from __future__ import annotations

import os
import subprocess
from datetime import date

from tests.support.paths import REPOSITORY
from vila_deploy.kernels.capability import ComputeCapability

NEWEST = ComputeCapability(9, 0)
OTHERS = (ComputeCapability(8, 0), ComputeCapability(8, 7), ComputeCapability(8, 9))


def emulated_capabilities() -> tuple[ComputeCapability, ...]:
    """Return 9.0 and one more, in turn by the commit (by the day without its history).

    EMULATED=all in the environment means all of them.
    """
    if os.environ.get("EMULATED") == "all":
        return (*OTHERS, NEWEST)
    command = ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        number = int(found.stdout.strip(), 16)
    except (OSError, subprocess.CalledProcessError):
        number = date.today().toordinal()
    return (NEWEST, OTHERS[number % len(OTHERS)])
