"""The reference vision encoder: tower up to the selected layer, then the projector."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer, SiglipVisionEmbeddings

from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.vision_config import VisionConfig
from vila_deploy.model.projector import Projector
from vila_deploy.model.weights import WeightSource


class VisionEncoder(nn.Module):
    """Pixels [images, 3, size, size] → LLM embeddings [images, tokens, hidden].

    Layers behind the selected hidden state are neither built nor read.
    """

    def __init__(
        self,
        config: VilaConfig,
        tower: WeightSource,
        projector: WeightSource,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        built = transformers_config(config.vision)
        with torch.device("meta"):
            self.embeddings = SiglipVisionEmbeddings(built)
            self.layers = nn.ModuleList(
                SiglipEncoderLayer(built) for _ in range(config.vision_layers_used)
            )
            self.projector = Projector(
                config.vision.hidden_size,
                config.llm.hidden_size,
                config.projector,
                config.token_order,
            )
        positions = torch.arange(config.vision.grid**2)[None]
        self.embeddings.register_buffer("position_ids", positions, persistent=False)
        _load(self.embeddings, tower, "vision_model.embeddings.", dtype)
        _load(self.layers, tower, "vision_model.encoder.layers.", dtype)
        for index in config.projector.shapes(1, 1):
            prefix = f"{config.projector.prefix(index)}."
            _load(self.projector.get_submodule(str(index)), projector, prefix, dtype)
        self.eval().requires_grad_(False)

    @torch.inference_mode()
    def forward(self, pixels: Tensor) -> Tensor:
        hidden = self.embeddings(pixels)
        for layer in self.layers:
            output = layer(hidden, attention_mask=None)
            hidden = output[0] if isinstance(output, tuple) else output
        return self.projector(hidden)


def transformers_config(config: VisionConfig) -> SiglipVisionConfig:
    """The same tower in transformers' terms."""
    built = SiglipVisionConfig(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        intermediate_size=config.intermediate_size,
        patch_size=config.patch_size,
        image_size=config.image_size,
        hidden_act=config.hidden_act,
        layer_norm_eps=config.layer_norm_eps,
    )
    built._attn_implementation = "sdpa"
    return built


def _load(module: nn.Module, weights: WeightSource, prefix: str, dtype: torch.dtype) -> None:
    state = {name: weights.tensor(prefix + name).to(dtype) for name in module.state_dict()}
    module.load_state_dict(state, strict=True, assign=True)
