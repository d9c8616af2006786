"""Makes the engines of backend tensorrt, or everything up to them where only the device can."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vila_deploy.backends.tensorrt import files
from vila_deploy.backends.tensorrt.compile import Job, compile_graph
from vila_deploy.backends.tensorrt.compile_worker import CompileWorker
from vila_deploy.backends.tensorrt.compilers import COMPILERS, Compiler, host_platform
from vila_deploy.builder.memory_plan import compiler_memory_bytes
from vila_deploy.engine.build_request import BuildRequest, Built
from vila_deploy.engine.manifest import Manifest
from vila_deploy.engine.target import Target, get_target
from vila_deploy.formats.module_dtypes import FP16, head_group_size
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.estimates import available_memory_bytes
from vila_deploy.utils.files import canonical_json, read_json_object
from vila_deploy.utils.progress import Advance, progress

if TYPE_CHECKING:
    from vila_deploy.checkpoint.config import VilaConfig
    from vila_deploy.checkpoint.weight_source import WeightSource

MAX_BATCH_SIZE = 64


def check(config: VilaConfig, request: BuildRequest) -> None:
    """Raises VilaDeployError if this backend can't build the model; before any work."""
    if request.gpus > 1:
        raise VilaDeployError(
            "backend tensorrt runs on one GPU, --tp and --pp are for several",
            fix="leave them out, or use --backend tensorrt-llm",
        )
    compiler = compiler_of(request.target)
    _check_jetpack(request)
    sizes = compiler.group_sizes
    group_size = config.llm.quantization.group_size if config.llm.quantization else None
    if group_size is not None and group_size not in sizes:
        raise VilaDeployError(
            f"group size {group_size} is not one of {', '.join(map(str, sizes))}, which "
            f"{compiler.package} has",
            where="llm/config.json: quantization_config.group_size",
            fix="run vila-quantize with one of these as --group-size",
        )
    if (
        request.module_precision.lm_head != FP16
        and head_group_size(config.llm.hidden_size) not in sizes
    ):
        raise VilaDeployError(
            f"the model's hidden size {config.llm.hidden_size} has no groups of "
            f"{' or '.join(map(str, sizes))}, which {compiler.package} has",
            where="--lm-head",
            fix="leave --lm-head out",
        )


def check_tools(request: BuildRequest) -> None:
    """Raises VilaDeployError if what compiles here is missing or too old."""
    compiler = compiler_of(request.target)
    if compiler.ahead_of_time:
        compiler.check_dialect(dialect_of(request))


