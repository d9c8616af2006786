"""Configs at the released models' true shapes give the byte counts of the released files."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import pytest
import torch
from transformers import (
    LlamaForCausalLM,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from vila_deploy.checkpoint.llm_config import QuantizationConfig
from vila_deploy.checkpoint.presets import PRESETS, VIDEO_PRESETS, preset
from vila_deploy.checkpoint.tensor_schema import (
    TensorSpec,
    llm_tensor_specs,
    projector_tensor_specs,
    tower_tensor_specs,
)
from vila_deploy.model import llm as llm_module
from vila_deploy.model import towers
from vila_deploy.model.projector import Projector
from vila_deploy.utils.errors import VilaDeployError

DTYPE_BYTES = {"I32": 4, "F16": 2}
# float16 bytes of a layer, the last norm and the pooling head, from the released sizes.
SIGLIP_LAYER = 2 * (4 * (1152**2 + 1152) + 2 * 1152 * 4304 + 4304 + 1152 + 4 * 1152)
SIGLIP_NORM = 2 * 2 * 1152
SIGLIP_HEAD = SIGLIP_LAYER - 2 * 2 * 1152 + 2 * 1152
CLIP_LAYER = 2 * (4 * (1024**2 + 1024) + 2 * 1024 * 4096 + 4096 + 1024 + 4 * 1024)


def size_bytes(tensors: Iterable[TensorSpec]) -> int:
    return sum(math.prod(t.shape) * DTYPE_BYTES.get(t.dtypes[0], 2) for t in tensors)


@pytest.mark.parametrize(
    ("name", "file_bytes"),
    [
        ("VILA1.5-3b", 5.40e9),
        ("Llama-3-VILA1.5-8B", 16.06e9),
        ("VILA1.5-13b", 26.03e9),
        ("NVILA-8B", 15.22e9),
        ("NVILA-Lite-8B", 15.22e9),
    ],
)
def test_llm_in_float16(name: str, file_bytes: float) -> None:
    assert size_bytes(llm_tensor_specs(preset(name, "fp16").llm)) == pytest.approx(
        file_bytes, rel=0.005
    )


# The published 4-bit files hold zero points in float16 too, and whole eights of groups.
@pytest.mark.parametrize(
    ("name", "file_bytes"),
    [
        ("VILA1.5-3b", 1.69e9),
        ("Llama-3-VILA1.5-8B", 5.81e9),
        ("VILA1.5-13b", 7.40e9),
        ("VILA1.5-40b", 19.62e9),
        ("NVILA-8B", 5.66e9),
    ],
)
def test_llm_in_4_bits(name: str, file_bytes: float) -> None:
    config = preset(name, "fp16").llm
    quantized = dataclasses.replace(
        config, quantization=QuantizationConfig("awq", 4, 128, True, "gemm")
    )
    tensors = list(llm_tensor_specs(quantized))
    scales = [t.shape for t in tensors if t.name.endswith(".scales")]
    padded = sum(8 * math.ceil(groups / 8) * rows for groups, rows in scales)
    rest = [t for t in tensors if not t.name.endswith((".scales", ".qzeros"))]
    assert size_bytes(rest) + 4 * padded == pytest.approx(file_bytes, rel=0.005)


def test_tower_on_the_meta_device() -> None:
    """SigLIP's files hold a last layer and a head that are not used: built by transformers."""
    for pixels, head, file_bytes in ((384, True, 857e6), (448, False, 827e6)):
        config = SiglipVisionConfig(
            hidden_size=1152, num_hidden_layers=27, num_attention_heads=16,
            intermediate_size=4304, patch_size=14, image_size=pixels, vision_use_head=head,
        )  # fmt: skip
        with torch.device("meta"):
            tower = SiglipVisionModel(config)
        size = 2 * sum(parameter.numel() for parameter in tower.parameters())
        assert size == pytest.approx(file_bytes, rel=0.005)


