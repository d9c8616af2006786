"""The table of backends, the only place that imports one by its name."""

from __future__ import annotations

from importlib import import_module
from typing import NamedTuple

from vila_deploy.backends.base import Backend
from vila_deploy.engine.build_request import BuildRequest
from vila_deploy.utils.errors import VilaDeployError


class BackendRow(NamedTuple):
    """Where a backend is, and which options of vila-build-engine only it takes.

    Args:
        location: "module:object", an instance of Backend; the module imports no heavy library.
        options: fields of BuildRequest, None where the user gave nothing.
    """

    location: str
    options: tuple[str, ...] = ()


BACKENDS: dict[str, BackendRow] = {
    "onnxruntime": BackendRow("vila_deploy.backends.onnxruntime.backend:BACKEND", ("activations",)),
    "native": BackendRow("vila_deploy.backends.native.backend:BACKEND", ("kernel_launch",)),
    "tensorrt": BackendRow("vila_deploy.backends.tensorrt.backend:BACKEND", ("jetpack",)),
    "edge-llm": BackendRow("vila_deploy.backends.edge_llm.backend:BACKEND"),
    "tensorrt-llm": BackendRow("vila_deploy.backends.tensorrt_llm.backend:BACKEND"),
    "llamacpp": BackendRow("vila_deploy.backends.llamacpp.backend:BACKEND", ("gpu_layers",)),
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
    module, _, attribute = BACKENDS[name].location.partition(":")
    backend: Backend = getattr(import_module(module), attribute)
    return backend


def check_options(name: str, request: BuildRequest) -> None:
    """Raise VilaDeployError for an option that other backends take, not the one called `name`."""
    for option in (option for row in BACKENDS.values() for option in row.options):
        if getattr(request, option) is None or option in BACKENDS[name].options:
            continue
        able = [other for other, row in BACKENDS.items() if option in row.options]
        raise VilaDeployError(
            f"--{option.replace('_', '-')} is for backend {' or '.join(able)}, not for {name}",
            fix="leave it out",
        )
