"""One compiled TensorRT engine, loaded and run, whichever package made it."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vila_deploy.backends.tensorrt.cuda import Stream
from vila_deploy.backends.tensorrt.log import ErrorLog
from vila_deploy.utils.errors import VilaDeployError


class Engine:
    """An engine in memory of the GPU.

    Args:
        plan: what the compiler wrote.
        cache: file of kernels that tensorrt-rtx has made for this very GPU; read if it is there.
            Other packages have none.
    """

    def __init__(self, trt: Any, plan: Path, cache: Path | None = None):
        self._trt, self._cache_file = trt, cache
        self._log = ErrorLog(trt)
        self._runtime = trt.Runtime(self._log.logger)
        with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
            engine = self._runtime.deserialize_cuda_engine(whole)
        if engine is None:
            raise VilaDeployError(
                f"TensorRT {trt.__version__} can't load it ({self._log.first('no reason')})",
                where=plan,
                fix="close other programs on this GPU, or build the engine again",
            )
        self.engine, self._plan = engine, plan
        self._config = self._runtime_config()

    @property
    def names(self) -> list[str]:
        """Names of all inputs and outputs."""
        return [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]

    @property
    def captures_graphs(self) -> bool:
        """Whether the package makes CUDA graphs by itself."""
        return self._config is not None

    def context(self, profile: int, stream: Stream, *, captured: bool = False) -> Any:
        """A new execution context for shapes of one profile; -1 is the last one.

        Args:
            captured: it runs with the same shapes and addresses each time, so as a CUDA graph if
                the package makes them; others would be captured anew for each shape.

        Raises:
            VilaDeployError: mostly too little memory.
        """
        # Memory for the shapes of that profile; by default it would be that of the largest.
        how = self._config
        if how is None:
            how = self._trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        else:
            captures = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            how.cuda_graph_strategy = captures if captured else self._captures_nothing
        index = profile % self.engine.num_optimization_profiles
        try:
            made = self.engine.create_execution_context(how)
            ready = made is not None and made.set_optimization_profile_async(index, int(stream))
        except RuntimeError:
            ready = False
        if not ready:
            raise self._failed("can't prepare it")
        return made

    def bind(self, context: Any, addresses: Mapping[str, int]) -> None:
        """Where each input and output lies in memory of the GPU."""
        for name, address in addresses.items():
            if not context.set_tensor_address(name, address):
                raise self._failed(f"can't bind {name}")

    def shape(self, context: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Shapes of the inputs for the next runs."""
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise self._failed(f"does not take {name} of shape {list(shape)}")

    def run(self, context: Any, stream: Stream) -> None:
        """Puts one pass on the stream."""
        if not context.execute_async_v3(int(stream)):
            raise self._failed("can't run it")

    def close(self) -> None:
        """Frees everything; kernels made on the way stay beside the engine for the next time."""
        self._save_cache()
        self._config = self.engine = self._runtime = None

    def _runtime_config(self) -> Any:
        if not hasattr(self.engine, "create_runtime_config"):
            return None
        config = self.engine.create_runtime_config()
        if not hasattr(config, "create_runtime_cache"):
            return None
        self._cache = config.create_runtime_cache()
        if self._cache_file is not None and self._cache_file.exists():
            # One of another driver or version is refused, and then made anew.
            self._cache.deserialize(self._cache_file.read_bytes())
        config.set_runtime_cache(self._cache)
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

    def _failed(self, what: str) -> VilaDeployError:
        return VilaDeployError(
            f"TensorRT {self._trt.__version__} {what} ({self._log.last('no reason given')})",
            where=self._plan,
            fix="close other programs on this GPU, or build with a smaller --max-seq-len",
        )
