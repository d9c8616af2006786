"""Why llama.cpp's own programs can't show a model images: no projector type says what it does.

Source: tools/mtmd of github.com/ggml-org/llama.cpp (b11434); docs/llamacpp.md has measurements.
"""

from __future__ import annotations

from typing import NoReturn

from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.utils.errors import VilaDeployError


def refuse_mmproj(config: VilaConfig) -> NoReturn:
    """Say in one line why no mmproj file of this model is written, and what takes its images."""
    raise VilaDeployError(
        f"no mmproj file is written: {_reason(config)}",
        fix="use vila-build-engine --backend llamacpp, which gives llama.cpp's decoder the model's "
        "own image embeddings",
    )


def _reason(config: VilaConfig) -> str:
    if config.tiling.uses_s2:
        return "no projector type of llama.cpp joins features of several scales"
    if config.projector.window > 2:
        side = config.projector.window
        return f"no projector type of llama.cpp joins {side}×{side} patches"
    if config.projector.window == 2 and config.token_order == "column":
        return (
            "llama.cpp hands on joined patches row by row, this model was trained with them column "
            "by column"
        )
    if config.projector.window == 2:
        return (
            "llama.cpp's nearest projector type, lfm2, gives images that aren't square another "
            "grid of tokens and ends with an error at large ones"
        )
    return "whether llama.cpp's projector type mlp gives this model's features was not tried"
