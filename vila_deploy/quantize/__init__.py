"""Quantize a checkpoint's language model to 4 bits, one decoder layer at a time.

The package can be called: `vila_deploy.quantize(checkpoint, out)` is `quantize_checkpoint`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from vila_deploy.quantize.options import ALGORITHMS, DEVICES, quantize_options


def quantize_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    *,
    algorithm: str = ALGORITHMS[0],
    group_size: int = 128,
    symmetric: bool = False,
    calib: str | Path | None = None,
    calib_images: str | Path | None = None,
    text_only: bool = False,
    eval: str | Path | None = None,
    no_eval: bool = False,
    format: str | Sequence[str] = "awq",
    device: str = DEVICES[0],
    prompt_template: str | None = None,
    resume: bool = False,
    seed: int = 0,
    lora: str | Path | None = None,
    layers: str | None = None,
    bits_per_weight: float | None = None,
    keep_fp16: Sequence[str] = (),
) -> dict[str, Any]:
    """Write the 4-bit checkpoint `out` and return its report, as in `out`/report.json.

    The options are those of `vila-quantize`, see docs/cli.md; `format` names one format or several.
    With `layers`, such as "0:16", only these are quantized, into OUT.partial; the value then says
    which are still missing.

    Raises:
        VilaDeployError: an option, the checkpoint, the data or the disk is wrong.
    """
    options = quantize_options(
        algorithm=algorithm,
        group_size=group_size,
        symmetric=symmetric,
        calib=calib,
        calib_images=calib_images,
        text_only=text_only,
        eval=eval,
        no_eval=no_eval,
        formats=tuple(format.split(",")) if isinstance(format, str) else tuple(format),
        device=device,
        prompt_template=prompt_template,
        seed=seed,
        lora=lora,
        layers=layers,
        bits_per_weight=bits_per_weight,
        keep_fp16=keep_fp16,
    )
    from vila_deploy.quantize.pipeline import quantize, quantize_layers

    run = quantize if options.layers is None else quantize_layers
    return run(Path(checkpoint), Path(out), options, resume=resume)


class _CallablePackage(ModuleType):
    """Let `vila_deploy.quantize` be function and package, whichever is imported first."""

    __call__ = staticmethod(quantize_checkpoint)


sys.modules[__name__].__class__ = _CallablePackage
