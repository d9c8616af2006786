"""VILA as a model of vLLM 0.32: everything that touches vLLM's interfaces, which often change.

Chats are turned into tokens by our own code, images are preprocessed by our own code, and our own
tower and projector encode them; vLLM runs the LLM, with its parallelism, quantization and caches.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, BatchFeature, PreTrainedConfig
from vllm import ModelRegistry
from vllm import __version__ as vllm_version
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.models.interfaces import SupportsMultiModal, SupportsPP
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    init_vllm_registered_model,
    maybe_prefix,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import MultiModalDataParser, ProcessorBatchItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    ProcessorInputs,
    PromptReplacement,
)
from vllm.renderers.base import BaseRenderer
from vllm.renderers.registry import RENDERER_REGISTRY
from vllm.tokenizers.registry import TokenizerRegistry
from vllm.transformers_utils.config import register_config_parser
from vllm.transformers_utils.config_parser_base import ConfigParserBase

from vila_deploy.checkpoint.checkpoint import open_vision
from vila_deploy.integrations.places import (
    FILLER_TOKEN,
    PLACE_MARKER,
    Place,
    largest_place,
)
from vila_deploy.integrations.prompt_input import PromptInput, plain_messages
from vila_deploy.integrations.served_model import ServedModel, read_served_model
from vila_deploy.integrations.vllm.command import ARCHITECTURE, MODE, VLLM_VERSION
from vila_deploy.model.vision import VisionEncoder
from vila_deploy.processing.frame_windows import window_mean
from vila_deploy.utils.errors import VilaDeployError

LOG = logging.getLogger(__name__)
FIELDS = ("pixels", "grid", "pool", "tokens")
Result = TypeVar("Result")


def register() -> None:
    """Make VILA known to vLLM, which calls this in each of its processes (entry point)."""
    if vllm_version.split("+")[0].rpartition(".")[0] != VLLM_VERSION:
        LOG.warning("vila-deploy's plugin is for vLLM %s, this is %s", VLLM_VERSION, vllm_version)
    register_config_parser(MODE)(VilaConfigParser)
    # vLLM uses it to turn answers into text, never prompts into tokens.
    TokenizerRegistry.register(MODE, "vllm.tokenizers.hf", "CachedHfTokenizer")
    RENDERER_REGISTRY.register(MODE, __name__, VilaRenderer.__name__)
    ModelRegistry.register_model(
        ARCHITECTURE, f"{__name__}:{VilaForConditionalGeneration.__name__}"
    )


class VilaVllmConfig(PreTrainedConfig):
    """The configs of a checkpoint as vLLM wants them: the LLM's in `text_config`."""

    model_type = "vila_deploy"

    def __init__(self, text_config: PreTrainedConfig | None = None, **values: Any):
        self.text_config = text_config or PreTrainedConfig()
        super().__init__(**values)


class VilaConfigParser(ConfigParserBase):
    """Reads the config files of every layout that vila-deploy reads (--config-format vila)."""

    def parse(
        self,
        model: str | Path,
        trust_remote_code: bool,
        revision: str | None = None,
        code_revision: str | None = None,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], PreTrainedConfig]:
        served = read_served_model(Path(model))
        stops = list(served.info.stop_token_ids)
        text = AutoConfig.for_model(**{**served.llm_values, "eos_token_id": stops})
        values: dict[str, Any] = {"architectures": [ARCHITECTURE], "eos_token_id": stops}
        if served.quantization is not None:
            values["quantization_config"] = served.quantization
        return values, VilaVllmConfig(text_config=text, **values)


