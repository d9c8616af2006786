"""A quantized checkpoint in another on-disk format: the same 4-bit levels, scales and zeros."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from vila_deploy.checkpoint import Checkpoint, open_checkpoint
from vila_deploy.checkpoint.expected import EMBEDDING, HEAD, decoder_linears
from vila_deploy.checkpoint.layout import llm_config_values
from vila_deploy.errors import VilaDeployError
from vila_deploy.files import canonical_json, new_folder
from vila_deploy.formats import awq_gemm, tinychat
from vila_deploy.formats.quantized_linear import QuantizedLinear
from vila_deploy.model.llm import NORMS
from vila_deploy.progress import progress
from vila_deploy.quantize.output import (
    ShardWriter,
    copy_parts,
    write_checksums,
    write_llm_config,
)
from vila_deploy.quantize.round import to_float16
from vila_deploy.quantize.scheme import QuantScheme

Pack = Callable[[QuantizedLinear], dict[str, Tensor]]


def convert(root: Path, out: Path, to: str) -> None:
    """Writes the quantized checkpoint `root` as `out`, which appears whole or not at all.

    Args:
        to: a key of CONVERTERS.

    Raises:
        VilaDeployError: not quantized, sizes that the format can't hold, anything wrong with
            `root` or the disk.
    """
    checkpoint = open_checkpoint(root)
    if checkpoint.config.llm.quantization is None:
        raise VilaDeployError(
            "is not quantized", where=root, fix="run vila-quantize first and convert its output"
        )
    with new_folder(out) as folder:
        copy_parts(checkpoint, folder)
        CONVERTERS[to](checkpoint, folder)
        write_checksums(folder)


def _to_awq(checkpoint: Checkpoint, folder: Path) -> None:
    """AutoAWQ's GEMM layout in safetensors, as vila-quantize writes it."""
    quantization = checkpoint.config.llm.quantization
    assert quantization is not None
    writer = ShardWriter(folder / "llm")
    for name, tensor in _packed(checkpoint, awq_gemm.pack):
        writer.add(name, tensor)
    writer.finish()
    scheme = QuantScheme(quantization.group_size, symmetric=not quantization.zero_point)
    write_llm_config(checkpoint, folder, scheme)


def _to_tinychat(checkpoint: Checkpoint, folder: Path) -> None:
    """One file of torch.save, as llm-awq's --dump_quant writes it; all of it passes memory."""
    quantization = checkpoint.config.llm.quantization
    assert quantization is not None
    tensors = dict(_packed(checkpoint, tinychat.pack))
    name = f"{checkpoint.root.resolve().name}-w4-g{quantization.group_size}-awq-v2.pt"
    torch.save(tensors, folder / "llm" / name)
    values = llm_config_values(checkpoint.layout)
    (folder / "llm" / "config.json").write_text(canonical_json(values), "utf-8")


CONVERTERS: dict[str, Callable[[Checkpoint, Path], None]] = {
    "awq": _to_awq,
    "tinychat": _to_tinychat,
}


def _packed(checkpoint: Checkpoint, pack: Pack) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of llm/ under its name, one layer in memory at a time; floats as float16."""
    llm, reader = checkpoint.config.llm, checkpoint.llm
    names = [EMBEDDING, "model.norm.weight"] + ([] if llm.tie_word_embeddings else [HEAD])
    with progress(llm.num_layers + 1, "converting") as advance:
        for name in names:
            yield name, to_float16(reader.tensor(name), name)
        advance("embeddings")
        for index in range(llm.num_layers):
            prefix = f"model.layers.{index}"
            for norm in NORMS:
                name = f"{prefix}.{norm}.weight"
                yield name, to_float16(reader.tensor(name), name)
            for linear_name in decoder_linears(llm):
                linear = reader.linear(f"{prefix}.{linear_name}")
                assert isinstance(linear, QuantizedLinear)
                for part, tensor in pack(linear).items():
                    yield f"{prefix}.{linear_name}.{part}", tensor
            advance(f"layer {index + 1}/{llm.num_layers}")
