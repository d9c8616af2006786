"""A TensorRT whose engines are ONNX files run by onnxruntime, on a CUDA runtime in host memory.

With them the real Session and its copies run on any computer.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from tests.support.fake_cuda import FakeCuda
from vila_deploy.backends.tensorrt import compilers, cuda

TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
}


ON_PROFILE_CHANGE, USER_MANAGED = "memory for a profile", "memory of the caller"
ACTIVATION_BYTES = 4096


class FakeContext:
    def __init__(self, engine: FakeEngine):
        self.engine, self.gpu, self.session = engine, engine.gpu, engine.session
        self.profile, self.profiles = 0, engine.num_optimization_profiles
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.lengths: list[int] = []
        self.memory: tuple[int, int] | None = None

    def set_device_memory(self, address: int, size: int) -> None:
        self.memory = address, size

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if (self.profile, self.profiles, name) == (0, 2, "positions") and shape[1] != 1:
            return False
        self.shapes[name] = shape
        if name == "positions":
            self.lengths.append(shape[1])
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        (first,) = (shape[0] for shape in self.shapes.values())
        (output,) = (o for o in self.session.get_outputs() if o.name == name)
        return (first, *output.shape[1:])

    def execute_async_v3(self, stream: int) -> bool:
        if isinstance(self.engine, FakeRtxEngine):
            assert self.memory is not None
            assert self.memory[0] in self.gpu.memory
        if self.gpu.recorded is not None:
            self.gpu.recorded.append(self._run)
        else:
            self._run()
        return True

    def _run(self) -> None:
        feeds = {}
        for value in self.session.get_inputs():
            dtype, shape = np.dtype(TYPES[value.type]), self.shapes[value.name]
            size = int(np.prod(shape)) * dtype.itemsize
            raw = (ctypes.c_byte * size).from_address(self.addresses[value.name])
            feeds[value.name] = np.frombuffer(raw, dtype).reshape(shape)
        names = [output.name for output in self.session.get_outputs()]
        for name, array in zip(names, self.session.run(names, feeds), strict=True):
            ctypes.memmove(
                self.addresses[name], np.ascontiguousarray(array).ctypes.data, array.nbytes
            )


class FakeEngine:
    num_optimization_profiles = 2

    def __init__(self, gpu: FakeCuda, graph: Path):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        # Otherwise onnxruntime would round activations to int8, which no GPU engine does.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        providers = ["CPUExecutionProvider"]
        self.gpu, self.captures = gpu, list[int | None]()
        self.contexts: list[FakeContext] = []
        self.session = onnxruntime.InferenceSession(graph, options, providers=providers)
        self.tensors = [v.name for v in (*self.session.get_inputs(), *self.session.get_outputs())]

    @property
    def num_io_tensors(self) -> int:
        return len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return self.tensors[index]

    def create_execution_context(self, how: Any) -> FakeContext:
        assert (how == ON_PROFILE_CHANGE) == (type(self) is FakeEngine)
        self.captures.append(getattr(how, "cuda_graph_strategy", None))
        self.contexts.append(FakeContext(self))
        return self.contexts[-1]


class FakeRtxEngine(FakeEngine):
    num_optimization_profiles = 1
    device_memory_size_v2 = ACTIVATION_BYTES
    strategy = None

    def take(self, strategy: str) -> None:
        self.strategy = strategy

    def create_runtime_config(self) -> Any:
        cache = SimpleNamespace(deserialize=lambda data: True, serialize=lambda: b"kernels")
        return SimpleNamespace(
            create_runtime_cache=lambda: cache,
            set_runtime_cache=lambda cache: None,
            set_execution_context_allocation_strategy=self.take,
            cuda_graph_strategy=0,
        )


class FakeLogger:
    ERROR, INTERNAL_ERROR = "ERROR", "INTERNAL_ERROR"


def install(
    monkeypatch: pytest.MonkeyPatch, package: str, version: str, capability: str
) -> FakeCuda:
    """Puts both in the place of the real ones; a plan is then the path of an ONNX file."""
    gpu = FakeCuda(capability)
    kind = FakeRtxEngine if package == "tensorrt-rtx" else FakeEngine

    class Runtime:
        def __init__(self, logger: Any):
            pass

        def deserialize_cuda_engine(self, plan: Any) -> FakeEngine:
            return kind(gpu, Path(bytes(plan).decode()))

    trt = SimpleNamespace(
        __version__=version,
        ILogger=FakeLogger,
        Runtime=Runtime,
        CudaGraphStrategy=SimpleNamespace(WHOLE_GRAPH_CAPTURE=1),
        ExecutionContextAllocationStrategy=SimpleNamespace(
            ON_PROFILE_CHANGE=ON_PROFILE_CHANGE, USER_MANAGED=USER_MANAGED
        ),
    )
    monkeypatch.setattr(cuda, "runtime", lambda: gpu)
    monkeypatch.setattr(compilers.Compiler, "load", lambda self: trt)
    return gpu