class VilaRenderer(BaseRenderer):
    """Turns chats into tokens as vila-serve does (--tokenizer-mode vila)."""

    def __init__(self, config: VllmConfig, tokenizer: Any):
        super().__init__(config, tokenizer)
        self._served = read_served_model(Path(self.model_config.model))
        limit = self.model_config.get_multimodal_config().get_limit_per_prompt("image")
        self._input = PromptInput(self._served, self.model_config.max_model_len, limit)

    def get_eos_token_id(self) -> int | None:
        return min(self._served.info.stop_token_ids, default=None)

    def validate_token_ids(self, token_ids: Sequence[int], *, parameter: str | None = None) -> None:
        rows = self._served.info.vocab_size
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < rows:
            raise VLLMValidationError(f"token ids must be 0 to {rows - 1}", parameter=parameter)

    def render_messages(self, messages: list[Any], params: Any) -> tuple[list[Any], Any]:
        conversation = plain_messages(messages)
        tokens, places = _refusing(self._input.chat, conversation)
        prompt: dict[str, Any] = {"prompt_token_ids": tokens}
        if places:
            prompt["multi_modal_data"] = {"image": places}
            prompt["multi_modal_uuids"] = {"image": [place.key for place in places]}
        return conversation, prompt

    async def render_messages_async(
        self, messages: list[Any], params: Any
    ) -> tuple[list[Any], Any]:
        # Images are decoded in a thread, so that other requests go on.
        return await _in_thread(self._executor, self.render_messages, messages, params)

    def _tokenize_prompt(self, prompt: Any, params: Any) -> Any:
        if prompt.get("multi_modal_data"):
            raise VLLMValidationError("images need a chat: use LLM.chat or /v1/chat/completions")
        return self._build_tokens_prompt(_refusing(self._input.text, prompt["prompt"]), prompt)


def _refusing(work: Callable[..., Result], *args: Any) -> Result:
    """Return what `work` returns; what it refuses is the client's fault, for vLLM too."""
    try:
        return work(*args)
    except VilaDeployError as error:
        raise VLLMValidationError(str(error)) from None


async def _in_thread(executor: Any, work: Callable[..., Result], *args: Any) -> Result:
    return await asyncio.get_running_loop().run_in_executor(executor, work, *args)


class PlaceParser(MultiModalDataParser):
    """Takes places from the renderer and nothing else, such as embeddings made elsewhere."""

    def _get_subparsers(self) -> dict[str, Any]:
        return {"image": lambda places: ProcessorBatchItems(places, "image")}


class VilaProcessingInfo(BaseProcessingInfo):
    def __init__(self, ctx: Any):
        super().__init__(ctx)
        self.served = read_served_model(Path(self.model_id))
        self.largest = largest_place(self.served.info)

    def get_data_parser(self) -> MultiModalDataParser:
        return PlaceParser()

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def get_supported_mm_processor_kwargs(self) -> dict[str, set[str]]:
        return {}

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int]:
        return {"image": self.largest.tokens}


class VilaDummyInputs(BaseDummyInputsBuilder):
    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return ""

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any
    ) -> dict[str, Any]:
        return {"image": [self.info.largest] * mm_counts.get("image", 0)}


class VilaProcessor(BaseMultiModalProcessor):
    """Hands the pixels of places to the model, and gives each place its positions."""

    def get_dummy_inputs(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any
    ) -> ProcessorInputs:
        data = self.dummy_inputs.get_dummy_mm_data(seq_len, mm_counts, mm_options)
        return ProcessorInputs(
            prompt=[PLACE_MARKER] * len(data["image"]),
            mm_data_items=self.info.parse_mm_data(data, validate=False),
            mm_uuid_items={"image": [place.key for place in data["image"]]},
        )

    def _call_hf_processor(
        self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, object]
    ) -> BatchFeature:
        places: Sequence[Place] = hf_data["images"]
        dtype = self.info.ctx.model_config.dtype
        return BatchFeature({
            "pixels": [torch.from_numpy(place.pixels.tiles).to(dtype) for place in places],
            "grid": torch.tensor([place.pixels.grid or (0, 0) for place in places]),
            "pool": torch.tensor([place.pixels.pool or (0, 0, 0) for place in places]),
            "tokens": torch.tensor([place.tokens for place in places]),
        })  # fmt: skip

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {name: MultiModalFieldConfig.batched("image") for name in FIELDS}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptReplacement]:
        def positions(index: int) -> list[int]:
            return [FILLER_TOKEN] * int(out_mm_kwargs["image"][index]["tokens"].data)

        return [PromptReplacement(modality="image", target=[PLACE_MARKER], replacement=positions)]


