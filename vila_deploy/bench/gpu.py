"""Name the GPU that an engine runs on, as its own driver does."""

from __future__ import annotations

from vila_deploy.backends.registry import get_backend
from vila_deploy.engine.target import Target


def gpu_name(target: Target, backend: str) -> str | None:
    """Return the GPU that engines of `backend` for `target` run on here; None if that is the CPU.

    Asked with the library that the backend runs by, so that no other must be installed.

    Raises:
        VilaDeployError: no GPU is here, or CUDA reports an error.
    """
    cpu = target.compute_capability is None and target.ggml_backend is None
    return None if cpu else get_backend(backend).gpu_name()
