"""Load and run a compiled TensorRT engine of either package."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vila_deploy.backends.tensorrt.compilers import create
from vila_deploy.backends.tensorrt.cuda import Buffer, Stream
from vila_deploy.backends.tensorrt.log import ErrorLog
from vila_deploy.utils.errors import VilaDeployError


class CudaEngine:
    """An engine in GPU memory, TensorRT's ICudaEngine, with its runtime.

    Args:
        plan: file that the compiler wrote.
        cache: file of the kernels that tensorrt-rtx has compiled for this GPU; read if it exists.
            Package tensorrt has none.
    """

    def __init__(self, trt: Any, plan: Path, cache: Path | None = None):
        self._trt, self._cache_file = trt, cache
        self._log = ErrorLog(trt)
        self._runtime = create(trt, "Runtime", self._log.logger)
        with (
            plan.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            engine = self._runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise VilaDeployError(
                f"TensorRT {trt.__version__} can't load it ({self._log.first('no reason')})",
                where=plan,
                fix="close other programs on this GPU, or build the engine again",
            )
        self.engine, self._plan = engine, plan
        self._config = self._runtime_config()
        # Activations of all contexts of an engine of tensorrt-rtx, which never run at once.
        self._activations: Buffer | None = None

    @property
    def names(self) -> list[str]:
        """Return the names of all inputs and outputs."""
        return [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]

    @property
    def captures_cuda_graphs(self) -> bool:
        """Return whether the package captures CUDA graphs by itself."""
        return self._config is not None

    @property
    def compiles_for_each_shape(self) -> bool:
        """Return whether the package makes kernels for each shape that it meets."""
        return self._config is not None

    def context(self, profile: int, stream: Stream, *, captured: bool = False) -> Any:
        """Return a new execution context for the shapes of one profile; -1 is the last one.

        Args:
            captured: let the package run it as a CUDA graph. Only for a context whose shapes and
                addresses never change: each change would capture the graph again.

        Raises:
            VilaDeployError: TensorRT can't make it, in most cases for want of memory.
        """
        # Allocate for the shapes of this profile, not of the largest one.
        strategy = self._config
        if strategy is None:
            strategy = self._trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        else:
            captures = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            strategy.cuda_graph_strategy = captures if captured else self._captures_nothing
        index = profile % self.engine.num_optimization_profiles
        try:
            context = self.engine.create_execution_context(strategy)
            ready = context is not None and context.set_optimization_profile_async(
                index, int(stream)
            )
            if ready and self._config is not None:
                activations = self._shared_activations()
                context.set_device_memory(activations.address, activations.size_bytes)
        except RuntimeError:
            ready = False
        if not ready:
            raise self._failed("can't prepare it")
        return context

    def bind(self, context: Any, addresses: Mapping[str, int]) -> None:
        """Set the GPU addresses of inputs and outputs."""
        for name, address in addresses.items():
            if not context.set_tensor_address(name, address):
                raise self._failed(f"can't bind {name}")

    def shape(self, context: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Set the shapes of inputs for the next runs."""
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise self._failed(f"does not take {name} of shape {list(shape)}")

    def run(self, context: Any, stream: Stream) -> None:
        """Enqueue one pass on the stream."""
        if not context.execute_async_v3(int(stream)):
            raise self._failed("can't run it")

    def close(self) -> None:
        """Free the engine; kernels compiled on this GPU are saved beside it for the next start."""
        self._save_cache()
        self._config = self.engine = self._runtime = None
        if self._activations is not None:
            self._activations.close()
            self._activations = None

    def _shared_activations(self) -> Buffer:
        if self._activations is None:
            self._activations = Buffer(max(1, self.engine.device_memory_size_v2))
        return self._activations

    def _runtime_config(self) -> Any:
        if not hasattr(self.engine, "create_runtime_config"):
            return None
        config = self.engine.create_runtime_config()
        if not hasattr(config, "create_runtime_cache"):
            return None
        self._cache = config.create_runtime_cache()
        if self._cache_file is not None and self._cache_file.exists():
            # A cache of another driver or version is refused, and replaced when this engine closes.
            self._cache.deserialize(self._cache_file.read_bytes())
        config.set_runtime_cache(self._cache)
        # Otherwise each context allocates the activations of the longest chunk for itself.
        strategies = self._trt.ExecutionContextAllocationStrategy
        config.set_execution_context_allocation_strategy(strategies.USER_MANAGED)
        self._captures_nothing = config.cuda_graph_strategy
        return config

    def _save_cache(self) -> None:
        if self._config is None or self._cache_file is None:
            return
        kernels = self._cache.serialize()
        if kernels is None:
            return
        partial = self._cache_file.with_name(f"{self._cache_file.name}.partial")
        try:
            partial.write_bytes(memoryview(kernels))
            partial.replace(self._cache_file)
        except OSError:
            # A read-only engine folder only costs time at the next start.
            partial.unlink(missing_ok=True)

    def _failed(self, problem: str) -> VilaDeployError:
        return VilaDeployError(
            f"TensorRT {self._trt.__version__} {problem} ({self._log.last('no reason given')})",
            where=self._plan,
            fix="close other programs on this GPU, or build with a smaller --max-seq-len",
        )
