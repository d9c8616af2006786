"""vila-build-engine: build an engine folder out of a checkpoint."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vila_deploy.cli.common import (
    EXIT_INTERRUPTED,
    FilePath,
    command,
    download_json,
    echo_json,
    named_target,
    no_nan,
    note_unused,
    show_download,
)
from vila_deploy.engine.precision import (
    AUTO,
    LLM_PRECISIONS,
    ModulePrecision,
    accepted_dtypes,
    option_of,
)
from vila_deploy.formats.module_dtypes import ACTIVATIONS
from vila_deploy.kernels.launch_mode import KERNEL_LAUNCHES
from vila_deploy.utils.errors import VilaDeployError, printable, short

if TYPE_CHECKING:
    from vila_deploy.builder.fit import Fit
    from vila_deploy.builder.memory_plan import EnginePlan
    from vila_deploy.builder.resolve import BuildOptions
    from vila_deploy.engine.manifest import Manifest


def _gpu_layers(context: click.Context, option: click.Parameter, value: str) -> int | None:
    """Return the number of layers; None for auto."""
    if value == AUTO:
        return None
    if re.fullmatch(r"[0-9]{1,6}", value):
        return int(value)
    raise click.BadParameter(f"must be auto or a number, found {short(value)}")


@command("vila-build-engine")
@click.argument("checkpoint", type=FilePath())
@click.option(
    "--target", required=True, callback=named_target,
    help="Device: a file of engines/, e.g. cpu or orin; auto: this computer.",
)  # fmt: skip
@click.option("-o", "--out", type=FilePath(), help="Folder to write; new or empty.")
@click.option(
    "--backend", help="Library that compiles and runs it; the target's default if left out."
)
@click.option(
    "--precision", type=click.Choice(LLM_PRECISIONS),
    help="Of the language model's linears; the checkpoint's own if left out.",
)  # fmt: skip
@click.option(
    "--vision", type=click.Choice(accepted_dtypes("vision")), default=AUTO, show_default=True,
    help="Of the vision tower; auto is int8 on a CPU beside 4-bit layers, if its features stay "
    "close, else fp16.",
)  # fmt: skip
@click.option(
    "--lm-head", type=click.Choice(accepted_dtypes("lm_head")), default=AUTO, show_default=True,
    help="Of the output head; auto is int8 on a CPU beside 4-bit layers, else fp16. The embedding "
    "table stays as it is.",
)  # fmt: skip
@click.option(
    "--kl-bound", type=float, metavar="NATS",
    help="Let auto take the fewest bits of the output head that cost at most this mean KL from "
    "fp16, e.g. 0.001, measured on the data of --eval or the built-in data.",
)  # fmt: skip
@click.option(
    "--kv-cache", type=click.Choice(accepted_dtypes("kv_cache")), default="fp16", show_default=True,
    help="Of the key/value cache.",
)  # fmt: skip
@click.option(
    "--activations", type=click.Choice([*ACTIVATIONS]),
    help="Of 4-bit linears, int8 if left out; int8x2 is the sum of two int8 terms; --backend "
    "onnxruntime only.",
)  # fmt: skip
@click.option(
    "--eval", "eval_data", type=FilePath(), metavar="FILE_OR_DIR",
    help="Measure how these four change the logits, on own held-out data as vila-quantize --eval "
    "takes it, or on the built-in data: the word builtin. Takes minutes with a large model.",
)  # fmt: skip
@click.option(
    "--max-batch-size", type=click.IntRange(1), default=1, show_default=True,
    help="Sequences that the engine holds at once.",
)  # fmt: skip
@click.option(
    "--max-input-len", type=click.IntRange(1), help="Longest prompt in tokens, images included."
)
@click.option(
    "--max-seq-len", type=click.IntRange(2), help="Longest prompt with its answer, in tokens."
)
@click.option(
    "--prompt-template", metavar="NAME",
    help="vicuna_v1, llama_3, llama_3_original, hermes-2 or qwen2; what the configs name, or LLM "
    "and tokenizer tell, if left out.",
)  # fmt: skip
@click.option(
    "--tp", type=click.IntRange(1), default=1, show_default=True,
    help="GPUs that share each layer; --backend tensorrt-llm only.",
)  # fmt: skip
@click.option(
    "--pp", type=click.IntRange(1), default=1, show_default=True,
    help="Pipeline stages, each on --tp GPUs; --backend tensorrt-llm only.",
)  # fmt: skip
@click.option("--jetpack", metavar="6|7", help="Release of JetPack on a Jetson; 6 if left out.")
@click.option(
    "--kernel-launch", type=click.Choice(KERNEL_LAUNCHES),
    help="How kernels follow each other, auto if left out; --backend native only.",
)  # fmt: skip
@click.option(
    "--gpu-layers", metavar="auto|N", default=AUTO, show_default=True, callback=_gpu_layers,
    help="Decoder layers on the GPU, the head counted as one; auto: those that fit when the engine "
    "is opened; --backend llamacpp only.",
)  # fmt: skip
@click.option(
    "--memory", metavar="GB", type=click.FloatRange(0, 1e6, min_open=True), callback=no_nan,
    help="Memory that the engine may fill, for targets that are no one device: metal, vulkan, cpu.",
)  # fmt: skip
@click.option("--plan", "plan_only", is_flag=True, help="Show sizes and memory; config files only.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan or manifest as JSON.")
def main(
    checkpoint: Path,
    target: str,
    out: Path | None,
    backend: str | None,
    precision: str | None,
    vision: str,
    lm_head: str,
    kl_bound: float | None,
    kv_cache: str,
    activations: str | None,
    eval_data: Path | None,
    max_batch_size: int,
    max_input_len: int | None,
    max_seq_len: int | None,
    prompt_template: str | None,
    tp: int,
    pp: int,
    jetpack: str | None,
    kernel_launch: str | None,
    gpu_layers: int | None,
    memory: float | None,
    plan_only: bool,
    as_json: bool,
) -> None:
    """Build an engine for a device from CHECKPOINT, quantized by vila-quantize or not.

    CHECKPOINT is a folder, or OWNER/NAME or OWNER/NAME@REVISION on the Hugging Face Hub.

    \b
    vila-build-engine VILA1.5-3b-awq --target cpu -o VILA1.5-3b-cpu
    vila-build-engine VILA1.5-3b --target orin-nano --precision int4 --plan

    An engine folder with steps left for the device is finished there by the same command.
    """
    if out is None and not plan_only:
        out = _unfinished_engine(checkpoint)

    from vila_deploy.builder.resolve import BuildOptions

    modules = ModulePrecision(vision, lm_head, kv_cache)
    options = BuildOptions(
        target, backend, precision, max_batch_size, max_input_len, max_seq_len, prompt_template, tp,
        pp, jetpack, modules, eval_data, kernel_launch, activations, gpu_layers,
        None if memory is None else int(memory * 1e9), kl_bound,
    )  # fmt: skip
    if kl_bound is not None and plan_only:
        raise click.UsageError("--kl-bound reads the weights, --plan does not: leave one out")
    if plan_only or out is None:
        _plan(checkpoint, options, as_json)
    else:
        _show_engine(out, _build(checkpoint, out, options), as_json)


def _plan(checkpoint: Path, options: BuildOptions, as_json: bool) -> None:
    from vila_deploy.builder.plan import plan_build, plan_targets
    from vila_deploy.builder.resolve import resolve_build
    from vila_deploy.builder.video_plan import video_json, video_line
    from vila_deploy.checkpoint.hub import planned_checkpoint

    with planned_checkpoint(checkpoint, options.prompt_template) as (folder, download):
        note_unused(folder, options.prompt_template)
        build = resolve_build(folder, options, planning=True)
        planned, fits = plan_build(build), plan_targets(build)
    video = build.config, build.request.limits
    if as_json:
        targets = {"targets": [fit.to_json() for fit in fits], "video": video_json(*video)}
        echo_json({**planned.to_json(), **targets, **download_json(download)})
    else:
        show_download(download)
        _show_plan(planned, fits)
        click.echo(video_line(*video))


def _unfinished_engine(folder: Path) -> Path:
    """Return `folder` if it is an engine with steps left; the command needs -o otherwise."""
    from vila_deploy.builder.finish import is_engine, is_unfinished

    if is_unfinished(folder):
        return folder
    if is_engine(folder):
        raise VilaDeployError(
            "nothing is left to do for this engine",
            where=folder,
            fix="run it with vila-chat or vila-bench",
        )
    raise click.UsageError("-o is missing: name the folder to write, or give --plan")


def _build(checkpoint: Path, out: Path, options: BuildOptions) -> Manifest:
    from vila_deploy.builder.build import build_engine
    from vila_deploy.builder.finish import is_unfinished
    from vila_deploy.checkpoint.hub import planned_checkpoint

    if not is_unfinished(out):
        with planned_checkpoint(checkpoint, options.prompt_template) as (folder, _):
            note_unused(folder, options.prompt_template)
    try:
        return build_engine(checkpoint, out, options)
    except KeyboardInterrupt:
        if not is_unfinished(out):
            raise
        steps = f"finished steps are kept in {printable(str(out))}; the same command goes on"
        click.echo(f"interrupted: {steps}", err=True)
        sys.exit(EXIT_INTERRUPTED)


def _show_engine(out: Path, manifest: Manifest, as_json: bool) -> None:
    if as_json:
        echo_json(
            {
                "engine": str(out),
                "target": manifest.target,
                "backend": manifest.backend,
                "precision": manifest.precision,
                "components": manifest.module_precision.to_json(),
                "activations": manifest.activations,
                "defaults": dict(manifest.defaults),
                "effect": manifest.accuracy_impact,
                "weight_bytes_per_token": manifest.weight_bytes_per_token,
                "needs": [step.title for step in manifest.pending_steps],
            }
        )
    else:
        size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
        activations = manifest.activations
        click.echo(
            f"{out}: {_precisions(manifest.precision, manifest.module_precision)} engine for "
            f"{manifest.target}, {size / 1e6:,.1f} MB"
        )
        values = {**manifest.module_precision.to_json(), "activations": activations}
        for name, reason in manifest.defaults.items():
            click.echo(f"--{option_of(name)} {values[name]} by default: {reason}")
        impact = manifest.accuracy_impact
        if impact is not None:
            plain = "fp16 modules and float32 activations" if activations else "fp16 modules"
            click.echo(
                f"Against {plain}: mean KL {impact['kl_mean']:.2g} nats, top-1 agreement "
                f"{impact['top1_agreement']:.2%} over {impact['tokens']} tokens"
            )
            if impact.get("tower_layer_errors"):
                click.echo(
                    "The int8 tower moves images' embeddings by "
                    f"{impact['image_feature_error']:.2%} of their norm, hidden states behind its "
                    f"layers by up to {max(impact['tower_layer_errors']):.2%}"
                )
        if manifest.pending_steps:
            from vila_deploy.backends.registry import get_backend

            location = get_backend(manifest.backend).finish_location(manifest)
            steps = "; ".join(step.title for step in manifest.pending_steps)
            click.echo(
                f"Left for {location}: {steps}. "
                f"Copy {out.name} there and run: "
                f"vila-build-engine {out.name} --target {manifest.target} "
                f"--backend {manifest.backend} -o {out.name}"
            )


def _precisions(precision: str, module_precision: ModulePrecision) -> str:
    return ", ".join(filter(None, (precision, module_precision.summary())))


def _show_plan(planned: EnginePlan, fits: list[Fit]) -> None:
    from vila_deploy.cli.common import show_fits, show_plan

    show_plan(planned.items.values(), planned.steps)
    verdict = "fits" if planned.fits else "does not fit"
    click.echo(
        f"{planned.target} with {planned.backend}, "
        f"{_precisions(planned.precision, planned.module_precision)}: needs "
        f"{planned.device_bytes / 1e9:.2f} GB of {planned.limit_bytes / 1e9:.1f} GB: {verdict}"
    )
    click.echo("\nWhen it runs:")
    show_fits(fits)
