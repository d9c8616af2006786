"""vila-quantize: a 4-bit checkpoint out of a trained one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vila_deploy.cli.common import (
    EXIT_INTERRUPTED,
    FilePath,
    command,
    download_json,
    echo_json,
    fail,
    no_nan,
    note_unused,
    show_download,
)
from vila_deploy.cli.formats import FormatNames
from vila_deploy.formats.registry import FORMATS
from vila_deploy.quantize.options import ALGORITHMS, BUILTIN, DEVICES, MODULES, quantize_options
from vila_deploy.utils.errors import VilaDeployError

if TYPE_CHECKING:
    from vila_deploy.builder.fit import Fit
    from vila_deploy.checkpoint.hub import Download
    from vila_deploy.quantize.estimate.plan import QuantizePlan
    from vila_deploy.quantize.options import QuantizeOptions

FILE = FilePath()


@command("vila-quantize")
@click.argument("checkpoint", type=FILE)
@click.option("-o", "--out", type=FILE, help="Folder to write; new or empty.")
@click.option(
    "--algorithm", type=click.Choice(ALGORITHMS), default=ALGORITHMS[0], show_default=True,
    help="awq-gptq learns scales and makes up for rounding errors on calibration data; "
    "awq searches scales and clipping, as llm-awq does; rtn rounds to nearest, without data.",
)  # fmt: skip
@click.option(
    "--group-size", type=int, default=128, show_default=True,
    help="Neighbouring input channels that share a scale.",
)  # fmt: skip
@click.option("--symmetric", is_flag=True, help="No zero points: all are 8.")
@click.option(
    "--bits-per-weight", type=float, metavar="B", callback=no_nan,
    help="Mixed precision, for --format compressed-tensors and gguf: mean bits of a value over the "
    "linears of the LLM's layers, from 4 to 8, scales not counted. Those that cost the most KL, as "
    "measured on calibration data, get 8 bits (5 or 8 in gguf), the rest 4. Head and vision tower "
    "are in the search: their linears get 8 bits beside B, or 16, whose other 8 count in B.",
)  # fmt: skip
@click.option(
    "--keep-fp16", type=click.Choice(MODULES), multiple=True,
    help="Leave this out of the search of --bits-per-weight: it stays float16. May be given twice.",
)  # fmt: skip
@click.option(
    "--calib", type=FILE, metavar="FILE_OR_DIR",
    help="Own calibration texts: .txt, .jsonl (text, answer, image), LLaVA's .json "
    "(conversations) or a folder of them.",
)  # fmt: skip
@click.option(
    "--calib-images", type=FILE, metavar="DIR",
    help="Own calibration images; image paths of --calib may be relative to it.",
)  # fmt: skip
@click.option("--text-only", is_flag=True, help="Calibrate without images, e.g. to compare.")
@click.option(
    "--eval", "eval_data", type=FILE, metavar="FILE_OR_DIR",
    help="Own held-out data, as --calib, to compare with the original on; or the word "
    f"{BUILTIN}. Default: {BUILTIN}, nothing for rtn.",
)  # fmt: skip
@click.option("--no-eval", is_flag=True, help="Don't compare the result with the original.")
@click.option(
    "--max-kl", type=click.FloatRange(min=0), metavar="X", callback=no_nan,
    help="Exit code 1 if the mean KL of text or of answers about images is above X.",
)  # fmt: skip
@click.option(
    "--format", "formats", type=FormatNames(), default="awq", show_default=True,
    help=f"How the 4-bit weights are stored: {', '.join(FORMATS)}; several come into OUT/NAME/.",
)  # fmt: skip
@click.option(
    "--device", type=click.Choice(DEVICES), default=DEVICES[0], show_default=True,
    help="auto: the GPU if there is one with room, else the CPU.",
)  # fmt: skip
@click.option(
    "--prompt-template", metavar="NAME",
    help="vicuna_v1, llama_3, llama_3_original, hermes-2 or qwen2; what the configs name, or LLM "
    "and tokenizer tell, if left out.",
)  # fmt: skip
@click.option(
    "--lora", type=FILE, metavar="ADAPTER",
    help="Folder of a LoRA adapter, as peft or VILA's training saves it, to merge in first.",
)  # fmt: skip
@click.option(
    "--plan", "plan_only", is_flag=True, help="Show sizes, memory and time; reads no weights."
)
@click.option(
    "--resume", is_flag=True,
    help="Go on from the finished layers that a run which ended early has left in OUT.partial "
    "(rtn leaves them if it was given this too).",
)  # fmt: skip
@click.option(
    "--layers", metavar="A:B",
    help="Quantize only these decoder layers, from A up to but not including B, counted from 0, "
    "into OUT.partial, which several computers may share; awq and rtn. When all are finished, "
    "the command with --resume and without this joins them.",
)  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Chooses calibration samples.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan or report as JSON.")
def main(
    checkpoint: Path,
    out: Path | None,
    algorithm: str,
    group_size: int,
    symmetric: bool,
    bits_per_weight: float | None,
    keep_fp16: tuple[str, ...],
    calib: Path | None,
    calib_images: Path | None,
    text_only: bool,
    eval_data: Path | None,
    no_eval: bool,
    max_kl: float | None,
    formats: tuple[str, ...],
    device: str,
    prompt_template: str | None,
    lora: Path | None,
    plan_only: bool,
    resume: bool,
    layers: str | None,
    seed: int,
    as_json: bool,
) -> None:
    """Quantize the language model of CHECKPOINT, a VILA folder, to 4 bits.

    CHECKPOINT may also be OWNER/NAME or OWNER/NAME@REVISION on the Hugging Face Hub.

    \b
    vila-quantize VILA1.5-3b -o VILA1.5-3b-awq
    vila-quantize VILA1.5-3b -o out --calib my-questions.jsonl --calib-images photos
    vila-quantize VILA1.5-3b --plan
    """
    if out is None and not plan_only:
        raise click.UsageError("-o is missing: name the folder to write, or give --plan")
    if max_kl is not None and (no_eval or layers is not None):
        raise click.UsageError("--no-eval and --layers leave nothing for --max-kl to do")
    try:
        options = quantize_options(
            algorithm=algorithm, group_size=group_size, symmetric=symmetric,
            bits_per_weight=bits_per_weight, keep_fp16=keep_fp16,
            calib=calib, calib_images=calib_images, text_only=text_only,
            eval=BUILTIN if eval_data is None and max_kl is not None else eval_data,
            no_eval=no_eval, formats=formats, device=device, prompt_template=prompt_template,
            seed=seed, lora=lora, layers=layers,
        )  # fmt: skip
    except VilaDeployError as error:
        raise click.UsageError(str(error)) from error
    if plan_only or out is None:
        _plan(checkpoint, options, as_json)
    elif options.layers is not None:
        _quantize_layers(checkpoint, out, options, resume, as_json)
    else:
        _quantize(checkpoint, out, options, resume, as_json, max_kl)


def _plan(checkpoint: Path, options: QuantizeOptions, as_json: bool) -> None:
    from vila_deploy.checkpoint.hub import planned_checkpoint

    with planned_checkpoint(checkpoint, options.prompt_template) as (folder, download):
        note_unused(folder, options.prompt_template)
        _show_plan_of(folder, options, as_json, download)


def _show_plan_of(
    folder: Path, options: QuantizeOptions, as_json: bool, download: Download | None
) -> None:
    from vila_deploy.builder.fit import fit_everywhere
    from vila_deploy.builder.video_plan import video_json, video_line
    from vila_deploy.checkpoint.config import config_of
    from vila_deploy.checkpoint.folder_layout import find_layout
    from vila_deploy.checkpoint.lora import open_adapter
    from vila_deploy.engine.build_request import resolve_limits
    from vila_deploy.processing.own_template import follow_tokenizer
    from vila_deploy.processing.vocabulary import check_vocabulary
    from vila_deploy.quantize.estimate.plan import check_not_quantized, measured_plan

    layout = find_layout(folder)
    tokenizer = layout.folder("llm")
    config = follow_tokenizer(config_of(layout, options.prompt_template), tokenizer)
    check_vocabulary(tokenizer, config)
    if options.lora is not None:
        check_not_quantized(config)
        open_adapter(options.lora, config)
    planned = measured_plan(config, options)
    limits = resolve_limits(config)
    fits = fit_everywhere(config, "int4", limits)
    if as_json:
        targets = {"targets": [fit.to_json() for fit in fits], "video": video_json(config, limits)}
        echo_json({**planned.to_json(), **targets, **download_json(download)})
    else:
        show_download(download)
        _show_plan(planned, fits)
        click.echo(video_line(config, limits))


def _quantize(
    checkpoint: Path,
    out: Path,
    options: QuantizeOptions,
    resume: bool,
    as_json: bool,
    max_kl: float | None,
) -> None:
    from vila_deploy.checkpoint.config import load_config
    from vila_deploy.checkpoint.hub import fetch_checkpoint, planned_checkpoint

    with planned_checkpoint(checkpoint, options.prompt_template) as (folder, _):
        note_unused(folder, options.prompt_template)
    with _layers_kept(out, resume):
        # Inside, since this takes seconds, in which Ctrl-C finds an earlier run's layers.
        from vila_deploy.quantize.pipeline import quantize

        report = quantize(checkpoint, out, options, resume=resume)
    if as_json:
        echo_json(report)
    else:
        before, after = report["input_bytes"] / 1e6, report["output_bytes"] / 1e6
        click.echo(f"{out}: {before:,.1f} MB → {after:,.1f} MB of weights; see {out / 'report.md'}")
        for line in _quality(report):
            click.echo(line)
    config = load_config(fetch_checkpoint(checkpoint), options.prompt_template)
    for warning in _unknown_texts(report, config.llm.vocab_size):
        click.echo(f"warning: {warning}", err=True)
    if max_kl is not None:
        _check_kl(out, report, max_kl)


def _quantize_layers(
    checkpoint: Path, out: Path, options: QuantizeOptions, resume: bool, as_json: bool
) -> None:
    with _layers_kept(out, resume):
        from vila_deploy.quantize.layer_range import layers_text
        from vila_deploy.quantize.pipeline import quantize_layers

        done = quantize_layers(checkpoint, out, options, resume=resume)
    if as_json:
        echo_json(done)
        return
    line = f"{done['work_folder']}: {layers_text(done['layers'])} finished"
    if done["remaining"]:
        click.echo(f"{line}; still to do, here or elsewhere: {layers_text(done['remaining'])}")
    else:
        click.echo(f"{line}; all are: the command with --resume and without --layers writes {out}")


@contextmanager
def _layers_kept(out: Path, resume: bool) -> Iterator[None]:
    """Say at Ctrl-C that finished layers are kept, if there are any, and end."""
    from vila_deploy.quantize.estimate.plan import work_path

    try:
        yield
    except KeyboardInterrupt:
        if not any(work_path(out).glob("layer-*.safetensors")):
            raise
        go_on = "the same command goes on" if resume else "--resume goes on from there"
        click.echo(f"interrupted: finished layers are kept in {work_path(out)}; {go_on}", err=True)
        sys.exit(EXIT_INTERRUPTED)


def _quality(report: dict[str, Any]) -> Iterator[str]:
    from vila_deploy.quantize.report import PREDICTED

    for kind, scores in report["evaluation"]["quality"].items() if report["evaluation"] else ():
        if scores and kind != "all":
            perplexity = f"{scores['perplexity_original']:.4g} → {scores['perplexity']:.4g}"
            agreement = f"top-1 agreement {scores['top1_agreement']:.1%}"
            kl = f"mean KL {scores['kl_mean']:.3g}"
            yield f"{PREDICTED[kind]}: perplexity {perplexity}, {kl}, {agreement}"


def _unknown_texts(report: dict[str, Any], vocab_size: int) -> Iterator[str]:
    """Yield a warning for each kind of text where guessing would do better than the original."""
    from vila_deploy.quantize.report import PREDICTED

    for kind, scores in report["evaluation"]["quality"].items() if report["evaluation"] else ():
        if scores and kind != "all" and not scores["perplexity_original"] <= vocab_size:
            yield (
                f"{PREDICTED[kind]}: the original's perplexity, "
                f"{scores['perplexity_original']:.3g}, is above the {vocab_size:,} of guessing, so "
                "this model does not know these texts; evaluate it on its own with --eval"
            )


def _check_kl(out: Path, report: dict[str, Any], most: float) -> None:
    """End with exit code 1 if the result is too far from the original; the output is kept."""
    from vila_deploy.quantize.report import PREDICTED, worst_kl

    kind, worst = worst_kl(report["evaluation"])
    if not worst <= most:
        fail(
            f"{out}: mean KL of {PREDICTED[kind]} is {worst:.4g}, above --max-kl {most:g}; "
            "the output is kept. Try a smaller --group-size, or --calib with data of your own"
        )


def _show_plan(planned: QuantizePlan, fits: list[Fit]) -> None:
    from vila_deploy.cli.common import show_fits, show_plan
    from vila_deploy.utils.progress import clock

    show_plan(planned.items.values(), planned.steps)
    if planned.output_bytes:
        click.echo(f"output: {planned.output_bytes / 1e6:,.1f} MB of weights")
    if planned.kept_bytes:
        kept = planned.kept_bytes / 1e6
        click.echo(
            f"on the disk until it is complete, for --resume: {kept:,.1f} MB of finished layers"
        )
    if planned.scratch_bytes:
        scratch = planned.scratch_bytes / 1e6
        click.echo(f"on the disk while it runs: {scratch:,.1f} MB of activations")
    verdict = "fits" if planned.fits else "does not fit"
    click.echo(
        f"needs about {planned.device_bytes / 1e9:.1f} GB, "
        f"{planned.limit_bytes / 1e9:.1f} GB are available: {verdict}"
    )
    if planned.seconds is not None:
        click.echo(f"takes about {clock(planned.seconds)} on this CPU with nothing else to do")
    click.echo("\nThe 4-bit model, when it runs:")
    show_fits(fits)
