"""VILA as a model of SGLang 0.5: everything that touches SGLang's interfaces, which often change.

For checkpoints that SGLang has no class for, such as VILA1.5. Our own code makes the prompt and
encodes images; SGLang runs the LLM, with its parallelism, quantization and caches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from sglang.srt.configs.model_config import multimodal_model_archs
from sglang.srt.managers.mm_utils import general_mm_embed_routine, pad_mm_tokens
from sglang.srt.managers.multimodal_processor import PROCESSOR_MAPPING
from sglang.srt.managers.schedule_batch import (
    Modality,
    MultimodalDataItem,
    MultimodalProcessorOutput,
)
from sglang.srt.models.registry import ModelRegistry
from sglang.srt.multimodal.processors.base_processor import BaseMultimodalProcessor
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig

from vila_deploy.checkpoint.checkpoint import open_vision
from vila_deploy.integrations.places import FILLER_TOKEN, PLACE_MARKER, Place
from vila_deploy.integrations.prompt_input import PromptInput
from vila_deploy.integrations.served_model import read_served_model
from vila_deploy.model.vision import VisionEncoder
from vila_deploy.processing.frame_windows import window_mean
from vila_deploy.server.options import RequestLimits
from vila_deploy.utils.errors import VilaDeployError

# `model_type` of the config.json of every release of VILA.
MODEL_TYPE, PROGRAM = "llava_llama", "SGLang"
ARCHITECTURE = "VilaForConditionalGeneration"
# What SGLang calls the code that turns messages into token ids.
ENCODING = "vila"
CHAT = "sglang.srt.entrypoints.openai"


def register() -> None:
    """Make VILA known to SGLang, which calls this in each of its processes (entry point)."""
    AutoConfig.register(MODEL_TYPE, VilaSglangConfig, exist_ok=True)
    ModelRegistry.models[ARCHITECTURE] = VilaForConditionalGeneration
    multimodal_model_archs.append(ARCHITECTURE)
    PROCESSOR_MAPPING[VilaForConditionalGeneration] = VilaProcessor
    hooks: dict[str, Callable[..., Any]] = {
        "chat_encoding.resolve_chat_encoding_spec": _resolve_encoding,
        "chat_encoding.spec_renders_prompt_ids": _renders_ids,
        "serving_chat.OpenAIServingChat._encode_messages": _encode_messages,
    }
    for name, hook in hooks.items():
        HookRegistry.register(f"{CHAT}.{name}", hook, HookType.AROUND)


class VilaSglangConfig(PreTrainedConfig):
    """The configs of a checkpoint as SGLang wants them: the LLM's in `text_config`."""

    model_type = MODEL_TYPE

    def __init__(self, text_config: PreTrainedConfig | None = None, **values: Any):
        self.text_config = text_config or PreTrainedConfig()
        super().__init__(**values)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the config of the checkpoint whose folder transformers names in `kwargs`."""
        root = kwargs.pop("name_or_path")
        served = read_served_model(Path(root), PROGRAM)
        stops = list(served.info.stop_token_ids)
        text = AutoConfig.for_model(**{**served.llm_values, "eos_token_id": stops})
        values: dict[str, Any] = {"eos_token_id": stops, "architectures": [ARCHITECTURE]}
        if served.quantization is not None:
            values["quantization_config"] = served.quantization
        config = cls(text, dtype=text.dtype, checkpoint=str(root), **values)
        return (config, kwargs) if kwargs.pop("return_unused_kwargs", False) else config


def _resolve_encoding(original: Callable[..., str | None], **given: Any) -> str | None:
    ours = isinstance(given["hf_config"], VilaSglangConfig)
    return ENCODING if ours else original(**given)


def _renders_ids(original: Callable[[str | None], bool], encoding: str | None) -> bool:
    return encoding == ENCODING or original(encoding)


def _encode_messages(
    original: Callable[..., Any], chat: Any, messages: Any, request: Any, *rest: Any, **given: Any
) -> list[int] | None:
    """Return a chat's token ids, and add the places of its images to the `image_data` given."""
    if chat.chat_encoding_spec != ENCODING:
        return original(chat, messages, request, *rest, **given)
    manager, dump = chat.tokenizer_manager, {"exclude_unset": True, "exclude_none": True}
    asked = [message.model_dump(**dump) for message in request.messages]
    try:
        tokens, places = _prompt_input(manager.model_path, manager.context_len).chat(asked)
    except VilaDeployError as error:
        # SGLang's word for a client's fault.
        raise ValueError(str(error)) from None
    given["image_data"].extend(places)
    return tokens


