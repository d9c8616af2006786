"""What the configs of released checkpoints say, value by value, and what must be made of them.

Values, not files: keys that no loader reads are left out. `source` says where they come from:
"page" (text of the hub's own page), "size" (rebuilt; as long as the hub's page in bytes), "script"
(rebuilt from the training scripts of NVlabs/VILA, where the page has not been seen).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.support.prompt_cases import write_tokenizer

Values = Mapping[str, Any]
SIGLIP: dict[str, Any] = {
    "architectures": ["SiglipVisionModel"], "model_type": "siglip_vision_model",
    "hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16,
    "intermediate_size": 4304, "patch_size": 14, "num_channels": 3, "attention_dropout": 0.0,
    "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "torch_dtype": "bfloat16",
}  # fmt: skip
INTERNVIT: dict[str, Any] = {
    "architectures": ["InternVisionModel"], "model_type": "intern_vit_6b", "hidden_size": 3200,
    "num_hidden_layers": 45, "num_attention_heads": 25, "intermediate_size": 12800,
    "patch_size": 14, "image_size": 448, "num_channels": 3, "hidden_act": "gelu",
    "layer_norm_eps": 1e-6, "norm_type": "rms_norm", "qkv_bias": False, "qk_normalization": True,
    "use_flash_attn": True, "initializer_factor": 0.1, "drop_path_rate": 0.0, "dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_intern_vit.InternVisionConfig"},
}  # fmt: skip
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
         "attention_bias": False, "attention_dropout": 0.0, "pretraining_tp": 1,
         "rms_norm_eps": 1e-5, "rope_scaling": None, "tie_word_embeddings": False,
         "tokenizer_padding_side": "right", "torch_dtype": "bfloat16"}  # fmt: skip
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
         "attention_dropout": 0.0, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "sliding_window": None,
         "max_window_layers": 28, "use_sliding_window": False, "bos_token_id": 151643,
         "eos_token_id": 151645, "torch_dtype": "bfloat16"}  # fmt: skip


def llm(base: Values, hidden: int, layers: int, heads: int, kv: int, inner: int, vocab: int,
        positions: int, longest: int | None = None, **more: Any) -> dict[str, Any]:  # fmt: skip
    longest = longest or positions
    return {
        **base, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv, "intermediate_size": inner, "vocab_size": vocab,
        "max_position_embeddings": positions, "model_max_length": longest,
        "tokenizer_model_max_length": longest, **more,
    }  # fmt: skip


SHEARED = llm(LLAMA, 2560, 32, 20, 20, 6912, 32000, 4096, rope_theta=1e4, bos_token_id=1,
              eos_token_id=2)  # fmt: skip
VICUNA_13B = llm(LLAMA, 5120, 40, 40, 40, 13824, 32000, 4096, rope_theta=1e4, bos_token_id=1,
                 eos_token_id=2)  # fmt: skip
LLAMA_2_7B = llm(LLAMA, 4096, 32, 32, 32, 11008, 32000, 4096, rope_theta=1e4, bos_token_id=1,
                 eos_token_id=2)  # fmt: skip
YI = llm(LLAMA, 7168, 60, 56, 8, 20480, 64000, 4096, rope_theta=5e6, bos_token_id=1, eos_token_id=7,
         use_cache=False)  # fmt: skip
LLAMA_3 = llm(LLAMA, 4096, 32, 32, 8, 14336, 128256, 8192, 4096, rope_theta=5e5,
              bos_token_id=128000, eos_token_id=128001)  # fmt: skip
FIRST_8B = "./checkpoints/vila-siglip-llama3-8b-pretrain_r4/llm"
FIX_8B = "/home/somebody/runs/july3/llama3_8b/mmc4_coyo/stage3/llm"
QWEN_1_5B = (1536, 28, 12, 2, 8960)
QWEN_7B = (3584, 28, 28, 4, 18944)
QWEN_14B = (5120, 48, 40, 8, 13824)
# Root keys of VILA1.5's code and of NVILA's.
VILA15: dict[str, Any] = {
    "architectures": ["LlavaLlamaModel"], "model_type": "llava_llama", "drop_path_rate": 0.0,
    "image_aspect_ratio": "resize", "interpolate_mode": "linear", "mm_projector_lr": None,
    "mm_use_im_patch_token": False, "mm_use_im_start_end": False, "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "cls_patch", "model_dtype": "torch.bfloat16", "num_video_frames": 8,
    "resume_path": "./vlm", "s2": False, "s2_max_split_size": 336, "s2_scales": "336,672,1008",
    "transformers_version": "4.36.2", "tune_language_model": True, "tune_mm_projector": True,
    "tune_vision_tower": True, "vision_resolution": -1,
}  # fmt: skip
NVILA: dict[str, Any] = {
    **VILA15, "chat_template": None, "dynamic_s2": False, "fps": 0.0, "mm_use_im_patch_token": True,
    "num_time_tokens": 0, "s2_max_split_size": 448, "s2_scales": "448,896,1344",
    "s2_resize_output_to_scale_idx": -1, "soft_ce_std": 1.0, "time_token_format": "<t{t}>",
    "time_token_ids": [], "transformers_version": "4.46.0",
}  # fmt: skip
DYNAMIC_S2 = {**NVILA, "image_aspect_ratio": "dynamic_s2", "dynamic_s2": True}
LITE = {**NVILA, "image_aspect_ratio": "dynamic"}
# LongVILA's code came between the two.
LONGVILA = {**VILA15, "fps": 0.0, "num_video_frames": 256, "transformers_version": "4.46.2"}
TSP = {"_target_": "llava.model.encoders.TSPVideoEncoder", "pool_sizes": [[8, 1, 1]]}
VIDEO = {**NVILA, "video_encoder": TSP, "num_video_frames": 256, "num_time_tokens": 100,
         "time_token_ids": list(range(151648, 151748))}  # fmt: skip
# As `generation_config.json` has them; the originals' own evaluation decodes greedily.
SAMPLES = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8,
           "repetition_penalty": 1.05, "eos_token_id": [151645, 151643]}  # fmt: skip


@dataclass(frozen=True)
class Expected:
    """What both plans and the parsed description must say."""

    template: str
    generation: str
    tokens_per_image: int
    tiling: str = "single"
    frames: int = 8
    tokens_per_video: int = 0
    longest: int = 4096
    rope_factor: float = 1.0
    stops: tuple[int, ...] = ()
    precision: str = "fp16"


@dataclass(frozen=True)
class Released:
    """Root config, llm/, tower, projector type and tokenizer kind of a checkpoint."""

    source: str
    root: Values
    llm: Values
    tower: Values
    projector: str
    tokenizer: str
    expected: Expected
    pixels: int | None = None
    generation: Values = field(default_factory=dict)
    llm_files: tuple[str, ...] = ()
    prompt_template: str | None = None


def siglip(pixels: int) -> dict[str, Any]:
    return {**SIGLIP, "image_size": pixels}


def vila15(source: str, language: Values, tokenizer: str, template: str, **root: Any) -> Released:
    """VILA1.5 with SigLIP-384; a video is 8 × (196 + 1) tokens."""
    expected = Expected(template, "vila1.5", 196, tokens_per_video=1576)
    return Released(
        source, {**VILA15, "hidden_size": language["hidden_size"], "mm_hidden_size": 1152, **root},
        language, siglip(384), "mlp_downsample", tokenizer, expected,
    )  # fmt: skip


def nvila(source: str, root: Values, sizes: tuple[int, ...], projector: str, expected: Expected,
          positions: int = 32768, vocab: int = 151648, **more: Any) -> Released:  # fmt: skip
    """A Qwen2 LLM with SigLIP-448."""
    language = llm(QWEN2, *sizes, vocab, positions, expected.longest, **more)
    width = 3456 if root["image_aspect_ratio"] == "dynamic_s2" else 1152
    return Released(
        source, {**root, "hidden_size": sizes[0], "mm_hidden_size": width}, language, siglip(448),
        projector, "qwen2", expected, generation=SAMPLES,
    )  # fmt: skip


MLP, FIX_2, FIX_3 = "mlp_downsample", "mlp_downsample_2x2_fix", "mlp_downsample_3x3_fix"
ENDS = (151643, 151645)
S2_EXPECTED = Expected("qwen2", "nvila", 3072, "dynamic_s2", 8, 2056, 8192, stops=ENDS)
LITE_EXPECTED = Expected("qwen2", "nvila", 1573, "dynamic", 8, 976, 4096, stops=ENDS)
TSP_EXPECTED = Expected("qwen2", "nvila", 256, "single", 256, 8224, 16384, stops=ENDS)
LONG_EXPECTED = Expected("qwen2", "nvila", 256, "single", 256, 65792, 65536, stops=ENDS)
THREE_B = vila15("page", SHEARED, "vicuna_v1", "vicuna_v1")
THIRTEEN_B = vila15("page", VICUNA_13B, "vicuna_v1", "vicuna_v1")
FIRST = vila15("size", {**LLAMA_3, "_name_or_path": FIRST_8B}, "llama_3, no BOS",
               "llama_3_original")  # fmt: skip
FIXED = vila15("size", {**LLAMA_3, "_name_or_path": FIX_8B}, "llama_3, no BOS", "llama_3")
FORTY_B = Released(
    "size", {**{k: v for k, v in VILA15.items() if k != "drop_path_rate"}, "hidden_size": 7168,
             "mm_hidden_size": 3200, "mm_vision_select_layer": -1,
             "mm_vision_select_feature": "patch", "resume_path": "vila1.5-34b"},
    YI, INTERNVIT, MLP, "hermes-2",
    Expected("hermes-2", "vila1.5", 256, tokens_per_video=8 * 257),
)  # fmt: skip


def preview(row: Released, conversation: str) -> Released:
    """The same with the remote code that VILA's export writes beside it."""
    added = {
        "architectures": ["VILAForCausalLM"],
        "model_type": "vila",
        "version": "2.0",
        "chat_template": conversation,
        "auto_map": {"AutoConfig": "modeling_vila.VILAConfig"},
    }
    return replace(row, root={**row.root, **added}, source="script")  # fmt: skip


