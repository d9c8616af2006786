"""What VILA checkpoints are made of, one row a variant; any other name is refused."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LlmFamily:
    """A language model architecture, keyed by `architectures[0]` of llm/config.json.

    `token_order` is the order in which the projector of that generation emits a picture's tokens.
    """

    name: str
    qkv_bias: bool
    token_order: str
    prompt: str


LLM_FAMILIES = {
    "LlamaForCausalLM": LlmFamily(
        "llama", qkv_bias=False, token_order="column", prompt="vicuna_v1"
    ),
}


@dataclass(frozen=True)
class TowerFamily:
    """A vision tower, keyed by `model_type` of vision_tower/config.json."""

    name: str
    has_class_token: bool


TOWER_FAMILIES = {
    "siglip_vision_model": TowerFamily("siglip", has_class_token=False),
}


@dataclass(frozen=True)
class ProjectorType:
    """A projector, keyed by `mm_projector_type` of mm_projector/config.json.

    `window` × `window` neighbouring features become one token; `layers` are the indices of the
    parameters in its Sequential, as (index, kind), where kind is norm, in or out.
    """

    window: int
    layers: tuple[tuple[int, str], ...]


PROJECTOR_TYPES = {
    "mlp_downsample": ProjectorType(window=2, layers=((1, "norm"), (2, "in"), (4, "out"))),
}

IMAGE_MODES = ("resize",)
TOKEN_ORDERS = ("column", "row")
