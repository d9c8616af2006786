"""From a checkpoint to an engine folder: plan, backend's files, manifest."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from vila_deploy import __version__
from vila_deploy.backends import BACKENDS, TOKENIZER_FOLDER
from vila_deploy.backends.tensorrt.compilers import COMPILERS, host_platform
from vila_deploy.builder.finish import (
    can_finish_here,
    finish_engine,
    finish_only_here,
    finished_elsewhere,
    is_unfinished,
)
from vila_deploy.builder.fit import Fit, advise, fit_everywhere
from vila_deploy.builder.memory_plan import EnginePlan, plan_engine
from vila_deploy.checkpoint import Checkpoint, open_checkpoint
from vila_deploy.checkpoint.config import VilaConfig, load_config, with_template
from vila_deploy.checkpoint.weight_source import WeightSource
from vila_deploy.engine.build_request import BuildRequest
from vila_deploy.engine.manifest import Limits, Manifest, write_manifest
from vila_deploy.engine.model_info import describe
from vila_deploy.engine.precision import ALL_FP16, RTX, ModulePrecision, check_precision
from vila_deploy.engine.target import Target, get_target
from vila_deploy.processing.tokenizer import TOKENIZER_FILES, load_tokenizer
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.files import new_folder

DEFAULT_MAX_SEQ_LEN = 4096
FIRST_WITH_FP8 = (8, 9)
SHIPPED = Path("shipped")
# Components of a plan that GPUs share, by how their names begin.
SHARED_BY_ALL, SHARED_BY_A_STAGE = (
    ("llm decoder", "key/value cache"),
    ("llm embeddings", "llm head"),
)


@dataclass(frozen=True)
class BuildOptions:
    """What the user asks for; None means: take what the target, checkpoint or model suggests.

    With `eval_data` the effect of `module_precision` on the logits is measured: on texts and
    images there, or on the built-in ones if it is SHIPPED.
    """

    target: str
    backend: str | None = None
    precision: str | None = None
    max_batch_size: int = 1
    max_input_len: int | None = None
    max_seq_len: int | None = None
    prompt_template: str | None = None
    tp: int = 1
    pp: int = 1
    jetpack: str | None = None
    module_precision: ModulePrecision = ALL_FP16
    eval_data: Path | None = None
    kernel_launch: str | None = None


def default_limits(config: VilaConfig) -> Limits:
    """The limits of an engine for which nothing else is asked."""
    return _limits(config, BuildOptions(target="cpu"))


def plan_build(root: Path, options: BuildOptions) -> EnginePlan:
    """What building `root` would give, from its config files alone."""
    config, target = (
        with_template(load_config(root), options.prompt_template),
        get_target(options.target),
    )
    backend, limits = _backend(target, options), _limits(config, options)
    precision = _planned_precision(config, target, options)
    _check(_backend_module(target, options), config, _request(target, limits, options), backend)
    plan = plan_engine(config, target, backend, precision, limits, options.module_precision)
    return _on_each_gpu(plan, options)


def _on_each_gpu(plan: EnginePlan, options: BuildOptions) -> EnginePlan:
    """The fullest: layers and cache are shared by all GPUs, embeddings and head by a stage's."""
    gpus = options.tp * options.pp
    if gpus == 1:
        return plan

    def share(name: str) -> int:
        if name.startswith(SHARED_BY_ALL):
            return gpus
        return options.tp if name.startswith(SHARED_BY_A_STAGE) else 1

    components = tuple(
        replace(part, bytes=part.bytes // share(part.name)) for part in plan.components
    )
    saved = sum(part.bytes for part in plan.components) - sum(part.bytes for part in components)
    needed = plan.device_bytes - saved
    *build, run = plan.stages
    run = replace(run, name=f"{run.name}, each of {gpus}", memory_bytes=needed)
    return replace(
        plan,
        components=components,
        device_bytes=needed,
        fits=needed <= plan.limit_bytes,
        stages=(*build, run),
    )


def plan_targets(root: Path, options: BuildOptions) -> list[Fit]:
    """On which targets that engine would fit on one GPU, from the config files alone."""
    config, target = load_config(root), get_target(options.target)
    precision = _planned_precision(config, target, options)
    limits = _limits(config, options)
    fits = fit_everywhere(config, precision, limits, options.module_precision, options.backend)
    # Of what is planned for several GPUs the plan speaks.
    several = options.tp * options.pp > 1
    return [fit for fit in fits if not (several and fit.target == target.name)]


def _planned_precision(config: VilaConfig, target: Target, options: BuildOptions) -> str:
    """An fp16 checkpoint may be planned as what it would be in 4 bits."""
    if config.llm.quantization is None and options.precision == "int4":
        return "int4"
    return _precision(config, target, options)


def build_engine(root: Path, out: Path, options: BuildOptions) -> Manifest:
    """Builds the checkpoint in `root` into the new folder `out`, which appears whole or not at all.

    Where `out` is an engine with steps left for the device, does those; `root` isn't needed then.

    Raises:
        VilaDeployError: anything wrong with checkpoint, options or disk, or a target whose backend
            this version can't build.
    """
    if is_unfinished(out):
        return finish_engine(out, options.target, options.backend)
    manifest = _build(root, out, options)
    if manifest.needs and can_finish_here(out, manifest):
        return finish_engine(out, manifest.target, manifest.backend)
    return manifest


def _build(root: Path, out: Path, options: BuildOptions) -> Manifest:
    config = with_template(load_config(root), options.prompt_template)
    target = get_target(options.target)
    module, backend = _backend_module(target, options), _backend(target, options)
    precision = _precision(config, target, options)
    limits = _limits(config, options)
    request = _request(target, limits, options)
    _check(module, config, request, backend)
    module.check_tools(request)
    _refuse_what_does_not_fit(config, target, options)
    measure = _measure(request, backend, options.eval_data)
    checkpoint = open_checkpoint(root)
    tokenizer = load_tokenizer(checkpoint.layout.folder("llm"))
    if tokenizer.vocab_size > config.llm.vocab_size:
        raise VilaDeployError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {config.llm.vocab_size}",
            where=checkpoint.layout.folder("llm"),
            fix="use the tokenizer files that belong to this checkpoint",
        )
    with new_folder(out) as folder:
        _copy_tokenizer(checkpoint, folder / TOKENIZER_FOLDER)
        parts = (checkpoint.llm, checkpoint.vision, checkpoint.projector)
        manifest = Manifest(
            name=root.resolve().name,
            target=target.name,
            backend=backend,
            precision=precision,
            weights="trained",
            weight_bytes_per_token=0,
            checkpoint_fingerprint=checkpoint.fingerprint(),
            limits=limits,
            model=describe(config, tokenizer),
            versions={},
            module_precision=options.module_precision,
        )
        if measure is not None:
            manifest = replace(manifest, effect=measure(checkpoint, folder))
        return _write(folder, config, parts, manifest, request)