RELEASED: dict[str, Released] = {
    "VILA1.5-3b": THREE_B,
    "VILA1.5-3b-s2": replace(
        vila15("size", SHEARED, "vicuna_v1", "vicuna_v1", s2=True, s2_scales="384,768",
               s2_max_split_size=384, mm_hidden_size=2304),
        expected=Expected("vicuna_v1", "vila1.5", 196, "s2", tokens_per_video=1576), pixels=768,
    ),
    "VILA1.5-7b": vila15("script", LLAMA_2_7B, "vicuna_v1", "vicuna_v1"),
    "VILA1.5-13b": THIRTEEN_B,
    "Llama-3-VILA1.5-8B": FIRST,
    "Llama-3-VILA1.5-8B-Fix": FIXED,
    "Llama-3-VILA1.5-8B-Fix-AWQ": replace(
        FIXED, llm_files=("llama-3-vila1.5-8b-fix-w4-g128-awq-v2.pt",),
        expected=replace(FIXED.expected, precision="int4"),
    ),
    "VILA1.5-40b": FORTY_B,
    "VILA15-3b-hf-preview": preview(THREE_B, "vicuna_v1"),
    "VILA15-13b-hf-preview": preview(THIRTEEN_B, "vicuna_v1"),
    "VILA15-40b-hf-preview": preview(FORTY_B, "hermes-2"),
    "Llama-3-VILA15-8B-hf-preview": preview(FIRST, "llama_3"),
    "NVILA-8B": nvila("page", DYNAMIC_S2, QWEN_7B, MLP, S2_EXPECTED),
    "NVILA-15B": nvila("script", DYNAMIC_S2, QWEN_14B, MLP, S2_EXPECTED),
    "NVILA-Lite-8B": nvila("size", LITE, QWEN_7B, FIX_3, LITE_EXPECTED),
    "NVILA-Lite-8B-stage2": nvila("size", LITE, QWEN_7B, FIX_3, LITE_EXPECTED),
    "NVILA-Lite-2B": nvila("script", LITE, QWEN_1_5B, FIX_3, LITE_EXPECTED),
    "NVILA-Lite-2B-hf-preview": replace(
        nvila("script", {**LITE, "architectures": ["VILAForCausalLM"], "model_type": "vila",
                         "version": "2.0"}, QWEN_1_5B, FIX_3, LITE_EXPECTED),
    ),
    "NVILA-Lite-2B-Verifier": nvila("script", LITE, QWEN_1_5B, FIX_3, LITE_EXPECTED),
    "qwen2-1.5b-longvila-256f": replace(
        nvila("page", LONGVILA, QWEN_1_5B, MLP, replace(
            LONG_EXPECTED, tokens_per_image=196, tokens_per_video=256 * 197,
        ), positions=65536, vocab=151936, rope_theta=15300000.0, tie_word_embeddings=True),
        tower=siglip(384),
    ),
    "qwen2-7b-longvila-256f": nvila("script", LONGVILA, QWEN_7B, MLP, LONG_EXPECTED, 65536, 152064),
    "qwen2-7b-longvila-1M": replace(
        nvila("page", LONGVILA, QWEN_7B, MLP, replace(
            LONG_EXPECTED, longest=1048576, rope_factor=4.0, tokens_per_image=196,
            tokens_per_video=256 * 197,
        ), 1048576, 152064, rope_scaling={"factor": 4.0, "type": "linear"}),
        tower=siglip(384),
    ),
    "LongVILA-R1-7B": nvila(
        "script", {**VIDEO, "model_type": "vila", "num_time_tokens": 0, "time_token_ids": [],
                   "image_encoder": {"_target_": "llava.model.encoders.BasicImageEncoder"}},
        QWEN_7B, FIX_2, TSP_EXPECTED,
    ),
    "NVILA-8B-Video": nvila("script", VIDEO, QWEN_7B, FIX_2, TSP_EXPECTED, vocab=151748),
    "NVILA-Lite-15B-Video": nvila(
        "script", {**LITE, "video_encoder": json.dumps(TSP), "num_video_frames": 256},
        QWEN_14B, FIX_3, replace(
            LITE_EXPECTED, frames=256, tokens_per_video=32 * 122, longest=16384,
        ),
    ),
    "Heron-NVILA-Lite-15B": nvila("script", LITE, QWEN_14B, FIX_2, replace(
        LITE_EXPECTED, tokens_per_image=256 * 13, tokens_per_video=8 * 257,
    )),
}  # fmt: skip


def write_configs(folder: Path, row: Released) -> Path:
    """Write the config files and a small tokenizer of its kind; weights are left out."""
    pixels = row.pixels or row.tower["image_size"]
    internvit = row.tower["model_type"] == "intern_vit_6b"
    processor = {
        "image_processor_type": "SiglipImageProcessor", "do_rescale": True, "do_resize": True,
        "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3,
        "rescale_factor": 1 / 255, "size": {"height": pixels, "width": pixels},
    }  # fmt: skip
    files: dict[str, Values] = {
        "config.json": row.root,
        "llm/config.json": row.llm,
        "llm/generation_config.json": row.generation,
        "vision_tower/config.json": row.tower,
        "vision_tower/preprocessor_config.json": {
            "image_processor_type": "InternVisionPreprocessor"
        } if internvit else processor,
        "mm_projector/config.json": {
            "architectures": ["MultimodalProjector"], "model_type": "v2l_projector",
            "mm_projector_type": row.projector, "torch_dtype": "bfloat16",
        },
    }  # fmt: skip
    for path, values in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(json.dumps(values), "utf-8")
    write_tokenizer(folder / "llm", row.tokenizer)
    for name in row.llm_files:
        (folder / "llm" / name).write_bytes(b"")
    return folder
