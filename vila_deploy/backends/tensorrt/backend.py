"""Backend tensorrt: engines compiled anywhere (tensorrt-rtx) or on the device (tensorrt)."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vila_deploy.backends.base import Backend
from vila_deploy.backends.tensorrt import files
from vila_deploy.backends.tensorrt.compile_worker import CompileWorker, compile_module
from vila_deploy.backends.tensorrt.compilers import COMPILERS, Compiler, host_platform
from vila_deploy.backends.tensorrt.memory import (
    compile_warnings,
    compiler_memory_bytes,
    contiguous_block,
    estimate_memory,
    max_matrix_bytes,
)
from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.weight_source import ModelWeights
from vila_deploy.engine.build_request import BuildRequest, BuildResult
from vila_deploy.engine.manifest import Manifest, PendingStep
from vila_deploy.engine.memory import MemoryEstimate
from vila_deploy.engine.session import Session
from vila_deploy.engine.target import Target, get_target
from vila_deploy.formats.module_dtypes import FP16, INT4, INT8, head_group_size
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.estimates import available_memory_bytes
from vila_deploy.utils.files import canonical_json, read_json_object
from vila_deploy.utils.progress import progress

RTX = "tensorrt-rtx"
# Why a package has no other dtype than fp16.
REASONS: Mapping[tuple[str, str], str] = {
    ("tensorrt", "vision"): "it keeps weights in int8 only where activations are int8 too, and "
    "those would have to be calibrated",
    (RTX, "kv_cache"): "its operator that updates a cache in place takes floats only",
    ("tensorrt", "kv_cache"): "it would widen the whole cache in every step",
}


class TensorRtBackend(Backend):
    """Implements `Backend`; pending steps are the modules to compile: vision, projector, llm."""

    name = "tensorrt"
    max_batch_size = 64

    def title(self, target: Target) -> str:
        return self.name if target.tensorrt is None else target.tensorrt.package

    def check_alias(self, alias: str, target: Target) -> None:
        """Raise unless the engines of `target` come from the package called `alias`."""
        if target.tensorrt is not None and target.tensorrt.package == alias:
            return
        raise VilaDeployError(
            f"{alias} compiles for compute capability "
            f"{', '.join(COMPILERS[alias].ahead_of_time)}, not for "
            f"{target.compute_capability or 'a CPU'} of {target.title}",
            fix=f"use --backend {' or '.join(target.backends)}",
        )

    def check_model(self, config: VilaConfig, request: BuildRequest) -> None:
        compiler = compiler_of(request.target)
        _check_jetpack(request)
        sizes, quantization = compiler.group_sizes, config.llm.quantization
        if quantization is not None and quantization.group_size not in sizes:
            raise VilaDeployError(
                f"group size {quantization.group_size} is not one of "
                f"{', '.join(map(str, sizes))}, which {compiler.package} has",
                where="llm/config.json: quantization_config.group_size",
                fix="run vila-quantize with one of these as --group-size",
            )
        hidden_size, lm_head = config.llm.hidden_size, request.module_precision.lm_head
        if lm_head != FP16 and head_group_size(hidden_size) not in sizes:
            raise VilaDeployError(
                f"the model's hidden size {hidden_size} has no groups of "
                f"{' or '.join(map(str, sizes))}, which {compiler.package} has",
                where="--lm-head",
                fix="leave --lm-head out",
            )

    def check_tools(self, request: BuildRequest) -> None:
        compiler = compiler_of(request.target)
        if compiler.ahead_of_time:
            compiler.check_dialect(dialect_of(request))

    def notes(self, request: BuildRequest) -> Sequence[str]:
        compiler, capability = compiler_of(request.target), request.target.compute_capability
        if capability not in compiler.undocumented:
            return ()
        others = [name for name in request.target.backends if name != self.name]
        return (
            f"{compiler.package} compiles for {request.target.title}, but NVIDIA's support tables "
            f"do not list compute capability {capability}; supported there: --backend "
            f"{' or '.join(others)}",
        )

    def supported_dtypes(self, target: Target) -> Mapping[str, Sequence[str]]:
        head = {"lm_head": (INT8, INT4)}
        return {"vision": (INT8,), **head} if self.title(target) == RTX else head

    def unsupported_reason(self, target: Target, module: str) -> str:
        return REASONS.get((self.title(target), module), "")

    def estimate_memory(
        self, config: VilaConfig, request: BuildRequest, precision: str, limit_bytes: int
    ) -> MemoryEstimate:
        return estimate_memory(config, request, precision, limit_bytes)

    def build(
        self,
        folder: Path,
        config: VilaConfig,
        weights: ModelWeights,
        request: BuildRequest,
    ) -> BuildResult:
        """Write the graphs module by module, and compile each at once where this computer can.

        Memory for one layer while graphs are written, then what the compiler takes; modules for
        which this computer has too little are left for another.
        """
        from importlib.metadata import version

        from vila_deploy.backends.tensorrt import graphs

        compiler, dialect = compiler_of(request.target), dialect_of(request)
        modules, dtypes = graphs.modules_of(config), request.module_precision
        write_description(folder, config, request)
        versions = {"onnx": version("onnx")}
        steps = graphs.graph_steps(config) + len(modules) * bool(compiler.ahead_of_time)
        with progress(steps, "building") as advance, ExitStack() as stack:
            llm, tower, projector = weights
            vision, largest = dtypes.vision, max_matrix_bytes(request.target)
            graphs.write_vision(folder, config, tower, projector, dialect, advance, vision, largest)
            here = _compiled_here(folder, modules[:-1], compiler)
            workers = [stack.enter_context(CompileWorker(folder, module)) for module in here]
            weight_bytes = graphs.write_llm(
                folder, config, llm, request.limits.max_seq_len, dialect, advance, dtypes.lm_head,
                decomposable=not compiler.ahead_of_time, max_matrix_bytes=largest,
            )  # fmt: skip
            # Before the LLM's, or the memory of two compilers would add up.
            for module, worker in zip(here, workers, strict=True):
                advance(f"{module}: compiling", steps=0)
                versions |= worker.versions()
                advance(f"{module}: compiled")
                _remove_graph(folder, module)
            for module in _compiled_here(folder, modules[-1:], compiler):
                versions |= compile_module(folder, module, advance)
                _remove_graph(folder, module)
        pending = [module for module in modules if not (folder / module / files.PLAN).exists()]
        return BuildResult(weight_bytes, versions, tuple(map(_step, pending)))

    def evaluated_dialect(self, request: BuildRequest) -> str:
        return dialect_of(request)

    def finish_location(self, manifest: Manifest) -> str:
        anywhere = compiler_of(get_target(manifest.target)).ahead_of_time
        return "a computer with more memory" if anywhere else "the device"

    def unfinishable_reason(self, target: Target) -> str:
        compiler = compiler_of(target)
        if compiler.ahead_of_time:
            return ""
        if host_platform() != target.host:
            return f"TensorRT compiles it on {target.host}, this is {host_platform()}"
        compiler.load()
        return ""

    def check_device(self, folder: Path, manifest: Manifest) -> None:
        target = get_target(manifest.target)
        compiler = compiler_of(target)
        if compiler.ahead_of_time:
            _check_memory(folder, manifest, compiler)
            return
        if host_platform() != target.host:
            raise VilaDeployError(
                f"TensorRT engines for {target.title} are compiled on {target.host}, this is "
                f"{host_platform()}",
                fix="copy the engine folder to the device and run the same command there",
            )
        compiler.load()
        # Only now, since nothing else of a build needs a GPU.
        from vila_deploy.backends.tensorrt.cuda import compute_capability

        found = compute_capability()
        if found != target.compute_capability:
            raise VilaDeployError(
                f"was begun for compute capability {target.compute_capability} ({target.title}), "
                f"this GPU has {found}",
                fix="run this on the device, or build again with its own --target",
            )
        _warn_of_memory(folder, manifest, target)

    def artifacts(self, step: PendingStep) -> Sequence[str]:
        return (f"{step.id}/{files.PLAN}",)

    def finish_step(self, folder: Path, manifest: Manifest, step: PendingStep) -> Mapping[str, str]:
        with progress(1, "compiling") as advance:
            return compile_module(folder, step.id, advance)

    def intermediates(self, folder: Path, step: PendingStep) -> Sequence[str]:
        last = (files.TRTEXEC,) if step.id == files.LLM else ()
        return (*_graph_files(step.id), *last)

    def open(self, folder: Path, manifest: Manifest, slots: int = 1) -> Session:
        from vila_deploy.backends.tensorrt import open_session

        return open_session(folder, manifest)

    def gpu_name(self) -> str | None:
        from vila_deploy.backends.tensorrt import cuda

        name: bytes = cuda.call("cudaGetDeviceProperties", 0).name
        return name.partition(b"\0")[0].decode("utf-8", "replace")


def compiler_of(target: Target) -> Compiler:
    """Return the TensorRT package that makes the engines of a target.

    Raises:
        VilaDeployError: none does, or not for its compute capability.
    """
    if target.tensorrt is None:
        raise VilaDeployError(
            f"target {target.name} has no TensorRT",
            fix=f"use --backend {target.default_backend}",
        )
    compiler = COMPILERS[target.tensorrt.package]
    if compiler.ahead_of_time and target.compute_capability not in compiler.ahead_of_time:
        others = [name for name in target.backends if name != "tensorrt"]
        raise VilaDeployError(
            f"{compiler.package} compiles for compute capability "
            f"{', '.join(compiler.ahead_of_time)}, not for {target.compute_capability} of "
            f"{target.title}",
            fix=f"use --backend {' or '.join(others)}",
        )
    return compiler


def dialect_of(request: BuildRequest) -> str:
    """Return the dialect of the graphs that TensorRT reads on the target."""
    assert request.target.tensorrt is not None
    return request.target.tensorrt.dialect_of(_jetpack(request))


def write_description(folder: Path, config: VilaConfig, request: BuildRequest) -> None:
    """Write what compiling needs besides the graphs: on the device there is no checkpoint."""
    from vila_deploy.backends.tensorrt import graphs, trtexec

    compiler = compiler_of(request.target)
    ahead = bool(compiler.ahead_of_time)
    content: dict[str, Any] = {
        "package": compiler.package,
        "compute_capability": request.target.compute_capability,
        "dialect": dialect_of(request),
        "jetpack": _jetpack(request),
        "limits": asdict(request.limits),
        "profiles": graphs.profiles(config, request.limits, one_for_all=ahead),
    }
    block = contiguous_block(config, "int4" if config.llm.quantization else FP16, request)
    if block is not None:
        content["contiguous_bytes"] = block.memory_bytes
    (folder / files.DESCRIPTION).write_text(canonical_json(content), "utf-8")
    if not ahead:
        (folder / files.TRTEXEC).write_text(trtexec.script(content["profiles"]), "utf-8")


def _compiled_here(folder: Path, modules: Sequence[str], compiler: Compiler) -> list[str]:
    """Those of `modules` whose engines can be made on this computer."""
    if not compiler.ahead_of_time:
        return []
    room = available_memory_bytes()
    return [module for module in modules if _compiler_bytes(folder, module, compiler) <= room]


def _compiler_bytes(folder: Path, module: str, compiler: Compiler) -> int:
    weights = (folder / module / files.WEIGHTS).stat().st_size
    return compiler_memory_bytes(compiler.package, weights)


def _check_memory(folder: Path, manifest: Manifest, compiler: Compiler) -> None:
    """Raise if memory is short, the only reason why engines for any GPU are left."""
    needed = max(_compiler_bytes(folder, step.id, compiler) for step in manifest.pending_steps)
    room = available_memory_bytes()
    if needed > room:
        raise VilaDeployError(
            f"compiling takes about {needed / 1e9:.1f} GB of memory, {room / 1e9:.1f} GB are "
            "available",
            where=folder,
            fix="close other programs, or copy the folder to a computer that has it and run the "
            "same command there",
        )


def _warn_of_memory(folder: Path, manifest: Manifest, target: Target) -> None:
    """Say so where this board has less memory than compiling asks for."""
    described = read_json_object(folder / files.DESCRIPTION)
    sizes = ((folder / step.id / files.WEIGHTS).stat().st_size for step in manifest.pending_steps)
    block_bytes = described.get("contiguous_bytes")
    for warning in compile_warnings(target.title, max(sizes), block_bytes):
        print(f"warning: {warning}", file=sys.stderr)


def _step(module: str) -> PendingStep:
    return PendingStep(module, f"compile {module}/{files.GRAPH} with TensorRT")


def _graph_files(module: str) -> tuple[str, ...]:
    return tuple(f"{module}/{name}" for name in (files.GRAPH, files.WEIGHTS))


def _remove_graph(folder: Path, module: str) -> None:
    for path in _graph_files(module):
        (folder / path).unlink()


def _jetpack(request: BuildRequest) -> str | None:
    assert request.target.tensorrt is not None
    return request.jetpack or next(iter(request.target.tensorrt.jetpacks), None)


def _check_jetpack(request: BuildRequest) -> None:
    assert request.target.tensorrt is not None
    known = request.target.tensorrt.jetpacks
    if request.jetpack is None or request.jetpack in known:
        return
    if not known:
        raise VilaDeployError(
            f"--jetpack is for Jetson, not for {request.target.title}", fix="leave it out"
        )
    raise VilaDeployError(
        f"--jetpack {request.jetpack} is unknown for {request.target.title}",
        fix=f"choose from {', '.join(known)}",
    )


BACKEND = TensorRtBackend()
