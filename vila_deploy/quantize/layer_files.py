"""Write and read the finished decoder layers of a work folder, one safetensors file each."""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from vila_deploy.formats.awq import AWQ_GEMM
from vila_deploy.formats.base import BITS, QuantizedLinear
from vila_deploy.quantize.work_state import TEMPORARY_SUFFIX
from vila_deploy.utils.files import replace_file, sha256_file
from vila_deploy.writers.folder import packed, save_tensors

LAYER_FILE = re.compile(r"layer-(\d{5,})-([0-9a-f]{64})\.safetensors")


@dataclass(frozen=True)
class FinishedLayer:
    """A finished decoder layer.

    Args:
        tensors: norms and linears in the order in which they are written, by their names.
        entry: its entry in the report.
        seconds: how long it took.
    """

    tensors: dict[str, Tensor | QuantizedLinear]
    entry: dict[str, Any]
    seconds: float


def layer_files(path: Path) -> list[Path]:
    """Return the files of the finished layers in the work folder `path`, in order."""
    files = sorted(path.iterdir()) if path.is_dir() else []
    return [file for file in files if LAYER_FILE.fullmatch(file.name)]


def save_layer(path: Path, index: int, layer: FinishedLayer, sources: dict[str, str]) -> Path:
    """Write a layer into the work folder `path`; it counts as finished once its file has its name.

    Args:
        sources: digests of the files of weights that it was made from.
    """
    temporary = path / f"layer-{index:05d}-{secrets.token_hex(4)}{TEMPORARY_SUFFIX}"
    # Neither safetensors nor canonical JSON keeps an order, which shards and tables depend on.
    metadata = {
        "tensors": {n: _group_size(value) for n, value in layer.tensors.items()},
        "bits": {n: v.bits for n, v in layer.tensors.items() if isinstance(v, QuantizedLinear)},
        "entry": layer.entry,
        "seconds": layer.seconds,
        "sources": sources,
    }
    stored: dict[str, Tensor] = {}
    for name, value in layer.tensors.items():
        if isinstance(value, QuantizedLinear) and value.bits != BITS:
            stored |= _unpacked(name, value)
        else:
            stored |= packed(name, value, AWQ_GEMM)
    save_tensors(stored, temporary, {"layer": json.dumps(metadata)})
    file = path / f"layer-{index:05d}-{sha256_file(temporary)}.safetensors"
    replace_file(temporary, file)
    return file


def index_and_sources(file: Path) -> tuple[int, dict[str, str]] | None:
    """Return a layer's index and digests of its sources; None if its file is damaged."""
    match = LAYER_FILE.fullmatch(file.name)
    if not match or sha256_file(file) != match[2]:
        return None
    layer, sources = read_layer(file)
    # The entry has the index too, so that a renamed file is not taken for another layer.
    return (int(match[1]), sources) if layer.entry["layer"] == int(match[1]) else None


def _unpacked(name: str, linear: QuantizedLinear) -> dict[str, Tensor]:
    """Return the tensors of a linear in more than 4 bits, a byte for each value."""
    parts = {"q": linear.q, "scale": linear.scale, "zero": linear.zero, "bias": linear.bias}
    return {f"{name}.{part}": tensor for part, tensor in parts.items() if tensor is not None}


def _group_size(value: Tensor | QuantizedLinear) -> int | None:
    return value.group_size if isinstance(value, QuantizedLinear) else None


def read_layer(file: Path) -> tuple[FinishedLayer, dict[str, str]]:
    """Return a layer, and the digests of the files of weights that it was made from."""
    with safe_open(file, "pt") as opened:
        metadata = json.loads(opened.metadata()["layer"])
        stored = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    tensors: dict[str, Tensor | QuantizedLinear] = {}
    for name, group_size in metadata["tensors"].items():
        if group_size is None:
            tensors[name] = stored[name]
        else:
            prefix = f"{name}."
            parts = {n.removeprefix(prefix): t for n, t in stored.items() if n.startswith(prefix)}
            bits = metadata["bits"][name]
            tensors[name] = (
                AWQ_GEMM.unpack(parts, group_size)
                if bits == BITS
                else QuantizedLinear(**parts, bits=bits)
            )
    return FinishedLayer(tensors, metadata["entry"], metadata["seconds"]), metadata["sources"]


def read_sources(file: Path) -> dict[str, str]:
    """Return the digests of the files of weights that a layer was made from."""
    with safe_open(file, "pt") as opened:
        sources: dict[str, str] = json.loads(opened.metadata()["layer"])["sources"]
    return sources