def _measure(
    request: BuildRequest, backend: str, eval_data: Path | None
) -> Callable[[Checkpoint, Path], dict[str, Any]] | None:
    """What measures the effect of components on the logits, if that is wanted."""
    if eval_data is None:
        return None
    from vila_deploy.builder.component_effect import dialect_to_measure, measure_effect

    dialect = dialect_to_measure(request, backend)
    data = None if eval_data == SHIPPED else eval_data

    def measure(checkpoint: Checkpoint, scratch: Path) -> dict[str, Any]:
        return measure_effect(
            checkpoint, request.module_precision, dialect, data, scratch
        ).to_json()

    return measure


def build_random_engine(
    model: str,
    precision: str,
    target_name: str,
    out: Path,
    module_precision: ModulePrecision = ALL_FP16,
) -> Manifest:
    """An engine of a released model's true shapes with random weights, finished, for measuring.

    Raises:
        VilaDeployError: unknown `model` or target, a backend that this version can't build, or an
            engine that can't be finished on this computer.
    """
    from vila_deploy.checkpoint.presets import preset
    from vila_deploy.model.random_weights import random_parts

    options = BuildOptions(target_name, max_seq_len=1024, module_precision=module_precision)
    config, target = preset(model, precision), get_target(target_name)
    module, backend = _backend_module(target, options), _backend(target, options)
    limits = _limits(config, options)
    request = _request(target, limits, options)
    _check(module, config, request, backend)
    module.check_tools(request)
    manifest = Manifest(
        name=model,
        target=target.name,
        backend=backend,
        precision=precision,
        weights="random",
        weight_bytes_per_token=0,
        checkpoint_fingerprint=None,
        limits=limits,
        model=describe(config, None),
        versions={},
        module_precision=module_precision,
    )
    _check_finishing(target, manifest)
    with new_folder(out) as folder:
        manifest = _write(folder, config, random_parts(config), manifest, request)
    return finish_only_here(out, manifest)


def _check_finishing(target: Target, manifest: Manifest) -> None:
    """Before the work of a build: raises where TensorRT would have to compile and can't."""
    if manifest.backend != "tensorrt" or target.tensorrt is None:
        return
    compiler = COMPILERS[target.tensorrt.package]
    if compiler.ahead_of_time:
        return
    if host_platform() != target.host:
        reason = f"TensorRT compiles it on {target.host}, this is {host_platform()}"
        raise finished_elsewhere(manifest, reason)
    compiler.load()


def _write(
    folder: Path,
    config: VilaConfig,
    parts: tuple[WeightSource, WeightSource, WeightSource],
    manifest: Manifest,
    request: BuildRequest,
) -> Manifest:
    module = import_module(f"{BACKENDS[manifest.backend]}.build")
    built = module.build(folder, config, *parts, request)
    versions: Mapping[str, str] = {"vila-deploy": __version__, **built.versions}
    whole = replace(
        manifest,
        weight_bytes_per_token=built.weight_bytes_per_token,
        versions=versions,
        needs=built.needs,
    )
    write_manifest(folder, whole)
    return whole