@MULTIMODAL_REGISTRY.register_processor(
    VilaProcessor, info=VilaProcessingInfo, dummy_inputs=VilaDummyInputs
)
class VilaForConditionalGeneration(nn.Module, SupportsMultiModal, SupportsPP):
    """Our vision encoder, whole on each rank of the first pipeline stage, and vLLM's LLM."""

    packed_modules_mapping: ClassVar = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "llm.": "language_model.",
            "model.": "language_model.model.",
            "lm_head.": "language_model.lm_head.",
        }
    )

    vision: VisionEncoder
    language_model: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        served = read_served_model(Path(vllm_config.model_config.model))
        self.allow_patterns_overrides = [served.weight_pattern]
        inherited: Any = super()  # vLLM's methods, whose types are not known
        inherited.configure_mm_token_handling(served.info.vocab_size, [FILLER_TOKEN])
        with inherited._mark_tower_model(vllm_config, "image"):
            if get_pp_group().is_first_rank:
                self.vision = _vision_encoder(served, vllm_config)
        with inherited._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=self.config.text_config,
                prefix=maybe_prefix(prefix, "language_model"),
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def embed_multimodal(self, **kwargs: Any) -> list[Tensor]:
        """Return the embeddings [tokens, hidden] of each place."""
        if not get_pp_group().is_first_rank:
            # Later stages are only asked while vLLM measures memory.
            width = self.config.text_config.hidden_size
            return [torch.zeros(int(tokens), width) for tokens in kwargs.get("tokens", ())]
        values = [kwargs.get(name, ()) for name in FIELDS[:3]]
        return [self._encode(*place) for place in zip(*values, strict=True)]

    def _encode(self, pixels: Tensor, grid: Tensor, pool: Tensor) -> Tensor:
        weight = next(self.vision.parameters())
        (rows, columns), window = grid.tolist(), tuple(pool.tolist())
        tiles = pixels.to(weight.device, weight.dtype)
        encoded = self.vision(tiles, (rows, columns) if rows else None)
        if any(window):
            mean = window_mean(encoded.float().cpu().numpy(), window)
            encoded = torch.from_numpy(mean).to(weight.device, weight.dtype)
        return encoded.flatten(0, 1)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if intermediate_tensors is not None:
            inputs_embeds = None
        return self.language_model.model(
            input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds
        )

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the LLM's weights; the vision encoder has its own already."""
        llm = ((name, tensor) for name, tensor in weights if not _is_vision(name))
        loaded: set[str] = AutoWeightsLoader(self).load_weights(llm, mapper=self.hf_to_vllm_mapper)
        return loaded | {name for name, _ in self.named_parameters() if name.startswith("vision.")}

    def get_mm_mapping(self) -> MultiModelKeys:
        return MultiModelKeys.from_string_field(
            "language_model", "vision.projector", "vision.tower"
        )


def _vision_encoder(served: ServedModel, vllm_config: VllmConfig) -> VisionEncoder:
    tower, projector = open_vision(served.layout, served.config)
    # vLLM builds models on its device, where reading a file would fail.
    with torch.device("cpu"):
        vision = VisionEncoder(served.config, tower, projector, vllm_config.model_config.dtype)
    return vision.to(vllm_config.device_config.device)


def _is_vision(name: str) -> bool:
    """Return whether a tensor of a checkpoint in one folder belongs to the vision encoder."""
    return name.removeprefix("model.").startswith(("vision_tower.", "mm_projector."))
