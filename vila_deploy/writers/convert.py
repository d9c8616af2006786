"""Convert a checkpoint to other on-disk formats: the same values, scales and zeros."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from vila_deploy.checkpoint import Checkpoint, open_checkpoint
from vila_deploy.checkpoint.config import load_config
from vila_deploy.checkpoint.hub import fetch_checkpoint
from vila_deploy.checkpoint.llm_config import EMBEDDING, FINAL_NORM, HEAD, NORMS, layer_prefix
from vila_deploy.formats.base import HEAD_LINEAR, QuantizedLinear, QuantScheme, to_float16
from vila_deploy.formats.registry import FORMATS
from vila_deploy.processing.vocabulary import check_vocabulary
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.files import check_new, new_folder
from vila_deploy.utils.progress import progress
from vila_deploy.writers.folder import CheckpointWriter, check_formats


def convert(root: Path, out: Path, formats: Sequence[str]) -> None:
    """Write the checkpoint `root` as `out`, which appears whole or not at all.

    Args:
        root: of a checkpoint on this computer, or a repository's name on the hub.
        formats: keys of FORMATS; several come into folders of `out` that have their names.

    Raises:
        VilaDeployError: not quantized, where a format is for quantized ones, sizes that a format
            can't hold, anything wrong with `root` or the disk.
    """
    root = fetch_checkpoint(root, lambda folder: _check(folder, out, formats))
    scheme = _check(root, out, formats)
    checkpoint = open_checkpoint(root)
    check_vocabulary(checkpoint.layout.folder("llm"), checkpoint.config)
    for name in formats:
        if scheme is not None and (warning := FORMATS[name].packing.warning(scheme)):
            print(f"warning: {warning}", file=sys.stderr)
    with new_folder(out) as folder:
        writer = CheckpointWriter(checkpoint, folder, formats, scheme)
        for name, value in _contents(checkpoint):
            writer.add(name, value)
        writer.finish()


def _check(root: Path, out: Path, formats: Sequence[str]) -> QuantScheme | None:
    """Return how it is quantized; raise VilaDeployError for what is wrong without its weights."""
    check_new(out)
    config = load_config(root)
    quantization = config.llm.quantization
    takes_all = all(FORMATS[name].writer.takes_unquantized for name in formats)
    if quantization is None and not takes_all:
        raise VilaDeployError(
            "is not quantized", where=root, fix="run vila-quantize first and convert its output"
        )
    scheme = None if quantization is None else quantization.scheme
    check_formats(formats, config, scheme)
    return scheme


def _contents(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor | QuantizedLinear]]:
    """Yield everything in llm/ under its name, one linear in memory at a time."""
    llm, reader = checkpoint.config.llm, checkpoint.llm
    own_head = not (llm.tie_word_embeddings or llm.head_is_quantized)
    names = [EMBEDDING, FINAL_NORM, *([HEAD] if own_head else [])]

    def tensor(name: str) -> tuple[str, Tensor]:
        stored = reader.tensor(name)
        return name, stored if llm.quantization is None else to_float16(stored, name)

    with progress(llm.num_layers + 1, "converting") as advance:
        for name in names:
            yield tensor(name)
        if llm.head_is_quantized:
            yield HEAD_LINEAR, reader.linear(HEAD_LINEAR)
        advance("embeddings")
        for index in range(llm.num_layers):
            prefix = layer_prefix(index)
            for norm in NORMS:
                yield tensor(f"{prefix}.{norm}.weight")
            for linear_name in llm.linears:
                full = f"{prefix}.{linear_name}"
                linear = reader.linear(full)
                if isinstance(linear, QuantizedLinear):
                    yield full, linear
                    continue
                yield f"{full}.weight", linear
                if llm.has_bias(linear_name):
                    yield tensor(f"{full}.bias")
            advance(f"layer {index + 1}/{llm.num_layers}")
