"""TensorRT-LLM: its checkpoint written anywhere, its engines built and run on the device."""

from __future__ import annotations

from pathlib import Path

from vila_deploy.engine.manifest import Manifest
from vila_deploy.engine.session import OneSlot, Session


def open_session(folder: Path, manifest: Manifest) -> Session:
    """Open the engines in `folder`, whose files have been checked.

    Raises:
        VilaDeployError: TensorRT-LLM isn't here, or can't open the engine.
    """
    from vila_deploy.backends.tensorrt_llm.session import TensorrtLlmSession

    return OneSlot(TensorrtLlmSession(folder, manifest))
