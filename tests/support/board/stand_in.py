"""TensorRT's objects on a stand-in device: compiling copies a graph, onnxruntime runs it."""

from __future__ import annotations

import ctypes
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.support.board.onnx_server import OnnxServer
from tests.support.fake_cuda import FakeCuda

TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64"}
FILES = ("model.onnx", "model.data")


class Builder:
    def __init__(self, logger: Any):
        pass

    def create_network(self, flags: int) -> Any:
        return SimpleNamespace(flags=flags, graph=None)

    def create_builder_config(self) -> Any:
        return Config()

    def build_serialized_network(self, network: Any, config: Any) -> bytes:
        monitor = config.progress_monitor
        monitor.phase_start("Building", None, 1)
        assert monitor.step_complete("Building", 0)
        parts = [network.graph.with_name(name).read_bytes() for name in FILES]
        header = {"profiles": config.profiles, "sizes": [len(part) for part in parts]}
        return b"\n".join([json.dumps(header).encode(), b"".join(parts)])

    def build_serialized_network_to_stream(self, network: Any, config: Any, writer: Any) -> bool:
        writer.write(memoryview(self.build_serialized_network(network, config)))
        return True


class Config:
    def __init__(self) -> None:
        self.profiles = 0
        self.progress_monitor: Any = None

    def add_optimization_profile(self, profile: Any) -> int:
        self.profiles += 1
        return self.profiles - 1

    def get_timing_cache(self) -> Any:
        return SimpleNamespace(serialize=lambda: b"times")


class OnnxParser:
    def __init__(self, network: Any, logger: Any):
        self.network = network

    def parse_from_file(self, path: str) -> bool:
        self.network.graph = Path(path)
        return True


def runtime(gpu: FakeCuda, server: OnnxServer) -> Callable[[Any], Any]:
    """Return what stands in for trt.Runtime."""
    return lambda logger: SimpleNamespace(
        deserialize_cuda_engine=lambda plan: Engine(gpu, server, bytes(plan))
    )


class Engine:
    def __init__(self, gpu: FakeCuda, server: OnnxServer, plan: bytes):
        header, _, rest = plan.partition(b"\n")
        facts = json.loads(header)
        self._folder = tempfile.TemporaryDirectory()
        for name, size in zip(FILES, facts["sizes"], strict=True):
            Path(self._folder.name, name).write_bytes(rest[:size])
            rest = rest[size:]
        self.path, self.gpu, self.server = str(Path(self._folder.name, FILES[0])), gpu, server
        (self.values, self.inputs), _ = server.ask(self.path, {})
        self.num_optimization_profiles = facts["profiles"]
        self.num_io_tensors = len(self.values)

    def get_tensor_name(self, index: int) -> str:
        return str(self.values[index][0])

    def create_execution_context(self, strategy: Any) -> Context:
        return Context(self)


class Context:
    def __init__(self, engine: Engine):
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        (first,) = (shape[0] for shape in self.shapes.values())
        (shape,) = (shape for known, _, shape in self.engine.values if known == name)
        return (first, *shape[1:])

    def execute_async_v3(self, stream: int) -> bool:
        recorded = self.engine.gpu.recorded
        if recorded is None:
            self._run()
        else:
            recorded.append(self._run)
        return True

    def _run(self) -> None:
        feeds = {}
        for name, kind, _ in self.engine.values[: self.engine.inputs]:
            shape, dtype = self.shapes[name], np.dtype(TYPES[kind])
            raw = (ctypes.c_byte * (int(np.prod(shape)) * dtype.itemsize)).from_address(
                self.addresses[name]
            )
            feeds[name] = np.frombuffer(raw, dtype).reshape(shape)
        _, outputs = self.engine.server.ask(self.engine.path, feeds)
        for name, array in outputs.items():
            ctypes.memmove(self.addresses[name], array.tobytes(), array.nbytes)
