"""LLM configs that the tests of TensorRT-LLM's checkpoint share."""

from __future__ import annotations

from dataclasses import replace

from vila_deploy.checkpoint.llm_config import LlmConfig, QuantizationConfig
from vila_deploy.checkpoint.variants import LLM_FAMILIES


def llm_config(family="LlamaForCausalLM", group_size=64, **changes) -> LlmConfig:
    config = LlmConfig(
        family=LLM_FAMILIES[family],
        hidden_size=256,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        intermediate_size=512,
        vocab_size=1003,
        rope_theta=5e4,
        rms_norm_eps=1e-5,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_ids=(2,),
        quantization=None,
    )
    if group_size:
        scheme = QuantizationConfig("awq", 4, group_size, False, "gemm")
        config = replace(config, quantization=scheme)
    return replace(config, **changes)


def config_of(model: str, group_size: int | None) -> LlmConfig:
    if model == "smollm2":
        config = replace(
            llm_config(group_size=None),
            hidden_size=576, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64,
            intermediate_size=1536, vocab_size=49152, rope_theta=1e5, max_position_embeddings=8192,
            rms_norm_eps=9.999999747378752e-06, tie_word_embeddings=True,
        )  # fmt: skip
    else:
        family = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[model]
        config = llm_config(family, group_size=None)
    if group_size is None:
        return config
    quantization = QuantizationConfig("awq", 4, group_size, False, "gemm")
    return replace(config, quantization=quantization)
