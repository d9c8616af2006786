"""Compiles one ONNX graph into one TensorRT engine, with bounded memory and visible progress."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vila_deploy.backends.tensorrt.compilers import Compiler, compute_capability_member
from vila_deploy.backends.tensorrt.log import ErrorLog
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.progress import Advance

# inputs by name: least, usual and largest shape
Profile = dict[str, tuple[Sequence[int], Sequence[int], Sequence[int]]]


@dataclass(frozen=True)
class Job:
    """One graph and what its engine is for.

    Args:
        graph: ONNX file, its weights beside it.
        plan: file to write.
        profiles: ranges of shapes that the engine is made for, one execution context each.
        capability: what to compile for; None means this computer's GPU.
        timing_cache: file that remembers how fast kernels were, for compilers on the device.
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
        """What `call` returns; an exception waits until the compiler has ended.

        Thrown through the compiler's own code it would end the program, or be lost.
        """
        try:
            return call()
        except Exception as error:
            self.stopped_by.append(error)
            return otherwise


def compile_graph(compiler: Compiler, job: Job, advance: Advance) -> None:
    """Writes `job.plan`; the file is incomplete until this returns.

    Raises:
        VilaDeployError: the compiler refuses the graph; the message has its own first words.
    """
    trt = compiler.load()
    log = ErrorLog(trt)
    builder = trt.Builder(log.logger)
    builder.max_threads = len(os.sched_getaffinity(0))
    network = builder.create_network(_strongly_typed(trt))
    parser = trt.OnnxParser(network, log.logger)
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
        for name, (least, usual, largest) in profile.items():
            shapes.set_shape(name, tuple(least), tuple(usual), tuple(largest))
        config.add_optimization_profile(shapes)
    if job.capability is not None:
        config.num_compute_capabilities = 1
        member = compute_capability_member(trt, job.capability)
        config.set_compute_capability(member, 0)
    if job.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.workspace_bytes)
    if job.timing_cache is not None:
        known = job.timing_cache.read_bytes() if job.timing_cache.exists() else b""
        # One that it can't read is made anew.
        cache = config.create_timing_cache(known) or config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    config.progress_monitor = _monitor(trt, job, advance)
    return config


def _write_plan(trt: Any, builder: Any, network: Any, config: Any, job: Job) -> bool:
    """Into a stream where the compiler can, so that the plan is never in memory as a whole.

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
    if job.timing_cache is not None:
        partial = job.timing_cache.with_name(f"{job.timing_cache.name}.partial")
        partial.write_bytes(memoryview(config.get_timing_cache().serialize()))
        partial.replace(job.timing_cache)


def _strongly_typed(trt: Any) -> int:
    """Types are those of the graph: always so from TensorRT 11 on, a flag before."""
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
    """Signals that end a program are noted while the compiler runs, and answered afterwards.

    Python would raise in the middle of the compiler's calls, which swallows the exception.
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
    for noted in job.interrupted[:1]:
        signal.raise_signal(noted)


def _stream_writer(trt: Any, file: Any, job: Job) -> Any:
    class Writer(trt.IStreamWriter):
        """Hands the plan on to a file."""

        def __init__(self) -> None:
            super().__init__()

        def write(self, data: Any) -> int:
            return job.guarded(lambda: file.write(data), otherwise=0)

    return Writer()


def _monitor(trt: Any, job: Job, advance: Advance) -> Any:
    part = job.graph.parent.name

    class Monitor(trt.IProgressMonitor):
        """Shows the phase that the compiler is in; an interrupt stops it at the next step."""

        def __init__(self) -> None:
            super().__init__()

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            if parent is None:
                job.guarded(lambda: advance(f"{part}: {name.lower()}", steps=0))

        def step_complete(self, name: str, step: int) -> bool:
            return not (job.stopped_by or job.interrupted)

        def phase_finish(self, name: str) -> None:
            pass

    return Monitor()
