"""What an engine with random weights takes that is built to be measured: known before it is."""

from __future__ import annotations

import shutil
from pathlib import Path

from vila_deploy.bench.fill_table import DISK_RESERVE_BYTES
from vila_deploy.bench.first_token import UNTOKENIZED_CHUNKS
from vila_deploy.bench.measure import DECODE_TOKENS
from vila_deploy.bench.table_rows import RowPlan, engine_length
from vila_deploy.builder.plan import plan_build
from vila_deploy.builder.resolve import BuildOptions, resolve_random_build
from vila_deploy.utils.errors import VilaDeployError

# Beside the image's: the question and the answer that `measure` decodes.
TEXT_TOKENS = sum(map(len, UNTOKENIZED_CHUNKS)) + DECODE_TOKENS


def random_engine_length(model: str, precision: str, target: str, folder: Path) -> int:
    """Return how long the sequences of an engine must be that `measure` can measure.

    Args:
        folder: on the disk that the engine will be written to.

    Raises:
        VilaDeployError: unknown `model` or target, a backend that can't build it, or too little
            memory or disk for it.
    """
    length = engine_length(model, TEXT_TOKENS)
    build = resolve_random_build(model, precision, BuildOptions(target, max_seq_len=length))
    row = RowPlan(build, plan_build(build))
    if not row.fits:
        needed, limit = row.plan.device_bytes, row.plan.limit_bytes
        raise VilaDeployError(
            f"{model} in {precision} needs {needed / 1e9:.1f} GB of memory, "
            f"{limit / 1e9:.1f} GB are there",
            fix=f"what would do: {row.advice}",
        )
    needed, free = row.disk_bytes + DISK_RESERVE_BYTES, shutil.disk_usage(folder).free
    if free < needed:
        raise VilaDeployError(
            f"{model} in {precision} needs {needed / 1e9:.1f} GB of disk while it is measured, "
            f"{free / 1e9:.1f} GB are free",
            where=folder,
            fix="name a folder on another disk with TMPDIR",
        )
    return length
