"""From a resolved build to an engine folder: the backend's files, tokenizer and manifest."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vila_deploy.builder.calibration_prompts import builtin_prompts, random_prompts
from vila_deploy.builder.finish import (
    can_finish_here,
    finish_engine,
    finish_only_here,
    finished_elsewhere,
    is_unfinished,
)
from vila_deploy.builder.head_choice import check_kl_bound, choose_lm_head
from vila_deploy.builder.plan import check_fits
from vila_deploy.builder.resolve import (
    BUILTIN_DATA,
    BuildOptions,
    ResolvedBuild,
    resolve_build,
    resolve_random_build,
)
from vila_deploy.checkpoint.hub import fetch_checkpoint, original_source
from vila_deploy.checkpoint.weight_source import ModelWeights
from vila_deploy.engine.manifest import TOKENIZER_FOLDER, Manifest, write_manifest
from vila_deploy.engine.model_info import ModelInfo
from vila_deploy.engine.precision import DEFAULT_MODULES, ModulePrecision
from vila_deploy.formats.module_dtypes import INT8
from vila_deploy.processing.tokenizer import TOKENIZER_FILES, Tokenizer, load_tokenizer
from vila_deploy.utils.arrays import Floats
from vila_deploy.utils.files import check_new, new_folder
from vila_deploy.utils.version import __version__

if TYPE_CHECKING:
    from vila_deploy.builder.accuracy_impact import AccuracyImpact
    from vila_deploy.checkpoint import Checkpoint

RANDOM_MAX_SEQ_LEN = 1024


def build_engine(root: Path, out: Path, options: BuildOptions) -> Manifest:
    """Build the checkpoint in `root` into the new folder `out`, which appears whole or not at all.

    `root` may be a repository's name on the hub.

    Where `out` is an engine with steps left for the device, do those; `root` isn't needed then.

    Raises:
        VilaDeployError: anything wrong with checkpoint, options or disk, or a target whose backend
            can't build it.
    """
    if is_unfinished(out):
        return finish_engine(out, options.target, options.backend)
    check_kl_bound(options)
    root = fetch_checkpoint(
        root, lambda folder: _check(folder, out, options), options.prompt_template
    )
    build = resolve_build(root, options)
    build.backend.check_tools(build.request)
    check_fits(build)
    manifest = _build(build, out, options.kl_bound)
    if manifest.pending_steps and can_finish_here(out, manifest):
        return finish_engine(out, manifest.target, manifest.backend)
    return manifest


def _check(root: Path, out: Path, options: BuildOptions) -> None:
    """Raise VilaDeployError for what needs no weights to be known as wrong."""
    check_new(out)
    build = resolve_build(root, options)
    build.backend.check_tools(build.request)
    check_fits(build)


def build_random_engine(
    model: str,
    precision: str,
    target: str,
    out: Path,
    module_precision: ModulePrecision = DEFAULT_MODULES,
    max_seq_len: int = RANDOM_MAX_SEQ_LEN,
    activations: str | None = None,
) -> Manifest:
    """Build and finish an engine of a released model's shapes with random weights, to measure.

    Raises:
        VilaDeployError: unknown `model` or target, a backend that can't build it, or an engine that
            can't be finished on this computer.
    """
    from vila_deploy.model.random_weights import random_weights

    options = BuildOptions(
        target,
        max_seq_len=max_seq_len,
        module_precision=module_precision,
        activations=activations,
    )
    build = resolve_random_build(model, precision, options)
    build.backend.check_tools(build.request)
    manifest = _manifest(build, None)
    reason = build.backend.unfinishable_reason(build.target)
    if reason:
        raise finished_elsewhere(manifest, reason)
    with new_folder(out) as folder:
        weights = random_weights(build.config)
        prompts = partial(random_prompts, build.config.llm, weights.llm)
        manifest = _write(folder, build, weights, manifest, prompts)
    return finish_only_here(out, manifest)


def _build(build: ResolvedBuild, out: Path, kl_bound: float | None) -> Manifest:
    measure = None
    if kl_bound is None:
        # Before any work, for an engine that leaves nothing to measure.
        measure = _accuracy_measurement(build)
    checkpoint = build.checkpoint
    tokenizer = load_tokenizer(checkpoint.layout.folder("llm"))
    with new_folder(out) as folder:
        _copy_tokenizer(checkpoint, folder / TOKENIZER_FOLDER)
        if kl_bound is not None:
            build = choose_lm_head(build, kl_bound, folder)
            check_fits(build)
            measure = _accuracy_measurement(build)
        manifest = _manifest(build, tokenizer, checkpoint.fingerprint())
        source = original_source(checkpoint.root)
        manifest = replace(manifest, source=source.to_json() if source else None)
        if measure is not None:
            manifest = replace(manifest, accuracy_impact=measure(folder).to_json())
        return _write(
            folder, build, checkpoint.weights, manifest, partial(builtin_prompts, checkpoint)
        )


def _accuracy_measurement(build: ResolvedBuild) -> Callable[[Path], AccuracyImpact] | None:
    """A function that measures the build's accuracy impact in the folder that it is given.

    None if nobody asked for that.

    Raises:
        VilaDeployError: there is nothing to measure, or no graph to measure it with.
    """
    if build.eval_data is None:
        return None
    from vila_deploy.builder.accuracy_impact import evaluated_dialect, measure_accuracy_impact

    dialect = evaluated_dialect(build)
    data = None if build.eval_data in BUILTIN_DATA else build.eval_data
    modules, activations = build.request.module_precision, build.request.activations
    return lambda folder: measure_accuracy_impact(
        build.checkpoint, modules, dialect, data, folder, activations
    )


def _manifest(
    build: ResolvedBuild, tokenizer: Tokenizer | None, fingerprint: str | None = None
) -> Manifest:
    """The manifest but for what the backend knows when it has written its files."""
    return Manifest(
        name=build.name,
        target=build.target.name,
        backend=build.backend.name,
        precision=build.precision,
        weights="trained" if build.root else "random",
        weight_bytes_per_token=0,
        checkpoint_fingerprint=fingerprint,
        limits=build.request.limits,
        model=ModelInfo.from_config(build.config, tokenizer),
        versions={},
        module_precision=build.request.module_precision,
        activations=build.request.activations,
        defaults=build.request.defaults,
        gpu_layers=build.request.gpu_layers,
    )


def _write(
    folder: Path,
    build: ResolvedBuild,
    weights: ModelWeights,
    manifest: Manifest,
    prompts: Callable[[], Sequence[Floats]],
) -> Manifest:
    request = replace(build.request, prompts=prompts, random_weights=build.root is None)
    if build.root and request.module_precision.vision == INT8 and not build.backend.smooths_tower:
        from vila_deploy.builder.smoothed_tower import smoothed_tower

        tower = smoothed_tower(build.config, weights.tower, weights.projector, folder)
        weights = weights._replace(tower=tower)
    result = build.backend.build(folder, build.config, weights, request)
    manifest = replace(
        manifest,
        weight_bytes_per_token=result.weight_bytes_per_token,
        versions={"vila-deploy": __version__, **result.versions},
        pending_steps=result.pending_steps,
        module_precision=replace(
            manifest.module_precision,
            **{module: choice.value for module, choice in result.chosen.items()},
        ),
        defaults={
            **manifest.defaults,
            **{module: choice.reason for module, choice in result.chosen.items()},
        },
    )
    write_manifest(folder, manifest)
    return manifest


def _copy_tokenizer(checkpoint: Checkpoint, destination: Path) -> None:
    destination.mkdir()
    for name in TOKENIZER_FILES:
        source = checkpoint.layout.folder("llm") / name
        if source.is_file():
            shutil.copyfile(source, destination / name)
