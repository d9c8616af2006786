"""The tasks by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vila_deploy.harness.tasks.gqa import read_gqa
from vila_deploy.harness.tasks.mmbench import read_mmbench
from vila_deploy.harness.tasks.mmmu import read_mmmu
from vila_deploy.harness.tasks.pope import read_pope
from vila_deploy.harness.tasks.scienceqa import read_scienceqa
from vila_deploy.harness.tasks.task import Task
from vila_deploy.harness.tasks.textvqa import read_textvqa

PUBLISHED: dict[str, Callable[[Path], Task]] = {
    "mmmu": read_mmmu,
    "textvqa": read_textvqa,
    "pope": read_pope,
    "scienceqa-img": read_scienceqa,
    "gqa": read_gqa,
    "mmbench": read_mmbench,
}
