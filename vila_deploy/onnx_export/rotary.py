"""Tables of the rotary embedding; needs no onnx, which a device may lack."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vila_deploy.checkpoint.llm_config import LlmConfig


def rotary_tables(config: LlmConfig, max_seq_len: int) -> Iterator[Tensor]:
    """Yield cos and sin [max_seq_len, head_dim / 2] in float32, computed as Llama was trained."""
    exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents / config.rope_factor
    angles = torch.arange(max_seq_len).float()[:, None] * frequencies
    yield angles.cos()
    yield angles.sin()
