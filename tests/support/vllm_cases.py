"""Small random checkpoints of every kind that runs under vLLM, and questions about images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from vila_deploy.processing.placeholders import Media
from vila_deploy.runtime.prompt import Message

CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
LLAMA_3 = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
)  # fmt: skip
QWEN2: dict[str, Any] = {"qwen2": True, "kv_heads": 2, "added_tokens": CHATML}
INTERNVIT: dict[str, Any] = {
    "tower": "internvit", "projector": "mlp_downsample", "kv_heads": 1, "added_tokens": CHATML,
}  # fmt: skip
# As VILA1.5-3b, Llama-3-VILA1.5-8B, VILA1.5-40b, NVILA, NVILA-Lite and NVILA-8B-Video.
CASES: dict[str, dict[str, Any]] = {
    "Llama": {"image": 84},
    "Llama-3": {"kv_heads": 2, "added_tokens": LLAMA_3},
    "40B: InternViT, ChatML": INTERNVIT,
    "CLIP": {"tower": "clip", "projector": "mlp2x_gelu"},
    "static S2": {
        "scales": 2, "root_config": {"s2": True, "s2_scales": "70,140", "s2_max_split_size": 70},
        "image": 70, "preprocessor_config": {"size": {"height": 140, "width": 140}},
    },
    "NVILA: dynamic S2": {
        **QWEN2, "scales": 3, "max_length": 2048,
        "root_config": {
            "image_aspect_ratio": "dynamic_s2", "dynamic_s2": True, "s2_scales": "42,84,126",
            "s2_max_split_size": 42, "s2_resize_output_to_scale_idx": -1,
        },
    },
    "NVILA-Lite: tiles": {
        **QWEN2, "projector": "mlp_downsample_3x3_fix", "image": 70, "max_length": 2048,
        "root_config": {"image_aspect_ratio": "dynamic", "min_tiles": 1, "max_tiles": 6},
    },
    "NVILA-Video: windows of frames": {
        **QWEN2, "projector": "mlp_downsample_2x2_fix",
        "root_config": {
            "video_encoder": {"_target_": "x.TSPVideoEncoder", "pool_sizes": [[4, 1, 1]]},
            "num_video_frames": 8,
        },
    },
}  # fmt: skip


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """Return random colours in blocks, an image of `size`."""
    colours = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(colours).resize(size, Image.Resampling.NEAREST)


def questions(case: str) -> list[list[Message]]:
    """Return conversations: one image, wide and tall; several; two turns; a video; none."""
    wide, tall, square = picture(0, (300, 90)), picture(1, (80, 200)), picture(2, (64, 64))
    asked: list[list[tuple[str, Media | str]]] = [
        [("user", wide), ("user", "what is it")],
        [("user", tall), ("user", "the colour of the image")],
        [("user", square), ("user", tall), ("user", "the first or the second")],
        [("user", "the"), ("user", wide), ("user", "and"), ("user", square), ("user", "it")],
        [("user", square), ("user", "in the"), ("assistant", "on the"), ("user", "is there")],
        [("user", "who are you")],
    ]
    frames = [picture(seed, (96, 64)) for seed in range(3, 11)]
    if "Video" in case or "CLIP" in case:
        asked.append([("user", frames), ("user", "what is on")])
    return [_messages(parts) for parts in asked]


def _messages(parts: Sequence[tuple[Any, Media | str]]) -> list[Message]:
    messages: list[Message] = []
    for role, part in parts:
        if messages and messages[-1].role == role:
            messages[-1] = Message(role, (*messages[-1].content, part))
        else:
            messages.append(Message(role, (part,)))
    return messages
