"""Small random NVILA checkpoints that SGLang's classes can read, with a tokenizer like Qwen2's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from tests.support.tiny import make_checkpoint

QWEN2_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_COMMON: dict[str, Any] = {
    "qwen2": True, "kv_heads": 2, "quantized": True, "max_length": 4096,
    "vision_hidden": 1152, "vision_layers": 2, "vision_heads": 16,
}  # fmt: skip
LITE: dict[str, Any] = {
    **_COMMON,
    "projector": "mlp_downsample_3x3_fix",
    "root_config": {"image_aspect_ratio": "dynamic"},
}
S2: dict[str, Any] = {
    **_COMMON, "scales": 3, "image": 448,
    "root_config": {
        "image_aspect_ratio": "dynamic_s2", "dynamic_s2": True, "s2_scales": "448,896,1344",
        "s2_max_split_size": 448, "s2_resize_output_to_scale_idx": -1,
    },
}  # fmt: skip


def make_nvila(root: Path, **overrides: Any) -> Path:
    """Write a checkpoint, LITE or S2 with changes, whose tokenizer is of Qwen2's kind."""
    make_checkpoint(root, **overrides)
    write_qwen2_tokenizer(root / "llm")
    return root


def write_qwen2_tokenizer(folder: Path) -> None:
    """Write a byte-level BPE with three merges, Qwen2's splitting and its special tokens."""
    merges = [("t", "h"), ("th", "e"), ("Ċ", "Ċ")]
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in QWEN2_SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    settings = {**special, "tokenizer_class": "Qwen2Tokenizer", "model_max_length": 4096}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), "utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2), "utf-8")
