"""The table of backends, the only place that imports one by its name."""

from __future__ import annotations

from importlib import import_module

from vila_deploy.backends.base import Backend
from vila_deploy.utils.errors import VilaDeployError

# name → "module:object", an instance of Backend; the module imports no heavy library.
BACKENDS: dict[str, str] = {
    "onnxruntime": "vila_deploy.backends.onnxruntime.backend:BACKEND",
    "native": "vila_deploy.backends.native.backend:BACKEND",
    "tensorrt": "vila_deploy.backends.tensorrt.backend:BACKEND",
    "edge-llm": "vila_deploy.backends.edge_llm.backend:BACKEND",
    "tensorrt-llm": "vila_deploy.backends.tensorrt_llm.backend:BACKEND",
    "llamacpp": "vila_deploy.backends.llamacpp.backend:BACKEND",
}
# Other names that --backend takes; the backend says where each is allowed (check_alias).
ALIASES: dict[str, str] = {"tensorrt-rtx": "tensorrt"}


def get_backend(name: str) -> Backend:
    """Return the backend called `name`.

    Raises:
        VilaDeployError: unknown; the message lists those there are.
    """
    if name not in BACKENDS:
        raise VilaDeployError(
            f"this version has no backend {name!r}", fix=f"choose from {', '.join(BACKENDS)}"
        )
    module, _, attribute = BACKENDS[name].partition(":")
    backend: Backend = getattr(import_module(module), attribute)
    return backend
