"""The CPU backend: ONNX files for onnxruntime, and the Session that runs them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vila_deploy.engine.manifest import Manifest
    from vila_deploy.engine.session import Session


def open_session(folder: Path, manifest: Manifest, slots: int = 1) -> Session:
    """Open the engine in `folder`, whose files have been checked against `manifest`.

    Args:
        slots: sequences that it holds at once.

    Raises:
        VilaDeployError: onnxruntime can't load it.
    """
    from vila_deploy.backends.onnxruntime.session import OnnxRuntimeSession

    return OnnxRuntimeSession(folder, manifest, slots)
