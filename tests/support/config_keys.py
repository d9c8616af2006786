"""Every key of a checkpoint's JSON files that the original's loaders read, and what we do with it.

A row says whether the key is honoured (another value computes something else), refused (another
value than the usual ones is one line) or without effect on what is computed, with the file of the
source that reads it, and another value than a made checkpoint has. Sources:

- vila: NVlabs/VILA at b760c34; vila1.5: its branch of that name.
- transformers: the class in huggingface/transformers, releases 4.36 to 5.23.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vila_deploy.checkpoint.int8_tower import int8_config

HONOURED, REFUSED, NO_EFFECT = "honoured", "refused", "no effect"
ROOT, LLM, TOWER, PROJECTOR = (
    "config.json", "llm/config.json", "vision_tower/config.json", "mm_projector/config.json",
)  # fmt: skip
GENERATION, PREPROCESSOR = "llm/generation_config.json", "vision_tower/preprocessor_config.json"
TOKENIZER, SPECIAL_TOKENS = "llm/tokenizer_config.json", "llm/special_tokens_map.json"

VILA_CONFIG = "vila llava/model/configuration_llava.py"
VILA_ARCH = "vila llava/model/llava_arch.py"
VILA_LLM = "vila llava/model/language_model/builder.py"
VILA_TOWER = "vila llava/model/multimodal_encoder/builder.py"
VILA_PROJECTOR = "vila llava/model/multimodal_projector/base_projector.py"
VILA_IMAGES = "vila llava/mm_utils.py"
VILA_MEDIA = "vila llava/utils/media.py"
VILA_TRAIN = "vila1.5 llava/train/utils.py"
VILA_GENERATE = "vila1.5 llava/model/language_model/llava_llama.py"
INTERN = "vila llava/model/multimodal_encoder/intern/configuration_intern_vit.py"
LLAMA = "transformers models/llama/configuration_llama.py"
QWEN2 = "transformers models/qwen2/configuration_qwen2.py"
SIGLIP = "transformers models/siglip/configuration_siglip.py"
CLIP = "transformers models/clip/configuration_clip.py"
PRETRAINED = "transformers configuration_utils.py"
DECODING = "transformers generation/configuration_utils.py"
IMAGES = "transformers image_processing_utils.py"
SIGLIP_IMAGES = "transformers models/siglip/image_processing_siglip.py"
CLIP_IMAGES = "transformers models/clip/image_processing_clip.py"
TOKENS = "transformers tokenization_utils_base.py"
# In release 5.23 its _decode leaves the text of BPE alone, unless a second key forces it.
DECODED_TEXT = "transformers tokenization_utils_tokenizers.py"
LLAMA_TOKENS = "transformers models/llama/tokenization_llama.py"
QWEN2_TOKENS = "transformers models/qwen2/tokenization_qwen2.py"


@dataclass(frozen=True)
class Key:
    """A key of `file`; `value` is put into the made checkpoint that `base` names."""

    file: str
    name: str
    kind: str
    source: str
    value: Any
    base: str = "siglip"


@dataclass(frozen=True)
class _Rows:
    """Keys that one source reads, all treated alike."""

    file: str
    kind: str
    source: str
    values: Mapping[str, Any]
    base: str = "siglip"


_TRAINING = {"mm_projector_lr": 1e-4, "tune_language_model": False, "tune_mm_projector": False,
             "tune_vision_tower": False, "drop_path_rate": 0.5}  # fmt: skip
# Keys of NVILA's code alone: with any of them a checkpoint counts as NVILA's.
_NVILA_TRAINING = {"vision_tower_lr": 1e-4, "soft_ce_std": 2.0, "time_token_ids": []}
_PS3 = {"look_close_mode": "after_prompt", "num_look_close": 2, "num_token_look_close": 9,
        "top_down_prompt_head_type": "mlp", "high_res_pos_embed": True, "mm_scale_num": 3,
        "ps3_dynamic_aspect_ratio": True, "mm_low_res_token_num": 9}  # fmt: skip
# What every config of transformers may have, and no model of these computes with.
_COMMON = {
    "_name_or_path": "elsewhere", "_attn_implementation_autoset": True, "auto_map": {"A": "b.C"},
    "transformers_version": "4.0", "torch_dtype": "float64", "dtype": "float64",
    "return_dict": False, "output_attentions": True, "output_hidden_states": True,
    "use_bfloat16": True, "torchscript": True, "pruned_heads": {}, "chunk_size_feed_forward": 8,
    "is_encoder_decoder": True, "is_decoder": True, "add_cross_attention": True,
    "cross_attention_hidden_size": 3, "tie_encoder_decoder": True, "finetuning_task": "x",
    "id2label": {"0": "x"}, "label2id": {"x": 0}, "num_labels": 5, "problem_type": "regression",
    "task_specific_params": {}, "tokenizer_class": "X", "prefix": "x", "sep_token_id": 3,
    "decoder_start_token_id": 3, "tf_legacy_loss": True, "use_return_dict": False,
}  # fmt: skip
# Sampling as transformers before 5 wrote it into every config.json, where nothing reads it.
_OLD_SAMPLING = {
    "do_sample": True, "temperature": 0.5, "top_k": 3, "top_p": 0.5, "typical_p": 0.5,
    "num_beams": 4, "num_beam_groups": 2, "max_length": 7, "min_length": 7,
    "early_stopping": True, "diversity_penalty": 1.0, "repetition_penalty": 2.0,
    "length_penalty": 2.0, "no_repeat_ngram_size": 2, "encoder_no_repeat_ngram_size": 2,
    "bad_words_ids": [[3]], "num_return_sequences": 2, "output_scores": True,
    "return_dict_in_generate": True, "forced_bos_token_id": 3, "forced_eos_token_id": 3,
    "remove_invalid_values": True, "exponential_decay_length_penalty": [5, 1.1],
    "suppress_tokens": [3], "begin_suppress_tokens": [3],
}  # fmt: skip
_SAMPLING = {
    "do_sample": True, "temperature": 0.5, "top_k": 3, "top_p": 0.5, "typical_p": 0.5,
    "min_p": 0.1, "top_h": 0.5, "epsilon_cutoff": 0.1, "eta_cutoff": 0.1,
    "early_stopping": True, "length_penalty": 2.0, "renormalize_logits": True,
    "remove_invalid_values": True,
}  # fmt: skip
# How long an answer may be, what is returned, and how transformers computes the same.
_RUNNING = {
    "max_length": 7, "max_new_tokens": 7, "max_time": 1.0, "num_return_sequences": 2,
    "output_attentions": True, "output_hidden_states": True, "output_scores": True,
    "output_logits": True, "return_dict_in_generate": True, "use_cache": False,
    "cache_implementation": "static", "cache_config": {}, "max_cache_len": 7, "low_memory": True,
    "prefill_chunk_size": 8, "compile_config": {}, "disable_compile": True,
    "continuous_batching_config": {}, "is_assistant": True, "num_assistant_tokens": 3,
    "num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.1,
    "assistant_early_exit": 3, "assistant_ensemble_weight": 0.5, "assistant_lookbehind": 3,
    "target_lookbehind": 3, "prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 2,
    "speculation_type": "x", "use_mtp": True, "token_healing": True, "pad_token_id": 3,
    "bos_token_id": 3, "decoder_start_token_id": 3, "transformers_version": "4.0",
    "_from_model_config": True,
}  # fmt: skip
_DECODING = {
    "num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0, "penalty_alpha": 0.5,
    "dola_layers": "high", "constraints": [3], "force_words_ids": [[3]], "bad_words_ids": [[3]],
    "suppress_tokens": [3], "begin_suppress_tokens": [3], "forced_bos_token_id": 3,
    "forced_eos_token_id": 3, "sequence_bias": [[[3], 1.0]], "no_repeat_ngram_size": 2,
    "encoder_no_repeat_ngram_size": 2, "encoder_repetition_penalty": 2.0, "min_length": 7,
    "min_new_tokens": 7, "exponential_decay_length_penalty": [5, 1.1], "guidance_scale": 2.0,
    "watermarking_config": {"bias": 2.0}, "stop_strings": ["x"], "repetition_penalty": 1.5,
}  # fmt: skip

_ROWS = (
    # config.json
    _Rows(ROOT, HONOURED, VILA_IMAGES, {"image_aspect_ratio": "pad"}),
    _Rows(ROOT, HONOURED, VILA_ARCH, {"mm_vision_select_layer": -3, "dynamic_s2": True,
          "chat_template": "llama_3"}),
    _Rows(ROOT, HONOURED, VILA_MEDIA, {"num_video_frames": 4, "fps": 2.0}),
    _Rows(ROOT, HONOURED, VILA_CONFIG, {"min_tiles": 2, "max_tiles": 6}, "dynamic"),
    _Rows(ROOT, HONOURED, VILA_TOWER, {"s2": False}, "s2"),
    _Rows(ROOT, HONOURED, VILA_CONFIG, {"s2_scales": "42", "s2_resize_output_to_scale_idx": -1},
          "s2"),
    _Rows(ROOT, HONOURED, VILA_CONFIG, {"num_time_tokens": 10, "time_token_format": "<x{t}>",
          "video_encoder": {"_target_": "llava.model.encoders.TSPVideoEncoder",
                            "pool_sizes": [[8, 1, 1]]}}),
    _Rows(ROOT, HONOURED, VILA_TOWER, {"mm_vision_tower": "openai/clip-vit-large-patch14-336"},
          "flat"),
    _Rows(ROOT, HONOURED, VILA_CONFIG, {"mm_projector_type": "mlp2x_gelu"}, "flat"),
    _Rows(ROOT, REFUSED, VILA_ARCH, {"mm_use_im_start_end": True, "ps3": True,
          "image_encoder": {"_target_": "x.TSPImageEncoder"}, "video_max_tiles": 4}),
    _Rows(ROOT, REFUSED, "vila llava/model/builder.py", {"model_type": "llava_topdown_llama"}),
    _Rows(ROOT, REFUSED, VILA_CONFIG, {"hidden_size": 7, "mm_hidden_size": 7,
          "mm_vision_select_feature": "patch"}),
    _Rows(ROOT, REFUSED, VILA_CONFIG, {"s2_max_split_size": 7}, "s2"),
    _Rows(ROOT, NO_EFFECT, VILA_CONFIG, {"llm_cfg": {"hidden_size": 7}, "vision_tower_cfg": {},
          "mm_projector_cfg": {}, "resume_path": "x", "architectures": ["X"],
          "version": "3.0"}),
    _Rows(ROOT, NO_EFFECT, VILA_ARCH, {"model_dtype": "torch.bfloat16"}),
    _Rows(ROOT, NO_EFFECT, VILA_CONFIG, _NVILA_TRAINING, "qwen2"),
    _Rows(ROOT, NO_EFFECT, VILA_CONFIG, {"mm_use_im_patch_token": True}),
    _Rows(ROOT, NO_EFFECT, VILA_TRAIN, {"vision_resolution": 99, "interpolate_mode": "x"}),
    _Rows(ROOT, NO_EFFECT, VILA_CONFIG, _TRAINING),
    _Rows(ROOT, NO_EFFECT, VILA_CONFIG, _PS3),
    _Rows(ROOT, NO_EFFECT, PRETRAINED, _COMMON),
    # llm/config.json
    _Rows(LLM, HONOURED, LLAMA, {"num_hidden_layers": 1, "num_attention_heads": 8,
          "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 400, "head_dim": 64,
          "rope_theta": 5e5, "rope_parameters": {"rope_theta": 5e5}, "rms_norm_eps": 1e-4,
          "rope_scaling": {"type": "linear", "factor": 2.0}, "tie_word_embeddings": True,
          "bos_token_id": 3, "eos_token_id": 3}),
    _Rows(LLM, HONOURED, "vila llava/train/train.py", {"model_max_length": 99}),
    _Rows(LLM, HONOURED, VILA_LLM, {"tokenizer_model_max_length": 99}, "no length"),
    _Rows(LLM, HONOURED, LLAMA, {"max_position_embeddings": 99}, "no length"),
    _Rows(LLM, HONOURED, PRETRAINED, {"quantization_config": {"quant_method": "awq", "bits": 4,
          "group_size": 64, "zero_point": True, "version": "gemm"}}),
    _Rows(LLM, REFUSED, PRETRAINED, {"architectures": ["MptForCausalLM"], "model_type": "qwen2"}),
    _Rows(LLM, REFUSED, LLAMA, {"hidden_size": 7, "hidden_act": "gelu", "attention_bias": True,
          "mlp_bias": True}),
    _Rows(LLM, REFUSED, QWEN2, {"use_sliding_window": True}, "qwen2"),
    _Rows(LLM, NO_EFFECT, QWEN2, {"sliding_window": 7, "max_window_layers": 1,
          "layer_types": ["full_attention"] * 2, "use_mrope": False}, "qwen2"),
    _Rows(LLM, NO_EFFECT, LLAMA, {"attention_dropout": 0.5, "initializer_range": 0.5,
          "pretraining_tp": 2, "use_cache": False, "pad_token_id": 3}),
    _Rows(LLM, NO_EFFECT, VILA_LLM, {"tokenizer_padding_side": "left"}),
    _Rows(LLM, NO_EFFECT, PRETRAINED, {**_COMMON, **_OLD_SAMPLING}),
    # llm/generation_config.json
    _Rows(GENERATION, HONOURED, DECODING, {"eos_token_id": [2, 5]}),
    _Rows(GENERATION, REFUSED, VILA_GENERATE, _DECODING),
    _Rows(GENERATION, NO_EFFECT, VILA_GENERATE, {**_SAMPLING, **_RUNNING}),
    # vision_tower/config.json
    _Rows(TOWER, HONOURED, SIGLIP, {"num_hidden_layers": 5, "num_attention_heads": 2,
          "intermediate_size": 64, "hidden_act": "gelu", "layer_norm_eps": 1e-4}),
    _Rows(TOWER, HONOURED, INTERN, {"qkv_bias": True, "qk_normalization": False}, "internvit"),
    _Rows(TOWER, HONOURED, PRETRAINED, {"quantization_config": int8_config(
          ["vision_model.encoder.layers.0.mlp.fc1"])}),
    _Rows(TOWER, REFUSED, SIGLIP, {"hidden_size": 7, "image_size": 28, "patch_size": 99,
          "num_channels": 1}),
    _Rows(TOWER, REFUSED, VILA_TOWER, {"architectures": ["CLIPVisionModel"]}),
    _Rows(TOWER, REFUSED, PRETRAINED, {"model_type": "radio"}),
    _Rows(TOWER, REFUSED, INTERN, {"norm_type": "layer_norm"}, "internvit"),
    _Rows(TOWER, NO_EFFECT, SIGLIP, {"vision_use_head": False, "attention_dropout": 0.5}),
    _Rows(TOWER, NO_EFFECT, CLIP, {"projection_dim": 7, "initializer_range": 0.5,
          "initializer_factor": 0.5, "attention_dropout": 0.5}, "clip"),
    _Rows(TOWER, NO_EFFECT, INTERN, {"use_flash_attn": False, "dropout": 0.5,
          "drop_path_rate": 0.5}, "internvit"),
    _Rows(TOWER, NO_EFFECT, PRETRAINED, {**_COMMON, **_OLD_SAMPLING}),
    # vision_tower/preprocessor_config.json
    _Rows(PREPROCESSOR, HONOURED, SIGLIP_IMAGES, {"resample": 2, "rescale_factor": 0.5,
          "image_mean": [0.1, 0.2, 0.3], "image_std": [0.1, 0.2, 0.3]}),
    _Rows(PREPROCESSOR, REFUSED, SIGLIP_IMAGES, {"do_resize": False, "do_rescale": False,
          "do_normalize": False, "size": {"height": 28, "width": 28}}),
    _Rows(PREPROCESSOR, REFUSED, CLIP_IMAGES, {"do_center_crop": False, "crop_size": 28}, "clip"),
    _Rows(PREPROCESSOR, NO_EFFECT, SIGLIP_IMAGES, {"do_convert_rgb": False, "do_pad": True,
          "pad_size": {"height": 9, "width": 9}, "default_to_square": False}),
    _Rows(PREPROCESSOR, NO_EFFECT, IMAGES, {"image_processor_type": "X", "processor_class": "X",
          "feature_extractor_type": "X", "_valid_processor_keys": [], "auto_map": {},
          "data_format": "channels_last", "input_data_format": "channels_last", "device": "cuda",
          "return_tensors": "pt", "disable_grouping": True, "image_seq_length": 7}),
    # mm_projector/config.json
    _Rows(PROJECTOR, HONOURED, VILA_PROJECTOR, {"mm_projector_type": "linear"}),
    _Rows(PROJECTOR, NO_EFFECT, VILA_PROJECTOR, {"model_type": "x", "architectures": ["X"]}),
    _Rows(PROJECTOR, NO_EFFECT, PRETRAINED, {**_COMMON, **_OLD_SAMPLING}),
    # llm/tokenizer_config.json
    _Rows(TOKENIZER, HONOURED, TOKENS, {"added_tokens_decoder":
          {"383": {"content": "<new>", "special": True}}, "chat_template": "{{ messages }}",
          "sep_token": "!", "pad_token": "!", "cls_token": "!",
          "mask_token": "!", "additional_special_tokens": ["!"], "extra_special_tokens": ["!"]}),
    _Rows(TOKENIZER, HONOURED, TOKENS, {"bos_token": "!", "eos_token": "!", "unk_token": "!"},
          "no map"),
    _Rows(TOKENIZER, HONOURED, LLAMA_TOKENS, {"add_bos_token": False}, "sentencepiece"),
    _Rows(TOKENIZER, HONOURED, TOKENS, {"tokenizer_class": "LlamaTokenizerFast"}, "two"),
    _Rows(TOKENIZER, REFUSED, LLAMA_TOKENS, {"add_eos_token": True, "add_prefix_space": False,
          "sp_model_kwargs": {"enable_sampling": True}}, "sentencepiece"),
    _Rows(TOKENIZER, REFUSED, TOKENS, {"split_special_tokens": True}),
    _Rows(TOKENIZER, NO_EFFECT, LLAMA_TOKENS, {"legacy": True, "use_default_system_prompt": True,
          "spaces_between_special_tokens": True}, "sentencepiece"),
    _Rows(TOKENIZER, NO_EFFECT, DECODED_TEXT, {"clean_up_tokenization_spaces": True}),
    _Rows(TOKENIZER, REFUSED, DECODED_TEXT, {
          "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True},
          "cleaned"),
    _Rows(TOKENIZER, NO_EFFECT, QWEN2_TOKENS, {"errors": "strict"}),
    _Rows(TOKENIZER, NO_EFFECT, TOKENS, {"model_max_length": 7, "max_length": 7,
          "padding_side": "left", "truncation_side": "left", "padding": True, "truncation": True,
          "model_input_names": ["x"], "name_or_path": "x",
          "tokenizer_file": "x", "processor_class": "X", "auto_map": {}, "use_fast": False,
          "from_slow": True, "device_map": "x", "backend": "tokenizers", "verbose": True,
          "response_schema": {}, "response_template": "x", "chat_control_tokens": {},
          "model_specific_special_tokens": {}, "is_local": True, "trust_remote_code": True,
          "files_loaded": [], "pad_token_type_id": 3, "stride": 3, "init_inputs": []}),
    # llm/special_tokens_map.json
    _Rows(SPECIAL_TOKENS, HONOURED, TOKENS, {"bos_token": "!", "eos_token": "!", "unk_token": "!",
          "sep_token": "!", "pad_token": "!", "cls_token": "!", "mask_token": "!",
          "additional_special_tokens": ["!"], "extra_special_tokens": ["!"]}),
)  # fmt: skip


def _keys() -> Iterator[Key]:
    for row in _ROWS:
        for name, value in row.values.items():
            yield Key(row.file, name, row.kind, row.source, value, row.base)


KEYS = tuple(_keys())
