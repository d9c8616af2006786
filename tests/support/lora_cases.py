"""LoRA adapters of made checkpoints, trained, saved and merged by peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vila_deploy.checkpoint import Checkpoint

# How VILA's model names its parts (llava/model/llava_arch.py).
PART_PREFIXES = {
    "llm": "llm.",
    "vision": "vision_tower.vision_tower.",
    "projector": "mm_projector.",
}


def tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return every tensor of a checkpoint under its name in VILA's model."""
    return {
        prefix + name: getattr(checkpoint, part).tensor(name)
        for part, prefix in PART_PREFIXES.items()
        for name in getattr(checkpoint, part).names()
    }


def module_tree(values: dict[str, Tensor]) -> nn.Module:
    """Return modules that hold `values` under their names: linears, an embedding, parameters."""
    root = nn.Module()
    for name, value in values.items():
        *path, kind = name.split(".")
        module = root
        for step in path[:-1]:
            if not hasattr(module, step):
                module.add_module(step, nn.Module())
            module = getattr(module, step)
        if not hasattr(module, path[-1]):
            module.add_module(path[-1], _holder(".".join(path), values))
        parameter = nn.Parameter(value.clone(), requires_grad=False)
        setattr(getattr(module, path[-1]), kind, parameter)
    return root


def _holder(name: str, values: dict[str, Tensor]) -> nn.Module:
    weight = values.get(f"{name}.weight")
    if weight is None or weight.ndim != 2 or name.endswith("position_embedding"):
        return nn.Module()
    if name.endswith("embed_tokens"):
        return nn.Embedding(*weight.shape, dtype=weight.dtype)
    return nn.Linear(*reversed(weight.shape), f"{name}.bias" in values, dtype=weight.dtype)


def make_adapter(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    trained_in_full: str = "",
    prefix: str = "",
    safe: bool = True,
    **config: Any,
) -> dict[str, Tensor]:
    """Save an adapter with random values in `folder` and return the tensors of peft's merge.

    Args:
        trained_in_full: what begins the names of parameters that non_lora_trainables.bin holds.
        prefix: the part of VILA's model that is wrapped; empty: all of it.
        config: of peft's LoraConfig.
    """
    from peft import LoraConfig, get_peft_model

    values = {
        name.removeprefix(prefix): value
        for name, value in tensors(checkpoint).items()
        if name.startswith(prefix)
    }
    torch.manual_seed(5)
    model = get_peft_model(module_tree(values), LoraConfig(**config))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or (trained_in_full and trained_in_full in name):
            noise = 0.05 * torch.randn(parameter.shape, dtype=torch.float32)
            magnitude = "magnitude" in name
            parameter.data = (
                parameter.data * (1 + noise) if magnitude else parameter.data + noise
            ).to(parameter.dtype)
    model.save_pretrained(str(folder), safe_serialization=safe)
    if not safe:
        torch.save(dict(_saved(folder)), folder / "adapter_model.bin")
    if trained_in_full:
        # As VILA's llava_trainer.py saves what was trained without LoRA.
        full = {n: p for n, p in model.named_parameters() if trained_in_full in n}
        torch.save(full, folder / "non_lora_trainables.bin")
    merged = model.merge_and_unload().state_dict()
    return {prefix + name: value for name, value in merged.items()}


def _saved(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    file = folder / "adapter_model.safetensors"
    if not file.exists():
        return torch.load(folder / "adapter_model.bin", weights_only=True)
    values = load_file(file)
    file.unlink()
    return values
