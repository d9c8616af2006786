"""The released models' true shapes, for memory, build and speed without their weights."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.llm_config import LlmConfig, QuantizationConfig
from vila_deploy.checkpoint.variants import (
    GENERATIONS,
    LLM_FAMILIES,
    PROJECTOR_TYPES,
    TOWER_FAMILIES,
)
from vila_deploy.checkpoint.video_config import VideoConfig
from vila_deploy.checkpoint.vision_config import ImageConfig, TilingConfig, VisionConfig
from vila_deploy.utils.errors import VilaDeployError

GROUP_SIZE, HEAD_DIM = 128, 128
# hidden, layers, heads, kv heads, intermediate of each LLM, and the family that it belongs to
_LLMS = {
    "Sheared-LLaMA-2.7B": (2560, 32, 20, 20, 6912, "Vicuna"),
    "Llama-3-8B": (4096, 32, 32, 8, 14336, "Llama-3"),
    "Vicuna-7B": (4096, 32, 32, 32, 11008, "Vicuna"),
    "Vicuna-13B": (5120, 40, 40, 40, 13824, "Vicuna"),
    "Yi-34B": (7168, 60, 56, 8, 20480, "Yi"),
    "Qwen2.5-7B": (3584, 28, 28, 4, 18944, "Qwen2.5"),
    "Qwen2.5-14B": (5120, 48, 40, 8, 13824, "Qwen2.5"),
    "Qwen2-1.5B, 65,536 tokens": (1536, 28, 12, 2, 8960, "LongVILA, 65k"),
    "Qwen2-7B, 1M tokens": (3584, 28, 28, 4, 18944, "LongVILA, 1M"),
}
# architecture, rope theta, norm epsilon; vocabulary, positions, model_max_length, bos, eos
_LLM_FAMILIES: dict[str, tuple[str, float, float, tuple[int, int, int, int, int]]] = {
    "Vicuna": ("LlamaForCausalLM", 1e4, 1e-5, (32000, 4096, 4096, 1, 2)),
    "Llama-3": ("LlamaForCausalLM", 5e5, 1e-5, (128256, 8192, 4096, 128000, 128001)),
    "Yi": ("LlamaForCausalLM", 5e6, 1e-5, (64000, 4096, 4096, 1, 7)),
    "Qwen2.5": ("Qwen2ForCausalLM", 1e6, 1e-6, (151648, 32768, 8192, 151643, 151645)),
    "LongVILA, 65k": ("Qwen2ForCausalLM", 1.53e7, 1e-6, (151936, 65536, 65536, 151643, 151645)),
    "LongVILA, 1M": ("Qwen2ForCausalLM", 1e6, 1e-6, (152064, 1 << 20, 1 << 20, 151643, 151645)),
}
# family, hidden, layers, heads, intermediate, patch, pixels
_TOWERS = {
    "SigLIP-384": ("siglip_vision_model", 1152, 27, 16, 4304, 14, 384),
    "SigLIP-448": ("siglip_vision_model", 1152, 27, 16, 4304, 14, 448),
    "InternViT-6B": ("intern_vit_6b", 3200, 45, 25, 12800, 14, 448),
    "CLIP-L-336": ("clip_vision_model", 1024, 24, 16, 4096, 14, 336),
}


@dataclass(frozen=True)
class _Model:
    """`tiling`: mode, scales, index of the output scale, least and most tiles."""

    llm: str
    tower: str
    projector: str = "mlp_downsample"
    select_layer: int = -2
    image_mode: str = "resize"
    tiling: tuple[str, tuple[int, ...], int, int, int] | None = None
    model_max_length: int | None = None  # None: the LLM's
    video: VideoConfig = field(default_factory=VideoConfig)
    rope_factor: float = 1.0
    tied: bool = False


_DYNAMIC_S2 = ("dynamic_s2", (448, 896, 1344), 2, 9, 12)
_MODELS = {
    "VILA1.5-3b": _Model("Sheared-LLaMA-2.7B", "SigLIP-384"),
    "VILA1.5-3b-s2": _Model("Sheared-LLaMA-2.7B", "SigLIP-384", tiling=("s2", (384, 768), 0, 1, 1)),
    "Llama-3-VILA1.5-8B": _Model("Llama-3-8B", "SigLIP-384"),
    "VILA1.5-13b": _Model("Vicuna-13B", "SigLIP-384"),
    "VILA1.5-40b": _Model("Yi-34B", "InternViT-6B", select_layer=-1),
    "NVILA-8B": _Model("Qwen2.5-7B", "SigLIP-448", tiling=_DYNAMIC_S2),
    "NVILA-15B": _Model("Qwen2.5-14B", "SigLIP-448", tiling=_DYNAMIC_S2),
    "NVILA-Lite-8B": _Model(
        "Qwen2.5-7B",
        "SigLIP-448",
        "mlp_downsample_3x3_fix",
        tiling=("dynamic", (448,), 0, 1, 12),
        model_max_length=4096,
    ),
    "VILA-7b": _Model("Vicuna-7B", "CLIP-L-336", "mlp2x_gelu", image_mode="pad"),
    "VILA-13b": _Model("Vicuna-13B", "CLIP-L-336", "mlp2x_gelu", image_mode="pad"),
}
_TSP = VideoConfig(num_frames=256, pools=((8, 1, 1),))
_LONG = VideoConfig(num_frames=256)
# Models of videos; `vila-bench --table` leaves them out.
_VIDEO_MODELS = {
    "NVILA-8B-Video": _Model(
        "Qwen2.5-7B", "SigLIP-448", "mlp_downsample_2x2_fix", model_max_length=16384, video=_TSP
    ),
    "NVILA-Lite-15B-Video": _Model(
        "Qwen2.5-14B",
        "SigLIP-448",
        "mlp_downsample_3x3_fix",
        tiling=("dynamic", (448,), 0, 1, 12),
        model_max_length=16384,
        video=_TSP,
    ),
    "qwen2-1.5b-longvila-256f": _Model(
        "Qwen2-1.5B, 65,536 tokens", "SigLIP-384", video=_LONG, tied=True
    ),
    "qwen2-7b-longvila-1M": _Model(
        "Qwen2-7B, 1M tokens", "SigLIP-384", video=_LONG, rope_factor=4.0
    ),
}
PRESETS, VIDEO_PRESETS = tuple(_MODELS), tuple(_VIDEO_MODELS)
_ALL = _MODELS | _VIDEO_MODELS


def base_models(name: str) -> tuple[str, str]:
    """Return the names of the LLM and the vision tower that a released model is made of."""
    model = _ALL[name]
    return model.llm, model.tower


def preset(name: str, precision: str) -> VilaConfig:
    """Return the config of a released model; `precision` int4 means asymmetric, group size 128.

    Raises:
        VilaDeployError: no such model; the message lists those there are.
    """
    if name not in _ALL:
        near = [known for known in _ALL if name.casefold() in known.casefold()]
        meant = f"did you mean {near[0]}? " if len(near) == 1 else ""
        fix = f"{meant}choose from {', '.join(_ALL)}"
        raise VilaDeployError(f"unknown model {name!r}", fix=fix)
    model = _ALL[name]
    vision, (llm, model_max_length) = _vision(model.tower), _llm(model.llm, precision)
    size, family = vision.image_size, vision.family
    mode, scales, output, least, most = model.tiling or ("single", (size,), 0, 1, 1)
    pixels = scales[-1] if mode == "s2" else size
    projector = PROJECTOR_TYPES[model.projector]
    return VilaConfig(
        llm=replace(llm, rope_factor=model.rope_factor, tie_word_embeddings=model.tied),
        vision=vision,
        projector=projector,
        image=ImageConfig(model.image_mode, pixels, 3, 1 / 255, family.mean, family.std),
        tiling=TilingConfig(mode, size, scales, output, least, most),
        select_layer=model.select_layer,
        select_feature="patch" if family.has_class_token else "cls_patch",
        token_order=projector.token_order or GENERATIONS[llm.family.generation].token_order,
        generation=llm.family.generation,
        video=model.video,
        model_max_length=model.model_max_length or model_max_length,
    )


def _llm(name: str, precision: str) -> tuple[LlmConfig, int]:
    """Return the LLM and its longest sequence."""
    hidden, layers, heads, kv_heads, inner, kin = _LLMS[name]
    family, theta, epsilon, (vocab, positions, longest, bos, eos) = _LLM_FAMILIES[kin]
    quantization = QuantizationConfig("awq", 4, GROUP_SIZE, True, "gemm")
    config = LlmConfig(
        family=LLM_FAMILIES[family],
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=HEAD_DIM,
        intermediate_size=inner,
        vocab_size=vocab,
        rope_theta=theta,
        rms_norm_eps=epsilon,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
        bos_token_id=bos,
        eos_token_ids=(eos,),
        quantization=quantization if precision == "int4" else None,
    )
    return config, longest


def _vision(name: str) -> VisionConfig:
    key, hidden, layers, heads, inner, patch, size = _TOWERS[name]
    family = TOWER_FAMILIES[key]
    return VisionConfig(
        family=family,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        intermediate_size=inner,
        patch_size=patch,
        image_size=size,
        hidden_act=family.activation,
        layer_norm_eps=family.norm_epsilon,
        qkv_bias=family.name != "internvit",
        qk_norm=family.name == "internvit",
    )