def _refuse_what_does_not_fit(config: VilaConfig, target: Target, options: BuildOptions) -> None:
    """Raises before any work; what fits into this computer's memory is known when it runs."""
    if target.memory_bytes is None:
        return
    backend, limits = _backend(target, options), _limits(config, options)
    precision = _precision(config, target, options)
    plan = plan_engine(config, target, backend, precision, limits, options.module_precision)
    plan = _on_each_gpu(plan, options)
    if not plan.fits:
        advice = advise(config, precision, limits, target, backend, options.module_precision)
        raise VilaDeployError(
            f"the engine would need {plan.device_bytes / 1e9:.1f} GB, {target.title} has "
            f"{plan.limit_bytes / 1e9:.1f} GB for it",
            fix=f"what would do: {advice}",
        )


def _backend(target: Target, options: BuildOptions) -> str:
    backend = options.backend or target.default_backend
    if backend == RTX:
        _check_rtx(target)
        return "tensorrt"
    if backend not in target.backends:
        raise VilaDeployError(
            f"target {target.name} has no backend {backend!r}",
            fix=f"choose from {', '.join(target.backends)}",
        )
    return backend


def _check_rtx(target: Target) -> None:
    """`--backend tensorrt-rtx` is backend tensorrt where its engines come from tensorrt-rtx."""
    if target.tensorrt is not None and target.tensorrt.package == RTX:
        return
    known = COMPILERS[RTX].ahead_of_time
    raise VilaDeployError(
        f"{RTX} compiles for compute capability {', '.join(known)}, not for "
        f"{target.compute_capability or 'a CPU'} of {target.title}",
        fix=f"use --backend {' or '.join(target.backends)}",
    )


def _backend_module(target: Target, options: BuildOptions) -> ModuleType:
    backend = _backend(target, options)
    if backend not in BACKENDS:
        raise VilaDeployError(
            f"this version can't build backend {backend!r}, which target {target.name} needs",
            fix="build for --target cpu, or use --plan to see whether the model fits",
        )
    return import_module(f"{BACKENDS[backend]}.build")


def _request(target: Target, limits: Limits, options: BuildOptions) -> BuildRequest:
    return BuildRequest(
        target,
        limits,
        options.tp,
        options.pp,
        options.jetpack,
        options.module_precision,
        options.kernel_launch,
    )


def _check(module: ModuleType, config: VilaConfig, request: BuildRequest, backend: str) -> None:
    """Raises for what can't be built, whatever is installed here."""
    check_precision(request.target, backend, request.module_precision)
    if request.jetpack is not None and backend != "tensorrt":
        raise VilaDeployError(
            f"--jetpack is for backend tensorrt, not for {backend}", fix="leave it out"
        )
    if request.kernel_launch is not None and backend != "native":
        raise VilaDeployError(
            f"--kernel-launch is for backend native, not for {backend}", fix="leave it out"
        )
    most, asked = module.MAX_BATCH_SIZE, request.limits.max_batch_size
    if asked > most:
        raise VilaDeployError(
            f"--max-batch-size {asked} is more than this backend's {most}",
            fix=f"use --max-batch-size {most}",
        )
    module.check(config, request)


def _precision(config: VilaConfig, target: Target, options: BuildOptions) -> str:
    found = "int4" if config.llm.quantization else "fp16"
    asked = options.precision or found
    if asked == "fp8":
        capability = target.compute_capability
        named = f"{target.title} (compute capability {capability})" if capability else target.title
        raise VilaDeployError(
            f"--precision fp8: {named} {_has_fp8(capability)}",
            fix="quantize to 4 bits with vila-quantize and use --precision int4",
        )
    if asked != found:
        fix = {
            "int4": "run vila-quantize first and build from its output",
            "fp16": "build from the checkpoint that it was quantized from",
        }[asked]
        raise VilaDeployError(f"the checkpoint's llm is {found}, not {asked}", fix=fix)
    return asked


def _has_fp8(capability: str | None) -> str:
    numbers = tuple(map(int, (capability or "0.0").split(".")))
    return "has no FP8" if numbers < FIRST_WITH_FP8 else "could, but this version can't"


def _limits(config: VilaConfig, options: BuildOptions) -> Limits:
    longest = min(config.model_max_length, config.llm.max_position_embeddings)
    max_seq_len = options.max_seq_len or min(longest, DEFAULT_MAX_SEQ_LEN)
    if max_seq_len > longest:
        raise VilaDeployError(
            f"--max-seq-len {max_seq_len} is more than the model's {longest}",
            fix=f"use {longest} or less",
        )
    max_input_len = options.max_input_len or max_seq_len
    if max_input_len > max_seq_len:
        raise VilaDeployError(
            f"--max-input-len {max_input_len} is more than --max-seq-len {max_seq_len}",
            fix="the prompt is part of the sequence: raise --max-seq-len",
        )
    return Limits(options.max_batch_size, max_input_len, max_seq_len)


def _copy_tokenizer(checkpoint: Checkpoint, destination: Path) -> None:
    destination.mkdir()
    for name in TOKENIZER_FILES:
        source = checkpoint.layout.folder("llm") / name
        if source.is_file():
            shutil.copyfile(source, destination / name)