@lru_cache(maxsize=1)
def _prompt_input(model: str, max_tokens: int) -> PromptInput:
    return PromptInput(read_served_model(Path(model), PROGRAM), max_tokens, RequestLimits.images)


class VilaForConditionalGeneration(nn.Module):
    """Our vision encoder, whole in each process, and SGLang's LLM."""

    packed_modules_mapping: ClassVar = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    pad_input_ids = staticmethod(pad_mm_tokens)

    def __init__(self, config: VilaSglangConfig, quant_config: Any = None, prefix: str = ""):
        super().__init__()
        self.config = config
        served = read_served_model(Path(config.checkpoint), PROGRAM)
        self.allow_patterns_overrides = [served.weight_pattern]
        device = torch.get_default_device()
        # SGLang builds models on its device, where reading a file would fail.
        with torch.device("cpu"):
            parts = open_vision(served.layout, served.config)
            vision = VisionEncoder(served.config, *parts, torch.get_default_dtype())
        self.vision = vision.to(device)
        llm, _ = ModelRegistry.resolve_model_cls(config.text_config.architectures)
        self.language_model: Any = llm(config.text_config, quant_config=quant_config, prefix=prefix)

    def get_image_feature(self, items: list[MultimodalDataItem]) -> Tensor:
        """Return the embeddings [tokens, hidden] of places, one after the other."""
        return torch.cat([self._encode(item) for item in items])

    def _encode(self, item: MultimodalDataItem) -> Tensor:
        weight = next(self.vision.parameters())
        tiles = torch.as_tensor(item.feature).to(weight.device, weight.dtype)
        encoded = self.vision(tiles, tuple(item.grid) or None)
        if item.pool:
            mean = window_mean(encoded.float().cpu().numpy(), tuple(item.pool))
            encoded = torch.from_numpy(mean).to(weight.device, weight.dtype)
        return encoded.flatten(0, 1)

    def forward(
        self, input_ids: Tensor, positions: Tensor, forward_batch: Any, **given: Any
    ) -> Any:
        encoders = {Modality.IMAGE: self.get_image_feature}
        return general_mm_embed_routine(
            input_ids, forward_batch, self.language_model,
            data_embedding_funcs=encoders, positions=positions, **given,
        )  # fmt: skip

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load the LLM's weights; the vision encoder has its own already."""
        vision = ("model.vision_tower.", "model.mm_projector.")
        self.language_model.load_weights(pair for pair in weights if not pair[0].startswith(vision))


class VilaProcessor(BaseMultimodalProcessor):
    """Gives each place its positions, and its pixels to the model."""

    models: ClassVar = [VilaForConditionalGeneration]

    async def process_mm_data_async(
        self, image_data: list[Any], audio_data: Any, input_text: Any, *args: Any, **given: Any
    ) -> MultimodalProcessorOutput:
        if audio_data or not all(isinstance(place, Place) for place in image_data or [None]):
            raise ValueError("images need a chat (/v1/chat/completions), and nothing else is taken")
        ids: list[int] = []
        items, places = [], iter(image_data)
        for token in input_text:
            if token == PLACE_MARKER:
                place = next(places)
                items.append(_item(place, len(ids)))
                ids += [FILLER_TOKEN] * place.tokens
            else:
                ids.append(token)
        return MultimodalProcessorOutput(mm_items=items, input_ids=ids, im_token_id=FILLER_TOKEN)


def _item(place: Place, begin: int) -> MultimodalDataItem:
    pixels = place.pixels
    item = MultimodalDataItem(
        modality=Modality.IMAGE,
        feature=torch.from_numpy(pixels.tiles),
        offsets=[(begin, begin + place.tokens - 1)],
        model_specific_data={"grid": list(pixels.grid or ()), "pool": list(pixels.pool or ())},
    )
    item.set_identity(hashlib.sha256(place.key.encode()).digest())
    return item
