"""Compile an ONNX graph into a TensorRT engine, with bounded memory and visible progress."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vila_deploy.backends.tensorrt.compilers import Compiler, compute_capability_member, create
from vila_deploy.backends.tensorrt.log import ErrorLog
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.progress import Advance

# Smallest, usual and largest shape of each input.
Profile = dict[str, tuple[Sequence[int], Sequence[int], Sequence[int]]]


@dataclass(frozen=True)
class Job:
    """A graph to compile, and the GPU and shapes to compile it for.

    Args:
        graph: ONNX file, with its weights in the same folder.
        plan: file to write.
        profiles: ranges of shapes of the engine, one execution context each.
        capability: compute capability to compile for; None means this computer's GPU.
        timing_cache: file with measured times of kernels, for compilation on the device.
        interrupted: signals received while the compiler ran.
        stopped_by: exceptions raised in the compiler's callbacks.
    """

    graph: Path
    plan: Path
    profiles: Sequence[Profile]
    capability: str | None
    timing_cache: Path | None = None
    workspace_bytes: int | None = None
    interrupted: list[int] = field(default_factory=list)
    stopped_by: list[Exception] = field(default_factory=list)

    def guarded(self, call: Callable[[], Any], otherwise: Any = None) -> Any:
        """Return the result of `call`; on an exception note it and return `otherwise`.

        An exception that passes through the compiler's code would end the program or be lost.
        """
        try:
            return call()
        except Exception as error:
            self.stopped_by.append(error)
            return otherwise


def compile_graph(compiler: Compiler, job: Job, advance: Advance) -> None:
    """Write `job.plan`; the file is incomplete until this returns.

    Raises:
        VilaDeployError: the compiler refuses the graph; the message quotes its first error.
    """
    trt = compiler.load()
    log = ErrorLog(trt)
    builder = create(trt, "Builder", log.logger)
    builder.max_threads = len(os.sched_getaffinity(0))
    network = builder.create_network(_strongly_typed(trt))
    parser = create(trt, "OnnxParser", network, log.logger)
    advance(f"{job.graph.parent.name}: reading the graph", steps=0)
    if not parser.parse_from_file(str(job.graph)):
        first = parser.get_error(0).desc() if parser.num_errors else "no reason given"
        raise _refused(compiler, trt, job, log.first(first))
    config = _config(trt, builder, job, advance)
    with _interrupts_wait(job):
        done = _write_plan(trt, builder, network, config, job)
    if not done:
        raise _refused(compiler, trt, job, log.first("no reason given"))
    _save_timing_cache(config, job)


def _config(trt: Any, builder: Any, job: Job, advance: Advance) -> Any:
    config = builder.create_builder_config()
    for profile in job.profiles:
        shapes = builder.create_optimization_profile()
        for name, (smallest, usual, largest) in profile.items():
            shapes.set_shape(name, tuple(smallest), tuple(usual), tuple(largest))
        if config.add_optimization_profile(shapes) < 0:
            raise VilaDeployError(
                f"TensorRT {trt.__version__} does not take its shapes {shapes_text(profile)}",
                where=job.graph,
                fix="build with a smaller --max-seq-len or --max-batch-size, or report this line",
            )
    if job.capability is not None:
        config.num_compute_capabilities = 1
        member = compute_capability_member(trt, job.capability)
        if not config.set_compute_capability(member, 0):
            raise VilaDeployError(
                f"TensorRT {trt.__version__} does not compile for compute capability "
                f"{job.capability}",
                where=job.graph,
                fix="use another --backend",
            )
    if job.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.workspace_bytes)
    if job.timing_cache is not None:
        earlier = job.timing_cache.read_bytes() if job.timing_cache.exists() else b""
        # A cache of another version is refused; an empty one replaces it.
        cache = config.create_timing_cache(earlier) or config.create_timing_cache(b"")
        if not (cache and config.set_timing_cache(cache, ignore_mismatch=False)):
            # It holds times of another GPU or driver: compile with an empty one.
            config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    config.progress_monitor = _monitor(trt, job, advance)
    return config


def _write_plan(trt: Any, builder: Any, network: Any, config: Any, job: Job) -> bool:
    """Compile to a stream where the package can, so that the full plan is never in memory.

    Returns:
        False if the compiler refuses the graph.
    """
    with job.plan.open("xb") as file:
        if hasattr(builder, "build_serialized_network_to_stream"):
            writer = _stream_writer(trt, file, job)
            done = builder.build_serialized_network_to_stream(network, config, writer)
        else:
            plan = builder.build_serialized_network(network, config)
            done = plan is not None
            if done:
                file.write(memoryview(plan))
    if job.stopped_by:
        raise job.stopped_by[0]
    return bool(done or job.interrupted)


def _save_timing_cache(config: Any, job: Job) -> None:
    """Keep the kernels' times for the next graph; without them it only compiles longer."""
    cache = None if job.timing_cache is None else config.get_timing_cache()
    times = None if cache is None else cache.serialize()
    if job.timing_cache is None or times is None:
        return
    partial = job.timing_cache.with_name(f"{job.timing_cache.name}.partial")
    try:
        partial.write_bytes(memoryview(times))
        partial.replace(job.timing_cache)
    except OSError:
        # The engine itself is complete.
        partial.unlink(missing_ok=True)


def shapes_text(profile: Profile) -> str:
    """Return a profile's largest shapes in words."""
    return ", ".join(f"{name} {list(largest)}" for name, (_, _, largest) in profile.items())


def _strongly_typed(trt: Any) -> int:
    """Return the flag for types as in the graph; from TensorRT 11 on they always are."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _refused(compiler: Compiler, trt: Any, job: Job, reason: str) -> VilaDeployError:
    return VilaDeployError(
        f"{compiler.package} {trt.__version__} can't compile it ({reason})",
        where=job.graph,
        fix="use another --backend, or report this line",
    )


@contextmanager
def _interrupts_wait(job: Job) -> Iterator[None]:
    """Note SIGINT and SIGTERM while the compiler runs, and raise the first one afterwards.

    Python would raise within the compiler's calls, which swallow the exception.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in handlers:
        signal.signal(number, lambda number, frame: job.interrupted.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for received in job.interrupted[:1]:
        signal.raise_signal(received)


def _stream_writer(trt: Any, file: Any, job: Job) -> Any:
    class Writer(trt.IStreamWriter):
        """Write the plan to a file."""

        def __init__(self) -> None:
            super().__init__()

        def write(self, data: Any) -> int:
            return job.guarded(lambda: file.write(data), otherwise=0)

    return Writer()


def _monitor(trt: Any, job: Job, advance: Advance) -> Any:
    graph = job.graph.parent.name

    class Monitor(trt.IProgressMonitor):
        """Show the compiler's phase; an interrupt stops it at the next step."""

        def __init__(self) -> None:
            super().__init__()

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            if parent is None:
                job.guarded(lambda: advance(f"{graph}: {name.lower()}", steps=0))

        def step_complete(self, name: str, step: int) -> bool:
            return not (job.stopped_by or job.interrupted)

        def phase_finish(self, name: str) -> None:
            pass

    return Monitor()
