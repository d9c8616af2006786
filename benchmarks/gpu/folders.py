"""Where things lie: what others made, Triton's cache. No torch here."""

from __future__ import annotations

import os
from pathlib import Path

BASELINES_VARIABLE, CACHE_VARIABLE = "VILA_DEPLOY_BASELINES", "TRITON_CACHE_DIR"
# Where get_baselines.py puts what others made; git ignores it.
BASELINES = Path(os.environ.get(BASELINES_VARIABLE) or Path(__file__).parent / "baselines")
# Compiled kernels as an earlier call packed them, in its folder or brought with the baselines.
PACKED_CACHE = "cache.tar.xz"


def triton_cache() -> Path:
    """Return the folder in which Triton keeps what it has compiled."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".triton" / "cache")
