"""The GPU that an engine runs on, by the name that its own driver gives it."""

from __future__ import annotations

from vila_deploy.engine.target import Target


def gpu_name(target: Target, backend: str) -> str | None:
    """The GPU that engines of `backend` for `target` run on here; None if that is the CPU.

    Asked with the library that the backend runs by, so that no other must be installed.

    Raises:
        VilaDeployError: no GPU is here, or CUDA reports an error.
    """
    if target.compute_capability is None:
        return None
    if backend == "tensorrt":
        from vila_deploy.backends.tensorrt import cuda

        name: bytes = cuda.call("cudaGetDeviceProperties", 0).name
        return name.partition(b"\0")[0].decode("utf-8", "replace")
    if backend == "native":
        from vila_deploy.backends.native.session import find_device

        device, _ = find_device()
        if device == "cpu":  # Triton's interpreter
            return None
    import torch

    return torch.cuda.get_device_name()
