"""A checkpoint that answers every question with the same tokens, for what happens to answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.support.tiny import make_checkpoint
from vila_deploy.processing.tokenizer import load_tokenizer


def answering_checkpoint(root: Path, answer: Sequence[int], **variant: Any) -> Path:
    """Make a checkpoint whose layers add nothing, so that the last token alone says the next.

    Args:
        answer: token ids, none of them twice, behind a prompt that ends in ASSISTANT:.
    """
    make_checkpoint(root, layers=1, **variant)
    last = load_tokenizer(root / "llm").encode(" ASSISTANT:")[-1]
    file = root / "llm" / "model.safetensors"
    tensors = load_file(file)
    random = torch.Generator().manual_seed(7)
    rows = torch.randn(tensors["model.embed_tokens.weight"].shape, generator=random)
    rows *= rows.shape[1] ** 0.5 / rows.norm(dim=1, keepdim=True)
    head = torch.zeros_like(rows)
    for token, following in zip([last, *answer], answer, strict=False):
        head[following] += rows[token]
    tensors |= {"model.embed_tokens.weight": rows.half(), "lm_head.weight": head.half()}
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name] = torch.zeros_like(tensor)
        if name.endswith("norm.weight"):
            tensors[name] = torch.ones_like(tensor)
    save_file(tensors, file, {"format": "pt"})
    return root
