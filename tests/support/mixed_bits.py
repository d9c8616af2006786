"""Checkpoints whose linears have several numbers of bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.baseline_environment import round_checkpoint
from tests.support.tiny import make_checkpoint
from vila_deploy.formats.base import QuantScheme

GROUP_SIZE = 32
# Merged linears with a part between two others, behind another, and whole; 5 stands for 8 in
# formats without it.
LINEAR_BITS = {
    "model.layers.0.self_attn.k_proj": 8,
    "model.layers.0.mlp.up_proj": 8,
    "model.layers.0.mlp.down_proj": 5,
    "model.layers.1.self_attn.q_proj": 8,
    "model.layers.1.self_attn.k_proj": 5,
    "model.layers.1.self_attn.o_proj": 8,
    "model.layers.1.mlp.gate_proj": 5,
    "model.layers.1.mlp.up_proj": 8,
}


def make_mixed_checkpoint(
    folder: Path, format: str = "compressed-tensors", symmetric: bool = False, **changes: Any
) -> Path:
    """A made checkpoint with LINEAR_BITS in `folder`; `changes` are fields of Tiny."""
    bits = {name: max(8, n) if format != "gguf" else n for name, n in LINEAR_BITS.items()}
    scheme = QuantScheme(GROUP_SIZE, symmetric, linear_bits=bits)
    root = make_checkpoint(folder / "fp16", **changes)
    return round_checkpoint(root, folder / "mixed", [format], scheme)
