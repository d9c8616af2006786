"""A checkpoint with zeros beside its LLM's weights, which computes the same function.

For tools whose groups of 128 don't divide a small model's sizes: hidden size, heads and the MLP's
width become multiples. An RMS norm's mean is over more values then, so its weight and eps are
scaled.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

MULTIPLE = 128


def pad_llm(root: Path, out: Path) -> Path:
    """Copy the float16 checkpoint `root` to `out` with a padded LLM and projector."""
    shutil.copytree(root, out)
    config = json.loads((out / "llm" / "config.json").read_text("utf-8"))
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads, width = config["num_key_value_heads"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // heads
    group = heads // kv_heads
    kv_step = MULTIPLE // math.gcd(MULTIPLE, group * head_dim)
    new_width, new_kv = _up(width), _up(kv_heads, kv_step)
    # Transformers wants heads that divide it.
    new_hidden = _up(hidden, math.lcm(MULTIPLE, group * new_kv))
    queries, values = group * new_kv * head_dim, new_kv * head_dim
    shapes = {
        "q_proj": (queries, new_hidden), "k_proj": (values, new_hidden),
        "v_proj": (values, new_hidden), "o_proj": (new_hidden, queries),
        "gate_proj": (new_width, new_hidden), "up_proj": (new_width, new_hidden),
        "down_proj": (new_hidden, new_width),
    }  # fmt: skip
    path = out / "llm" / "model.safetensors"
    padded = {}
    for name, tensor in load_file(path).items():
        linear = name.split(".")[-2]
        if linear in shapes:
            padded[name] = _pad(tensor, shapes[linear][: tensor.ndim])
        elif tensor.ndim == 2:
            padded[name] = _pad(tensor, (len(tensor), new_hidden))
        else:
            scaled = tensor.float() * math.sqrt(hidden / new_hidden)
            padded[name] = _pad(scaled.to(tensor.dtype), (new_hidden,))
    save_file(padded, path, metadata={"format": "pt"})
    config |= {
        "hidden_size": new_hidden, "num_attention_heads": group * new_kv,
        "num_key_value_heads": new_kv, "intermediate_size": new_width, "head_dim": head_dim,
        "rms_norm_eps": config["rms_norm_eps"] * hidden / new_hidden,
    }  # fmt: skip
    (out / "llm" / "config.json").write_text(json.dumps(config), "utf-8")
    whole = json.loads((out / "config.json").read_text("utf-8"))
    (out / "config.json").write_text(json.dumps({**whole, "hidden_size": new_hidden}), "utf-8")
    _pad_projector(out / "mm_projector" / "model.safetensors", hidden, new_hidden)
    return out


def _pad_projector(path: Path, hidden: int, new_hidden: int) -> None:
    """Pad every side that is as wide as the LLM."""
    tensors = load_file(path)
    for name, tensor in tensors.items():
        shape = tuple(new_hidden if size == hidden else size for size in tensor.shape)
        tensors[name] = _pad(tensor, shape)
    save_file(tensors, path, metadata={"format": "pt"})


def _up(size: int, multiple: int = MULTIPLE) -> int:
    return -(-size // multiple) * multiple


def _pad(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    padded = torch.zeros(shape, dtype=tensor.dtype)
    padded[tuple(map(slice, tensor.shape))] = tensor
    return padded
