"""The variants of VILA checkpoints, one row each; any other name is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LlmFamily:
    """A language model architecture, keyed by `architectures[0]` of llm/config.json.

    `generation` is that of its releases whose root config has no key of NVILA_KEYS.
    """

    name: str
    qkv_bias: bool
    generation: str


LLM_FAMILIES = {
    "LlamaForCausalLM": LlmFamily("llama", qkv_bias=False, generation="vila1.5"),
    "Qwen2ForCausalLM": LlmFamily("qwen2", qkv_bias=True, generation="nvila"),
}


@dataclass(frozen=True)
class Generation:
    """A generation of VILA's code: how images enter the prompts that it trains on.

    `token_order` is the order in which the projector emits an image's tokens; `image_end` is text
    whose embeddings follow each image. `marker_is_token`: an image's marker is a special token in
    a prompt that is tokenized whole; otherwise the text is cut at markers and its chunks are
    tokenized one by one.
    """

    token_order: str
    image_end: str
    marker_is_token: bool


GENERATIONS = {
    # The first VILA and VILA1.5: NVlabs/VILA until the parent of 36f6adc.
    "vila1.5": Generation(token_order="column", image_end="", marker_is_token=False),
    # From 36f6adc on.
    "nvila": Generation(token_order="row", image_end="\n", marker_is_token=True),
}
# Keys of the root config that only NVILA's code writes (llava/train/args.py and
# llava/model/configuration_llava.py, added in 36f6adc), whatever LLM is in the checkpoint.
NVILA_KEYS = (
    "num_time_tokens", "time_token_format", "time_token_ids", "soft_ce_std", "dynamic_s2",
    "image_encoder", "video_encoder", "min_tiles", "max_tiles", "vision_tower_lr",
)  # fmt: skip


@dataclass(frozen=True)
class PromptChoice:
    """Which template of PROMPT_NAMES belongs to a model: its LLM family's name, and a token of its
    tokenizer that tells its base model from others of the family; None fits every tokenizer.
    """

    family: str
    token: str | None
    template: str


# The first row that fits decides.
PROMPT_CHOICES = (
    PromptChoice("qwen2", None, "qwen2"),
    PromptChoice("llama", "<|start_header_id|>", "llama_3"),
    PromptChoice("llama", "<|im_start|>", "hermes-2"),
    PromptChoice("llama", None, "vicuna_v1"),
)
PROMPT_NAMES = ("vicuna_v1", "llama_3", "llama_3_original", "hermes-2", "qwen2")
# `chat_template` of the root config names a conversation of NVlabs/VILA's llava/conversation.py, or
# a file of its chat_templates/ (its exports and *-hf-preview do): that name → ours, None: chosen as
# if there were no name.
CONVERSATION_NAMES: dict[str, str | None] = {
    "vicuna_v1": "vicuna_v1",
    "v1": "vicuna_v1",
    "llama_3": "llama_3",
    "hermes-2": "hermes-2",
    "qwen2": "qwen2",
    "auto": None,
}
# The one meaning that is read out of a name: the first Llama-3-VILA1.5-8B was trained with llama_3
# as it was then, -Fix as it has been since August 2024, and nothing in the two checkpoints differs
# but the `_name_or_path` of llm/config.json, the folder that training began from. `_name_or_path`
# → conversation name → template.
TRAINED_FROM = {
    "./checkpoints/vila-siglip-llama3-8b-pretrain_r4/llm": {"llama_3": "llama_3_original"},
}


@dataclass(frozen=True)
class TowerFamily:
    """A vision tower, keyed by `model_type` of vision_tower/config.json.

    `architecture` is in its class's name, in lower case. `prefix` begins the names of its tensors.
    `activation`, `norm_epsilon` and the image's mean and std stand in for keys that a config leaves
    out. `crops`: its own image processor scales the shorter side and cuts the middle out, instead
    of stretching the image to a square.
    """

    name: str
    architecture: str
    prefix: str
    has_class_token: bool
    activation: str
    norm_epsilon: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crops: bool = False


TOWER_FAMILIES = {
    "siglip_vision_model": TowerFamily(
        name="siglip",
        architecture="siglip",
        prefix="vision_model.",
        has_class_token=False,
        activation="gelu_pytorch_tanh",
        norm_epsilon=1e-6,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    ),
    "clip_vision_model": TowerFamily(
        name="clip",
        architecture="clip",
        prefix="vision_model.",
        has_class_token=True,
        activation="quick_gelu",
        norm_epsilon=1e-5,
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
        crops=True,
    ),
    "intern_vit_6b": TowerFamily(
        name="internvit",
        architecture="intern",
        prefix="",
        has_class_token=True,
        activation="gelu",
        norm_epsilon=1e-6,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    ),
}
ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "quick_gelu")


@dataclass(frozen=True)
class ProjectorType:
    """A projector, keyed by `mm_projector_type` of mm_projector/config.json.

    `window` × `window` neighbouring features become one token of `window`² · c channels, c being
    the tower's. `steps` are the layers of its Sequential in order: downsample, norm, gelu, "hidden"
    (a linear layer to the LLM's width) or "3c" (a linear layer to three times the tower's).
    `token_order` overrides the generation's.
    """

    window: int
    steps: tuple[str, ...]
    token_order: str | None = None

    def prefix(self, index: int) -> str:
        """Return the prefix of the parameters of step `index` on disk."""
        return f"layers.{index}" if len(self.steps) > 1 else "layers"

    def shapes(self, channels: int, hidden_size: int) -> dict[int, tuple[int, ...]]:
        """Shape of the weight of each step that has one; its bias has the first dimension."""
        sizes = {"hidden": hidden_size, "3c": 3 * channels}
        width = channels * self.window**2
        shapes: dict[int, tuple[int, ...]] = {}
        for index, step in enumerate(self.steps):
            if step == "norm":
                shapes[index] = (width,)
            elif step in sizes:
                shapes[index] = (sizes[step], width)
                width = sizes[step]
        return shapes


# The default of torch.nn.LayerNorm, which VILA keeps.
PROJECTOR_NORM_EPSILON = 1e-5
_MLP_DOWNSAMPLE = ("downsample", "norm", "hidden", "gelu", "hidden")
PROJECTOR_TYPES = {
    "linear": ProjectorType(window=1, steps=("hidden",)),
    "mlp2x_gelu": ProjectorType(window=1, steps=("hidden", "gelu", "hidden")),
    "mlp_downsample": ProjectorType(window=2, steps=_MLP_DOWNSAMPLE),
    # The "fix" types came with NVILA and were row-major from the start.
    "mlp_downsample_2x2_fix": ProjectorType(window=2, steps=_MLP_DOWNSAMPLE, token_order="row"),
    "mlp_downsample_3x3_fix": ProjectorType(
        window=3,
        steps=("downsample", "norm", "3c", "gelu", "norm", "hidden", "gelu", "hidden"),
        token_order="row",
    ),
}

# The towers that first-generation checkpoints only name, in `mm_vision_tower`: their published
# config.json and preprocessor_config.json.
KNOWN_TOWERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "openai/clip-vit-large-patch14-336": (
        {
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "patch_size": 14,
            "image_size": 336,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
        },
        {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}, "resample": 3},
    ),
    "google/siglip-so400m-patch14-384": (
        {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "intermediate_size": 4304,
            "patch_size": 14,
            "image_size": 384,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
        },
        {"size": {"height": 384, "width": 384}, "resample": 3},
    ),
}

_SIGLIP_TAKEN_FOR_GRANTED = {
    "mm_vision_select_layer": -2, "mm_vision_select_feature": "cls_patch",
}  # fmt: skip


@dataclass(frozen=True)
class OneFolder:
    """A class of SGLang that reads a checkpoint in one folder, keyed by its `architectures[0]`.

    `channels` is the width of the features that its projector takes.
    `fixed` is what its code takes for granted, as keys of VILA's config.json. The class computes
    what the projector types of `projectors` say; the first is what reading assumes.
    """

    model_type: str
    projectors: tuple[str, ...]
    channels: int
    fixed: dict[str, Any]

    @property
    def projector(self) -> str:
        return self.projectors[0]


# python/sglang/srt/models/{nvila,nvila_lite}.py of sgl-project/sglang. A checkpoint is written
# for the first that fits.
ONE_FOLDERS = {
    "NVILAForConditionalGeneration": OneFolder(
        model_type="nvila",
        projectors=("mlp_downsample", "mlp_downsample_2x2_fix"),
        channels=3456,
        fixed={
            **_SIGLIP_TAKEN_FOR_GRANTED,
            "image_aspect_ratio": "dynamic_s2",
            "dynamic_s2": True,
            "s2_scales": "448,896,1344",
            "s2_max_split_size": 448,
            "s2_resize_output_to_scale_idx": -1,
        },
    ),
    "NVILALiteForConditionalGeneration": OneFolder(
        model_type="nvila_lite",
        projectors=("mlp_downsample_3x3_fix",),
        channels=1152,
        fixed={**_SIGLIP_TAKEN_FOR_GRANTED, "image_aspect_ratio": "dynamic"},
    ),
}

# `image_aspect_ratio` of the root config → how an image becomes the square that the tower takes;
# "processor" is the tower's own way.
IMAGE_MODES = {
    "resize": "resize",
    "pad": "pad",
    "square": "processor",
    "dynamic": "processor",
    "dynamic_s2": "processor",
}
TOKEN_ORDERS = ("column", "row")
