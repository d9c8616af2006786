"""The released models' true shapes, for memory, build and speed without their weights."""

from __future__ import annotations

from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.llm_config import LlmConfig, QuantizationConfig
from vila_deploy.checkpoint.variants import LLM_FAMILIES, PROJECTOR_TYPES, TOWER_FAMILIES
from vila_deploy.checkpoint.vision_config import ImageConfig, VisionConfig
from vila_deploy.errors import VilaDeployError

# hidden, layers, heads, kv heads, intermediate, vocab, rope theta, positions, bos, eos
_LLMS = {
    "VILA1.5-3b": (2560, 32, 20, 20, 6912, 32000, 1e4, 4096, 1, 2),
    "Llama-3-VILA1.5-8B": (4096, 32, 32, 8, 14336, 128256, 5e5, 8192, 128000, 128001),
    "VILA1.5-13b": (5120, 40, 40, 40, 13824, 32000, 1e4, 4096, 1, 2),
}
PRESETS = tuple(_LLMS)
GROUP_SIZE, HEAD_DIM, MODEL_MAX_LENGTH = 128, 128, 4096


def preset(name: str, precision: str) -> VilaConfig:
    """The config of a released VILA1.5 model; `precision` int4 means asymmetric, group size 128.

    Raises:
        VilaDeployError: no such model; the message lists those there are.
    """
    if name not in _LLMS:
        raise VilaDeployError(f"unknown model {name!r}", fix=f"choose from {', '.join(PRESETS)}")
    hidden, layers, heads, kv_heads, inner, vocab, theta, positions, bos, eos = _LLMS[name]
    quantization = QuantizationConfig("awq", 4, GROUP_SIZE, True, "gemm")
    return VilaConfig(
        llm=LlmConfig(
            family=LLM_FAMILIES["LlamaForCausalLM"],
            hidden_size=hidden,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=HEAD_DIM,
            intermediate_size=inner,
            vocab_size=vocab,
            rope_theta=theta,
            rms_norm_eps=1e-5,
            max_position_embeddings=positions,
            tie_word_embeddings=False,
            bos_token_id=bos,
            eos_token_ids=(eos,),
            quantization=quantization if precision == "int4" else None,
        ),
        # SigLIP so400m, patch 14, 384 pixels: the tower of all three.
        vision=VisionConfig(
            family=TOWER_FAMILIES["siglip_vision_model"],
            hidden_size=1152,
            num_layers=27,
            num_heads=16,
            intermediate_size=4304,
            patch_size=14,
            image_size=384,
            hidden_act="gelu_pytorch_tanh",
            layer_norm_eps=1e-6,
        ),
        projector=PROJECTOR_TYPES["mlp_downsample"],
        image=ImageConfig("resize", 384, 3, 1 / 255, (0.5,) * 3, (0.5,) * 3),
        select_layer=-2,
        select_feature="cls_patch",
        token_order="column",
        model_max_length=MODEL_MAX_LENGTH,
    )