# What is used of the tower: all of InternViT; the others have a last layer and more.
@pytest.mark.parametrize(
    ("name", "file_bytes", "unused"),
    [
        ("VILA1.5-3b", 857e6, SIGLIP_LAYER + SIGLIP_NORM + SIGLIP_HEAD),
        ("NVILA-8B", 827e6, SIGLIP_LAYER + SIGLIP_NORM),
        ("VILA1.5-40b", 11.08e9, 0),
        ("VILA-13b", 0.607e9, CLIP_LAYER + 2 * 2 * 1024),
    ],
)
def test_tower(name: str, file_bytes: float, unused: int) -> None:
    used = size_bytes(tower_tensor_specs(preset(name, "fp16")))
    assert used + unused == pytest.approx(file_bytes, rel=0.005)


@pytest.mark.parametrize(
    ("name", "file_bytes"),
    [
        ("VILA1.5-3b", 36.7e6),
        ("VILA1.5-3b-s2", 60.3e6),
        ("Llama-3-VILA1.5-8B", 71.3e6),
        ("VILA1.5-13b", 99.7e6),
        ("VILA1.5-40b", 286e6),
        ("NVILA-8B", 125e6),
        ("NVILA-15B", 194e6),
        ("NVILA-Lite-8B", 122e6),
        ("VILA-13b", 63e6),
        ("NVILA-8B-Video", 58.8e6),
        ("qwen2-1.5b-longvila-256f", 18.9e6),
    ],
)
def test_projector(name: str, file_bytes: float) -> None:
    tensors = projector_tensor_specs(preset(name, "fp16"))
    assert size_bytes(tensors) == pytest.approx(file_bytes, rel=0.005)


# Tokens that one image takes at most, as the original code gives them.
@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("VILA1.5-3b", 196),
        ("VILA1.5-3b-s2", 196),
        ("VILA1.5-40b", 256),
        ("NVILA-8B", 3072),
        ("NVILA-Lite-8B", 121 * 13),
        ("VILA-7b", 576),
    ],
)
def test_tokens_per_image(name: str, tokens: int) -> None:
    assert preset(name, "fp16").max_tokens_per_image == tokens


@pytest.mark.parametrize(
    ("name", "frames", "tokens"),
    [
        ("NVILA-8B", 8, 8 * 257),
        ("NVILA-8B-Video", 256, 32 * 257),
        ("NVILA-Lite-15B-Video", 256, 32 * 122),
        ("qwen2-1.5b-longvila-256f", 256, 256 * 197),
        ("qwen2-7b-longvila-1M", 256, 256 * 197),
    ],
)
def test_tokens_of_a_video(name: str, frames: int, tokens: int) -> None:
    config = preset(name, "fp16")
    assert (config.video.num_frames, config.tokens_per_video) == (frames, tokens)


@pytest.mark.parametrize("name", [*PRESETS, *VIDEO_PRESETS])
def test_every_part_on_the_meta_device(name: str) -> None:
    """What the tables expect is what the modules hold: LLM by transformers, tower and projector."""
    config = preset(name, "fp16")
    kinds = {"llama": LlamaForCausalLM, "qwen2": Qwen2ForCausalLM}
    with torch.device("meta"):
        llm = kinds[config.llm.family.name](llm_module.transformers_config(config.llm))
        embeddings, norm, layers = towers._BUILDERS[config.vision.family.name](
            config.vision, config.vision_layers_used
        )
        tower = torch.nn.ModuleList([embeddings, *layers, *([norm] if norm else [])])
        projector = Projector(
            config.feature_channels, config.llm.hidden_size, config.projector, config.token_order
        )
    for module, expected in (
        (llm, llm_tensor_specs(config.llm)),
        (tower, tower_tensor_specs(config)),
        (projector, projector_tensor_specs(config)),
    ):
        count = sum(parameter.numel() for parameter in module.parameters())
        assert count == sum(math.prod(tensor.shape) for tensor in expected)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("VILA1.5-8b", "Llama-3-VILA1.5-8B"), ("vila1.5-40B", "VILA1.5-40b"), ("8B", None)],
)
def test_a_name_that_is_nearly_right_is_recognised(name: str, meant: str | None) -> None:
    with pytest.raises(VilaDeployError, match="choose from VILA") as raised:
        preset(name, "int4")
    assert ("did you mean" in str(raised.value)) == (meant is not None)
    assert meant is None or f"did you mean {meant}? " in str(raised.value)
