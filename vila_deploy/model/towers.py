"""The reference vision towers, up to the selected layer: pixels to features of patches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, SiglipVisionConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer, CLIPVisionEmbeddings
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer, SiglipVisionEmbeddings

from vila_deploy.checkpoint.vision_config import VisionConfig
from vila_deploy.checkpoint.weight_source import WeightSource

GELU = {"gelu_pytorch_tanh": "tanh", "gelu": "none"}


class VisionTower(nn.Module):
    """Pixels [tiles, 3, size, size] → features [tiles, patches, channels], class token dropped.

    Its parameters are named as on disk. Layers behind the selected one are neither built nor read.

    Args:
        layers: how many encoder layers feed the selected hidden state.
    """

    def __init__(
        self,
        config: VisionConfig,
        layers: int,
        weights: WeightSource,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.config = config
        with torch.device("meta"):
            embeddings, pre_norm, blocks = _BUILDERS[config.family.name](config, layers)
            self.embeddings = embeddings
            self.pre_layrnorm = pre_norm or nn.Identity()
            self.encoder = nn.Module()
            self.encoder.layers = nn.ModuleList(blocks)
        if "position_ids" in dict(self.embeddings.named_buffers()):
            positions = torch.arange(config.positions)[None]
            self.embeddings.register_buffer("position_ids", positions, persistent=False)
        prefix = config.family.prefix
        state = {name: weights.tensor(prefix + name).to(dtype) for name in self.state_dict()}
        self.load_state_dict(state, strict=True, assign=True)

    def forward(self, pixels: Tensor) -> Tensor:
        hidden = self.pre_layrnorm(self.embeddings(pixels))
        for layer in self.encoder.get_submodule("layers").children():
            output = layer(hidden, attention_mask=None)
            hidden = output[0] if isinstance(output, tuple) else output
        return hidden[:, 1:] if self.config.family.has_class_token else hidden


def _siglip(config: VisionConfig, layers: int) -> tuple[nn.Module, None, list[nn.Module]]:
    built = SiglipVisionConfig(**_common(config))
    built._attn_implementation = "sdpa"
    return SiglipVisionEmbeddings(built), None, [SiglipEncoderLayer(built) for _ in range(layers)]


def _clip(config: VisionConfig, layers: int) -> tuple[nn.Module, nn.Module, list[nn.Module]]:
    built = CLIPVisionConfig(**_common(config))
    built._attn_implementation = "sdpa"
    norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
    return CLIPVisionEmbeddings(built), norm, [CLIPEncoderLayer(built) for _ in range(layers)]


def _internvit(config: VisionConfig, layers: int) -> tuple[nn.Module, None, list[nn.Module]]:
    blocks: list[nn.Module] = [InternVitLayer(config) for _ in range(layers)]
    return InternVitEmbeddings(config), None, blocks


_BUILDERS = {"siglip": _siglip, "clip": _clip, "internvit": _internvit}


def _common(config: VisionConfig) -> dict[str, Any]:
    """Return the arguments of transformers' config of the same tower."""
    return {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "patch_size": config.patch_size,
        "image_size": config.image_size,
        "hidden_act": config.hidden_act,
        "layer_norm_eps": config.layer_norm_eps,
    }


class InternVitEmbeddings(nn.Module):
    """InternViT-6B-448px-V1-2's embeddings: patches behind a class token, learned positions."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(1, 1, width))
        self.position_embedding = nn.Parameter(torch.empty(1, config.positions, width))
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(pixels), -1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding


class InternVitLayer(nn.Module):
    """InternViT's layer: RMS norms, queries and keys normed over all heads, scaled branches."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        width, epsilon = config.hidden_size, config.layer_norm_eps
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=epsilon), nn.RMSNorm(width, eps=epsilon)
        self.attn = InternVitAttention(config)
        self.mlp = InternVitMlp(config)
        self.ls1, self.ls2 = (nn.Parameter(torch.empty(width)) for _ in range(2))

    def forward(self, hidden: Tensor, attention_mask: None = None) -> Tensor:
        hidden = hidden + self.attn(self.norm1(hidden)) * self.ls1
        return hidden + self.mlp(self.norm2(hidden)) * self.ls2


class InternVitAttention(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        self.proj = nn.Linear(width, width)
        self.q_norm, self.k_norm = (
            nn.RMSNorm(width, eps=config.layer_norm_eps) if config.qk_norm else nn.Identity()
            for _ in range(2)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = self.qkv(hidden).chunk(3, dim=-1)
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.q_norm(query), self.k_norm(key), value)
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class InternVitMlp(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.approximate = GELU[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(hidden), approximate=self.approximate))
