"""What a build is made from and for, resolved once from the user's options and the configs."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from vila_deploy.backends.base import Backend
from vila_deploy.backends.registry import ALIASES, BACKENDS, check_options, get_backend
from vila_deploy.checkpoint import Checkpoint, open_checkpoint
from vila_deploy.checkpoint.config import VilaConfig, config_of
from vila_deploy.checkpoint.folder_layout import find_layout
from vila_deploy.checkpoint.hub import checkpoint_name
from vila_deploy.engine.build_request import BuildRequest, resolve_limits
from vila_deploy.engine.precision import (
    AUTO,
    DEFAULT_MODULES,
    DefaultChoice,
    ModulePrecision,
    option_of,
)
from vila_deploy.engine.target import Target, get_target
from vila_deploy.formats.module_dtypes import FP16, INT8
from vila_deploy.processing.own_template import follow_tokenizer
from vila_deploy.processing.vocabulary import check_vocabulary
from vila_deploy.quantize.options import BUILTIN, OLD_BUILTIN
from vila_deploy.utils.errors import VilaDeployError

FIRST_WITH_FP8 = (8, 9)
# What stands for the built-in held-out data; the second is the older word.
BUILTIN_DATA = (Path(BUILTIN), Path(OLD_BUILTIN))


@dataclass(frozen=True)
class BuildOptions:
    """What the user asks for; None means: take what the target, checkpoint or model suggests.

    Args:
        module_precision: dtype of vision tower, output head and key/value cache; AUTO_MODULES may
            be AUTO.
        eval_data: texts and images, or one of BUILTIN_DATA, on which the change of the logits by
            `module_precision` and `activations` is measured; None: it is not.
        activations: a name in ACTIVATIONS, of the 4-bit linears of backend onnxruntime.
        gpu_layers: of backend llamacpp, on the GPU; None: those that fit when it is opened.
        memory_bytes: of a target that is no one device; None means this computer's.
        kl_bound: nats that an output head in fewer bits may cost where its dtype is AUTO; None: the
            backend's default is taken and nothing measured.
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
    module_precision: ModulePrecision = DEFAULT_MODULES
    eval_data: Path | None = None
    kernel_launch: str | None = None
    activations: str | None = None
    gpu_layers: int | None = None
    memory_bytes: int | None = None
    kl_bound: float | None = None


