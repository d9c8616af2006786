"""The GPU backend of this project's own kernels: packed weights, and the Session that runs them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from vila_deploy.utils.errors import VilaDeployError

if TYPE_CHECKING:
    from vila_deploy.engine.manifest import Manifest
    from vila_deploy.engine.session import Session


def open_session(folder: Path, manifest: Manifest, slots: int = 1) -> Session:
    """Open the engine in `folder`, whose files have been checked against `manifest`.

    Args:
        slots: sequences that it holds at once.

    Raises:
        VilaDeployError: triton is missing, no CUDA GPU is here, or too little of its memory is
            free.
    """
    require_triton()
    from vila_deploy.backends.native.loading import check_memory
    from vila_deploy.backends.native.session import NativeSession, OneNativeSlot
    from vila_deploy.backends.native.slotted_session import SlottedSession

    check_memory(folder, manifest, slots)
    if slots == 1:
        return OneNativeSlot(NativeSession(folder, manifest))
    return SlottedSession(folder, manifest, slots)


def require_triton() -> None:
    """Raise VilaDeployError if it is missing; torch with CUDA brings it."""
    if find_spec("triton") is None:
        raise VilaDeployError("backend native needs triton", fix="pip install triton")
