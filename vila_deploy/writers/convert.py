"""Convert a quantized checkpoint to other on-disk formats: the same values, scales and zeros."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from vila_deploy.checkpoint import Checkpoint, open_checkpoint
from vila_deploy.checkpoint.config import VilaConfig, load_config
from vila_deploy.checkpoint.hub import fetch_checkpoint
from vila_deploy.checkpoint.llm_config import EMBEDDING, FINAL_NORM, HEAD, NORMS, layer_prefix
from vila_deploy.formats.base import QuantizationConfig, QuantizedLinear, to_float16
from vila_deploy.formats.registry import FORMATS
from vila_deploy.processing.vocabulary import check_vocabulary
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.files import check_new, new_folder
from vila_deploy.utils.progress import progress
from vila_deploy.writers.folder import CheckpointWriter, check_formats


def convert(root: Path, out: Path, formats: Sequence[str]) -> None:
    """Write the quantized checkpoint `root` as `out`, which appears whole or not at all.

    Args:
        root: of a checkpoint on this computer, or a repository's name on the hub.
        formats: keys of FORMATS; several come into folders of `out` that have their names.

    Raises:
        VilaDeployError: not quantized, sizes that a format can't hold, anything wrong with
            `root` or the disk.
    """
    root = fetch_checkpoint(root, lambda folder: _check(folder, out))
    checkpoint = open_checkpoint(root)
    quantization = _quantization(checkpoint.config, root)
    check_vocabulary(checkpoint.layout.folder("llm"), checkpoint.config)
    scheme = quantization.scheme
    check_formats(formats, checkpoint.config, scheme)
    for name in formats:
        if warning := FORMATS[name].packing.warning(scheme):
            print(f"warning: {warning}", file=sys.stderr)
    with new_folder(out) as folder:
        writer = CheckpointWriter(checkpoint, folder, formats, scheme)
        for name, value in _contents(checkpoint):
            writer.add(name, value)
        writer.finish()


def _check(root: Path, out: Path) -> None:
    """Raise VilaDeployError for what needs no weights to be known as wrong."""
    check_new(out)
    _quantization(load_config(root), root)


def _quantization(config: VilaConfig, root: Path) -> QuantizationConfig:
    if config.llm.quantization is None:
        raise VilaDeployError(
            "is not quantized", where=root, fix="run vila-quantize first and convert its output"
        )
    return config.llm.quantization


def _contents(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor | QuantizedLinear]]:
    """Yield everything in llm/ under its name, one linear in memory at a time."""
    llm, reader = checkpoint.config.llm, checkpoint.llm
    names = [EMBEDDING, FINAL_NORM] + ([] if llm.tie_word_embeddings else [HEAD])
    with progress(llm.num_layers + 1, "converting") as advance:
        for name in names:
            yield name, to_float16(reader.tensor(name), name)
        advance("embeddings")
        for index in range(llm.num_layers):
            prefix = layer_prefix(index)
            for norm in NORMS:
                name = f"{prefix}.{norm}.weight"
                yield name, to_float16(reader.tensor(name), name)
            for linear_name in llm.linears:
                linear = reader.linear(f"{prefix}.{linear_name}")
                assert isinstance(linear, QuantizedLinear)
                yield f"{prefix}.{linear_name}", linear
            advance(f"layer {index + 1}/{llm.num_layers}")
