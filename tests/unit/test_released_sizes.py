"""Configs at the released models' true shapes give the byte counts of the released files."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import pytest
import torch
from transformers import SiglipVisionModel

from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.expected import Expected, expected_llm, expected_projector
from vila_deploy.checkpoint.llm_config import QuantizationConfig
from vila_deploy.checkpoint.variants import LLM_FAMILIES, PROJECTOR_TYPES
from vila_deploy.model.presets import preset
from vila_deploy.model.vision import transformers_config

DTYPE_BYTES = {"I32": 4, "F16": 2}


def released(name: str) -> VilaConfig:
    """A preset, or one with the LLM of a model that is not wholly supported yet."""
    if name in ("VILA1.5-40b", "NVILA-8B"):
        base = preset("VILA1.5-3b", "fp16")
        family, *sizes = {
            "VILA1.5-40b": ("LlamaForCausalLM", 7168, 60, 56, 8, 20480, 64000),
            "NVILA-8B": ("Qwen2ForCausalLM", 3584, 28, 28, 4, 18944, 151648),
        }[name]
        keys = ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "intermediate_size")
        llm = dataclasses.replace(
            base.llm,
            family=LLM_FAMILIES[family],
            **dict(zip((*keys, "vocab_size"), sizes, strict=True)),
        )
        return dataclasses.replace(base, llm=llm)
    return preset(name, "fp16")


def size_bytes(tensors: Iterable[Expected]) -> int:
    return sum(math.prod(t.shape) * DTYPE_BYTES.get(t.dtypes[0], 2) for t in tensors)


@pytest.mark.parametrize(
    ("name", "file_bytes"),
    [
        ("VILA1.5-3b", 5.40e9),
        ("Llama-3-VILA1.5-8B", 16.06e9),
        ("VILA1.5-13b", 26.03e9),
        ("NVILA-8B", 15.22e9),
    ],
)
def test_llm_in_float16(name: str, file_bytes: float) -> None:
    assert size_bytes(expected_llm(released(name).llm)) == pytest.approx(file_bytes, rel=0.005)


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
    config = released(name).llm
    quantized = dataclasses.replace(
        config, quantization=QuantizationConfig("awq", 4, 128, True, "gemm")
    )
    tensors = list(expected_llm(quantized))
    scales = [t.shape for t in tensors if t.name.endswith(".scales")]
    padded = sum(8 * math.ceil(groups / 8) * rows for groups, rows in scales)
    rest = [t for t in tensors if not t.name.endswith((".scales", ".qzeros"))]
    assert size_bytes(rest) + 4 * padded == pytest.approx(file_bytes, rel=0.005)


@pytest.mark.parametrize(("image_size", "head", "file_bytes"), [(384, 1, 857e6), (448, 0, 827e6)])
def test_tower(image_size: int, head: int, file_bytes: float) -> None:
    vision = dataclasses.replace(preset("VILA1.5-3b", "fp16").vision, image_size=image_size)
    config = transformers_config(vision)
    config.vision_use_head = bool(head)
    with torch.device("meta"):
        tower = SiglipVisionModel(config)
    size = 2 * sum(parameter.numel() for parameter in tower.parameters())
    assert size == pytest.approx(file_bytes, rel=0.005)


@pytest.mark.parametrize(
    ("model", "kind", "channels", "hidden_size", "file_bytes"),
    [
        ("VILA1.5-3b", "mlp_downsample", 1152, 2560, 36.7e6),
        ("VILA1.5-3b-s2", "mlp_downsample", 2304, 2560, 60.3e6),
        ("Llama-3-VILA1.5-8B", "mlp_downsample", 1152, 4096, 71.3e6),
        ("VILA1.5-13b", "mlp_downsample", 1152, 5120, 99.7e6),
        ("VILA1.5-40b", "mlp_downsample", 3200, 7168, 286e6),
        ("NVILA-8B", "mlp_downsample", 3456, 3584, 125e6),
        ("NVILA-Lite-8B", "mlp_downsample_3x3_fix", 1152, 3584, 122e6),
        ("NVILA-Lite-15B", "mlp_downsample_3x3_fix", 1152, 5120, 160e6),
    ],
)
def test_projector(
    model: str, kind: str, channels: int, hidden_size: int, file_bytes: float
) -> None:
    base = preset("VILA1.5-3b", "fp16")
    config = dataclasses.replace(
        base,
        vision=dataclasses.replace(base.vision, hidden_size=channels),
        llm=dataclasses.replace(base.llm, hidden_size=hidden_size),
        projector=PROJECTOR_TYPES[kind],
    )
    assert size_bytes(expected_projector(config)) == pytest.approx(file_bytes, rel=0.005), model
