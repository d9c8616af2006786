"""vila-convert: a quantized checkpoint in another on-disk format."""

from __future__ import annotations

from pathlib import Path

import click

from vila_deploy.cli.common import command_errors

FORMATS = ("awq", "tinychat")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--to", "to", type=click.Choice(FORMATS), required=True, help="Format to write.")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), required=True,
    help="Folder to write; must not exist.",
)  # fmt: skip
@command_errors
def main(checkpoint: Path, to: str, out: Path) -> None:
    """Write the quantized CHECKPOINT in another format, weight for weight.

    awq is AutoAWQ's GEMM layout in safetensors, which vila-quantize writes; tinychat is the one
    *-v2.pt of llm-awq and of VILA's published AWQ repositories. Either is read by every command.

    \b
    vila-convert VILA1.5-3b-AWQ --to awq -o VILA1.5-3b-autoawq
    vila-convert my-quantized --to tinychat -o my-tinychat
    """
    from vila_deploy.convert import convert

    convert(checkpoint, out, to)
    click.echo(f"{out}: {to}")
