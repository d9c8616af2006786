"""The model of vision_cases.py as a checkpoint, to compare with numbers of the original code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.support import vision_cases as cases
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.model.vila import ReferenceSession


def write_checkpoint(root: Path, qwen2: bool = False, scales: int = 1, **changes: Any) -> Path:
    """The model of vision_cases.py as a checkpoint in float32; `changes` are root keys.

    `llm` among them are keys of llm/config.json, `processor_size` is that of the pixels.
    """
    llm = {**(cases.QWEN2 if qwen2 else cases.LLAMA), **changes.pop("llm", {})}
    size = changes.pop("processor_size", 30)
    parts: dict[str, tuple[dict[str, np.ndarray], dict[str, Any]]] = {
        "llm": (
            cases.qwen2_weights() if qwen2 else cases.llama_weights(),
            {**llm, "architectures": ["Qwen2ForCausalLM" if qwen2 else "LlamaForCausalLM"]},
        ),
        "vision_tower": (
            cases.siglip_weights(),
            {**cases.SIGLIP, "model_type": "siglip_vision_model"},
        ),
        "mm_projector": (
            cases.projector_weights(cases.HIDDEN * scales),
            {"mm_projector_type": "mlp_downsample"},
        ),
    }
    for part, (weights, config) in parts.items():
        (root / part).mkdir(parents=True)
        save_file(weights, root / part / "model.safetensors")
        (root / part / "config.json").write_text(json.dumps(config))
    processor = {
        "size": {"height": size, "width": size}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    (root / "vision_tower" / "preprocessor_config.json").write_text(json.dumps(processor))
    (root / "config.json").write_text(json.dumps({"image_aspect_ratio": "resize", **changes}))
    return root


def session_of(root: Path) -> ReferenceSession:
    return ReferenceSession(open_checkpoint(root))
