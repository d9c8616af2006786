"""The GPU backend of this project's own kernels: packed weights, and the Session that runs them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from vila_deploy.utils.errors import VilaDeployError

if TYPE_CHECKING:
    from vila_deploy.engine.manifest import Manifest
    from vila_deploy.engine.session import Session


def open_session(folder: Path, manifest: Manifest) -> Session:
    """Open the engine in `folder`, whose files have been checked against `manifest`.

    Raises:
        VilaDeployError: triton is missing, or no CUDA GPU is here.
    """
    require_triton()
    from vila_deploy.backends.native.session import NativeSession
    from vila_deploy.engine.session import OneSlot

    return OneSlot(NativeSession(folder, manifest))


def require_triton() -> None:
    """Raise VilaDeployError if it is missing; torch with CUDA brings it."""
    if find_spec("triton") is None:
        raise VilaDeployError("backend native needs triton", fix="pip install triton")
