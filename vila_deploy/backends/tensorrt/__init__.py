"""TensorRT: engines compiled ahead of time or on the device, and the session that runs them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vila_deploy.engine.manifest import Manifest
    from vila_deploy.engine.session import Session


def open_session(folder: Path, manifest: Manifest) -> Session:
    """Open the engine in `folder`, whose files have been checked against `manifest`.

    Raises:
        VilaDeployError: another version of TensorRT, another GPU or none, or too little memory.
    """
    from vila_deploy.backends.tensorrt.session import TensorRtSession
    from vila_deploy.engine.session import OneSlot

    return OneSlot(TensorRtSession(folder, manifest))