@dataclass(frozen=True)
class ResolvedBuild:
    """An engine to be planned or built, checked against its backend; made by `resolve_build`.

    Args:
        name: what tables call the model.
        precision: of the LLM's linears, "int4" or "fp16".
        root: folder of the checkpoint; None for random weights.
        backend_asked: the backend that the user asked for; None for the target's default.
    """

    name: str
    config: VilaConfig
    backend: Backend
    precision: str
    request: BuildRequest
    root: Path | None = None
    backend_asked: str | None = None
    eval_data: Path | None = None

    @property
    def target(self) -> Target:
        return self.request.target

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The checked checkpoint, opened when it is first asked for.

        Raises:
            VilaDeployError: names the file, key or tensor that is wrong.
        """
        assert self.root is not None
        return open_checkpoint(self.root, self.config)


def resolve_build(root: Path, options: BuildOptions, *, planning: bool = False) -> ResolvedBuild:
    """Return what building the checkpoint in `root` means; reads config and tokenizer files only.

    Args:
        planning: an fp16 checkpoint may be taken for what it would be in 4 bits.

    Raises:
        VilaDeployError: anything wrong with options or configs, or an engine that the target's
            backend can't build.
    """
    layout = find_layout(root)
    tokenizer = layout.folder("llm")
    config = follow_tokenizer(config_of(layout, options.prompt_template), tokenizer)
    check_vocabulary(tokenizer, config)
    target = _target(options)
    backend = resolve_backend(target, options.backend)
    found = "int4" if config.llm.quantization else FP16
    if not (planning and found == FP16 and options.precision == "int4"):
        _check_precision(found, options.precision, target)
    precision = options.precision or found
    return _resolve(
        ResolvedBuild(
            name=checkpoint_name(root),
            config=config,
            backend=backend,
            precision=precision,
            request=_request(config, target, backend, precision, options),
            root=root,
            backend_asked=options.backend,
            eval_data=options.eval_data,
        )
    )


def resolve_random_build(model: str, precision: str, options: BuildOptions) -> ResolvedBuild:
    """Return what an engine of a released model's shapes means, which has no checkpoint.

    Raises:
        VilaDeployError: unknown `model` or target, or an engine that the backend can't build.
    """
    from vila_deploy.checkpoint.presets import preset

    config, target = preset(model, precision), _target(options)
    backend = resolve_backend(target, options.backend)
    request = _request(config, target, backend, precision, options)
    return _resolve(ResolvedBuild(model, config, backend, precision, request))


def _target(options: BuildOptions) -> Target:
    """Return the target asked for, with the memory asked for where it has none of its own."""
    target = get_target(options.target)
    if options.memory_bytes is None:
        return target
    if target.memory_bytes is not None:
        raise VilaDeployError(
            f"target {target.name} has {target.memory_bytes / 1e9:.1f} GB, --memory is for targets "
            "without a size of their own",
            fix="leave it out, or use --max-seq-len to make the engine smaller",
        )
    return replace(target, memory_bytes=options.memory_bytes)


def resolve_backend(target: Target, asked: str | None) -> Backend:
    """Return the backend called `asked`, or the target's default.

    Raises:
        VilaDeployError: the target has no such backend.
    """
    name = target.default_backend if asked is None else asked
    if name in ALIASES:
        backend = get_backend(ALIASES[name])
        backend.check_alias(name, target)
        return backend
    if name not in target.backends:
        raise VilaDeployError(
            f"target {target.name} has no backend {name!r}",
            fix=f"choose from {', '.join(target.backends)}",
        )
    return get_backend(name)


def check_module_precision(target: Target, backend: Backend, asked: ModulePrecision) -> None:
    """Raise VilaDeployError for the first module that `backend` has not in that dtype."""
    for module, dtype in asked.quantized().items():
        if backend.supports(target, module, dtype):
            continue
        known = (FP16, *backend.supported_dtypes(target).get(module, ()))
        option = f"--{option_of(module)}"
        able = [n for n in target.backends if get_backend(n).supports(target, module, dtype)]
        reason = backend.unsupported_reason(target, module)
        raise VilaDeployError(
            f"backend {backend.title(target)} has {option} {' or '.join(known)}, not {dtype}"
            f"{f': {reason}' if reason else ''}",
            fix=f"use --backend {' or '.join(able)}, or leave {option} out"
            if able
            else f"leave {option} out: no backend of target {target.name} has it",
        )


def _resolve(build: ResolvedBuild) -> ResolvedBuild:
    check_module_precision(build.target, build.backend, build.request.module_precision)
    check_options(build.backend.name, build.request)
    build.backend.check(build.config, build.request)
    for note in build.backend.notes(build.request):
        print(f"note: {note}", file=sys.stderr)
    return build


def _request(
    config: VilaConfig, target: Target, backend: Backend, precision: str, options: BuildOptions
) -> BuildRequest:
    lengths = options.max_batch_size, options.max_input_len, options.max_seq_len
    limits = resolve_limits(config, *lengths)
    modules, activations = options.module_precision, options.activations
    defaults: dict[str, DefaultChoice] = {}
    for module in (name for name, dtype in modules.to_json().items() if dtype == AUTO):
        defaults[module] = _default_dtype(module, config, target, backend, precision)
        modules = replace(modules, **{module: defaults[module].value})
    takes_activations = "activations" in BACKENDS[backend.name].options
    if activations is None and takes_activations and precision != FP16:
        defaults["activations"] = backend.default_activations()
        activations = defaults["activations"].value
    elif activations is not None and takes_activations and precision == FP16:
        raise VilaDeployError(
            "--activations is for 4-bit linears, this language model is fp16", fix="leave it out"
        )
    return BuildRequest(
        target,
        limits,
        options.tp,
        options.pp,
        options.jetpack,
        modules,
        options.kernel_launch,
        activations,
        {name: choice.reason for name, choice in defaults.items() if choice.reason},
        options.gpu_layers,
    )


def _default_dtype(
    module: str, config: VilaConfig, target: Target, backend: Backend, precision: str
) -> DefaultChoice:
    """Return the backend's choice; where it has no reason, int8 for what the checkpoint has so."""
    choice = backend.default_dtype(module, config, precision)
    int8 = {"vision": bool(config.vision.int8_linears), "lm_head": config.llm.head_is_quantized}
    if choice.reason or not int8.get(module) or not backend.supports(target, module, INT8):
        return choice
    return DefaultChoice(INT8, "as in the checkpoint")


def _check_precision(found: str, asked: str | None, target: Target) -> None:
    if asked == "fp8":
        capability = target.compute_capability
        named = f"{target.title} (compute capability {capability})" if capability else target.title
        raise VilaDeployError(
            f"--precision fp8: {named} {_has_fp8(capability)}",
            fix="quantize to 4 bits with vila-quantize and use --precision int4",
        )
    if asked not in (None, found):
        fix = {
            "int4": "run vila-quantize first and build from its output",
            "fp16": "build from the checkpoint that it was quantized from",
        }[asked]
        raise VilaDeployError(f"the checkpoint's llm is {found}, not {asked}", fix=fix)


def _has_fp8(capability: str | None) -> str:
    numbers = tuple(map(int, (capability or "0.0").split(".")))
    return "has no FP8" if numbers < FIRST_WITH_FP8 else "could, but this version can't"
