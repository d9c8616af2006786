"""Run a command as on a board: NVIDIA's bindings check each call, a stand-in does the work.

    python -m tests.support.board.program COMPUTE_CAPABILITY COMMAND ARGUMENTS…

ONNX_PYTHON names a Python with onnxruntime. COMMAND `null` calls the bindings themselves, whose
libraries return null.
"""

from __future__ import annotations

import inspect
import os
import sys
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from tests.support.board.checked import CheckedModule
from tests.support.board.onnx_server import OnnxServer
from tests.support.board.stand_in import Builder, OnnxParser, runtime
from tests.support.fake_cuda import FakeCuda

JETSON = "linux-aarch64"
CREATED = ("Builder", "Runtime")


def main() -> None:
    capability, command, *arguments = sys.argv[1:]
    bindings: Any = import_module("tensorrt_bindings")
    if command == "null":
        sys.modules["tensorrt"] = bindings
    else:
        _install_stand_in(bindings, capability)
    from vila_deploy.backends.tensorrt import backend, compilers

    backend.host_platform = compilers.host_platform = lambda: JETSON  # type: ignore[assignment]
    if command == "null":
        _call_null_libraries(compilers)
        return
    module: Any = import_module(
        f"vila_deploy.cli.{command.removeprefix('vila-').replace('-', '_')}"
    )
    module.main(arguments)


def _install_stand_in(bindings: Any, capability: str) -> None:
    from vila_deploy.backends.tensorrt import cuda

    gpu = FakeCuda(capability)
    if find_spec("cuda") is not None:
        _check_cuda(gpu)
    created = {
        "Builder": Builder,
        "OnnxParser": OnnxParser,
        "Runtime": runtime(gpu, OnnxServer(os.environ["ONNX_PYTHON"])),
    }
    stand_in: Any = CheckedModule(bindings, created)
    sys.modules["tensorrt"] = stand_in
    cuda.runtime = lambda: gpu  # type: ignore[assignment,return-value]


def _check_cuda(gpu: FakeCuda) -> None:
    """Raise unless the package cuda-bindings has each function and constant of the stand-in."""
    real = import_module("cuda.bindings.runtime")
    for name, value in inspect.getmembers(FakeCuda):
        if name.startswith("cuda"):
            assert hasattr(real, name), name
            for constant in vars(value) if not callable(value) else ():
                assert hasattr(getattr(real, name), constant), (name, constant)


def _call_null_libraries(compilers: Any) -> None:
    """Print the errors that a user gets where the libraries or the driver are not there."""
    from vila_deploy.backends.tensorrt import cuda
    from vila_deploy.backends.tensorrt.log import ErrorLog
    from vila_deploy.utils.errors import VilaDeployError

    trt = compilers.COMPILERS["tensorrt"].load()
    log = ErrorLog(trt)
    calls: list[Any] = [partial(compilers.create, trt, kind, log.logger) for kind in CREATED]
    if find_spec("cuda") is not None:
        calls.append(cuda.compute_capability)
    for call in calls:
        try:
            call()
        except VilaDeployError as error:
            print(error)


if __name__ == "__main__":
    main()
