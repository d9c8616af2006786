"""vila-convert: write a checkpoint in other on-disk formats."""

from __future__ import annotations

from pathlib import Path

import click

from vila_deploy.cli.common import FilePath, command, echo_json
from vila_deploy.cli.formats import FormatNames
from vila_deploy.formats.registry import FORMATS

REPOSITORY = "triton-repository"
# Refused with a reason, which depends on the model.
MMPROJ = "mmproj"


@command("vila-convert")
@click.argument("checkpoint", type=FilePath())
@click.option(
    "--to", "formats", type=FormatNames(REPOSITORY, hidden=(MMPROJ,)), required=True,
    help=f"Format to write: {', '.join(FORMATS)}; several come into OUT/NAME/. Or {REPOSITORY}: "
    "a model repository for Triton Inference Server around an engine.",
)  # fmt: skip
@click.option(
    "-o", "--out", type=FilePath(), required=True,
    help="Folder to write; new or empty.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the folder of each format as JSON.")
def main(checkpoint: Path, formats: tuple[str, ...], out: Path, as_json: bool) -> None:
    """Write CHECKPOINT, quantized to 4 bits, in another format, weight for weight.

    awq is AutoAWQ's GEMM layout in safetensors, which vila-quantize writes if not told otherwise;
    tinychat is the one *-v2.pt of llm-awq and of VILA's published AWQ repositories. CHECKPOINT may
    be in any of the formats; docs/formats.md says which tool reads which. gguf takes one that is
    not quantized too. For triton-repository give the folder of an engine.

    \b
    vila-convert VILA1.5-3b-AWQ --to awq -o VILA1.5-3b-autoawq
    vila-convert my-quantized --to tinychat -o my-tinychat
    vila-convert my-quantized --to gguf -o my-gguf
    vila-convert my-engine --to triton-repository -o models
    """
    if REPOSITORY in formats:
        if len(formats) > 1:
            raise click.UsageError(f"{REPOSITORY} is of an engine, the formats of a checkpoint")
        from vila_deploy.integrations.triton.repository import write_repository

        write_repository(checkpoint, out)
        if as_json:
            echo_json({"repository": str(out)})
        else:
            click.echo(
                f"{out}: tritonserver --model-repository {out} --disable-auto-complete-config"
            )
        return
    if MMPROJ in formats:
        from vila_deploy.checkpoint.config import load_config
        from vila_deploy.checkpoint.hub import planned_checkpoint
        from vila_deploy.writers.mmproj import refuse_mmproj

        with planned_checkpoint(checkpoint) as (folder, _):
            refuse_mmproj(load_config(folder))
    from vila_deploy.writers.convert import convert

    convert(checkpoint, out, formats)
    if as_json:
        folders = {name: str(out / name if len(formats) > 1 else out) for name in formats}
        echo_json({"checkpoint": str(out), "formats": folders})
    else:
        click.echo(f"{out}: {', '.join(formats)}")