def compiler_of(target: Target) -> Compiler:
    """What makes the engines of a target.

    Raises:
        VilaDeployError: nothing does, or not for its compute capability.
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


def build(
    folder: Path,
    config: VilaConfig,
    llm: WeightSource,
    tower: WeightSource,
    projector: WeightSource,
    request: BuildRequest,
) -> Built:
    """Writes the graphs part by part, and compiles each at once where this computer can.

    Memory for one layer while graphs are written, then what the compiler takes; parts for which
    this computer has too little are left for another.
    """
    from importlib.metadata import version

    from vila_deploy.backends.tensorrt import graphs

    check(config, request)
    compiler, dialect = compiler_of(request.target), dialect_of(request)
    parts = graphs.parts_of(config)
    write_description(folder, config, request)
    versions = {"onnx": version("onnx")}
    steps = graphs.graph_steps(config) + len(parts) * bool(compiler.ahead_of_time)
    with progress(steps, "building") as advance, ExitStack() as stack:
        vision = request.module_precision.vision
        graphs.write_vision(folder, config, tower, projector, dialect, advance, vision)
        here = _compiled_here(folder, parts[:-1], compiler)
        aside = [stack.enter_context(CompileWorker(folder, part)) for part in here]
        max_seq_len = request.limits.max_seq_len
        head = request.module_precision.lm_head
        weight_bytes = graphs.write_llm(
            folder, config, llm, max_seq_len, dialect, advance, head,
            decomposable=not compiler.ahead_of_time,
        )  # fmt: skip
        # Before the LLM's, or the memory of two compilers would add up.
        for part, compiling in zip(here, aside, strict=True):
            advance(f"{part}: compiling", steps=0)
            versions |= compiling.versions()
            advance(f"{part}: compiled")
            _clear(folder, part)
        for part in _compiled_here(folder, parts[-1:], compiler):
            versions |= compile_part(folder, part, advance)
            _clear(folder, part)
    left = (part for part in parts if not (folder / part / files.PLAN).exists())
    return Built(weight_bytes, versions, tuple(_need(part) for part in left))


def _compiled_here(folder: Path, parts: Sequence[str], compiler: Compiler) -> list[str]:
    """Those of `parts` whose engines can be made on this computer."""
    if not compiler.ahead_of_time:
        return []
    room = available_memory_bytes()
    return [part for part in parts if _compiler_memory_bytes(folder, part, compiler) <= room]


def _compiler_memory_bytes(folder: Path, part: str, compiler: Compiler) -> int:
    weights = (folder / part / files.WEIGHTS).stat().st_size
    return compiler_memory_bytes(compiler.package, weights)


def check_device(folder: Path, manifest: Manifest) -> None:
    """Raises VilaDeployError if this computer is not what the steps that are left need."""
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


def _check_memory(folder: Path, manifest: Manifest, compiler: Compiler) -> None:
    """Engines for any GPU are left for want of memory only."""
    parts = [_part(need) for need in manifest.needs]
    needed = max(_compiler_memory_bytes(folder, part, compiler) for part in parts)
    room = available_memory_bytes()
    if needed > room:
        raise VilaDeployError(
            f"compiling takes about {needed / 1e9:.1f} GB of memory, {room / 1e9:.1f} GB are "
            "available",
            where=folder,
            fix="close other programs, or copy the folder to a computer that has it and run the "
            "same command there",
        )


def place(manifest: Manifest) -> str:
    """Where the steps that are left can be done."""
    anywhere = compiler_of(get_target(manifest.target)).ahead_of_time
    return "a computer with more memory" if anywhere else "the device"


def outputs(need: str) -> tuple[str, ...]:
    """What a step makes; a killed one may have left some of it."""
    return (f"{_part(need)}/{files.PLAN}",)


def spent(folder: Path, need: str) -> tuple[str, ...]:
    """Files in `folder` that nothing needs any more once a step is done."""
    return tuple(f"{_part(need)}/{name}" for name in (files.GRAPH, files.WEIGHTS))


def finish_step(folder: Path, manifest: Manifest, need: str) -> dict[str, str]:
    """Compiles one part, on the device; versions of what did it."""
    with progress(1, "compiling") as advance:
        return compile_part(folder, _part(need), advance)


def compile_part(folder: Path, part: str, advance: Advance) -> dict[str, str]:
    """Compiles the graph in `folder`/`part`; versions and compute capability for the manifest."""
    described = read_json_object(folder / files.DESCRIPTION)
    compiler, capability = COMPILERS[described["package"]], described["compute_capability"]
    version = compiler.check_dialect(described["dialect"])
    ahead = bool(compiler.ahead_of_time)
    job = Job(
        graph=folder / part / files.GRAPH,
        plan=folder / part / files.PLAN,
        profiles=described["profiles"][part],
        capability=capability if ahead else None,
        timing_cache=None if ahead else folder / files.TIMING_CACHE,
    )
    compile_graph(compiler, job, advance)
    advance(f"{part}: compiled")
    return {compiler.package: version, files.CAPABILITY: capability}


def _clear(folder: Path, part: str) -> None:
    for path in spent(folder, _need(part)):
        (folder / path).unlink()


def write_description(folder: Path, config: VilaConfig, request: BuildRequest) -> None:
    """What compiling needs to know besides the graphs: on the device there is no checkpoint."""
    from vila_deploy.backends.tensorrt import graphs

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
    (folder / files.DESCRIPTION).write_text(canonical_json(content), "utf-8")


def _jetpack(request: BuildRequest) -> str | None:
    assert request.target.tensorrt is not None
    return request.jetpack or next(iter(request.target.tensorrt.jetpacks), None)


def dialect_of(request: BuildRequest) -> str:
    assert request.target.tensorrt is not None
    return request.target.tensorrt.dialect_of(_jetpack(request))


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


def _need(part: str) -> str:
    return f"compile {part}/{files.GRAPH} with TensorRT"


def _part(need: str) -> str:
    return need.split()[1].partition("/")[0]
