"""Check the tensors of a checkpoint against those that its configs ask for."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.int8_tower import SCALE
from vila_deploy.checkpoint.llm_config import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    NORMS,
    LlmConfig,
    layer_prefix,
)
from vila_deploy.checkpoint.safetensors_header import TensorInfo
from vila_deploy.checkpoint.vision_config import VisionConfig
from vila_deploy.formats.base import HEAD_LINEAR, QuantizationConfig, TensorSpec
from vila_deploy.formats.module_dtypes import is_tower_linear
from vila_deploy.formats.registry import format_of
from vila_deploy.utils.errors import VilaDeployError, short

# What released checkpoints carry although nothing uses it; any other extra tensor is an error.
UNUSED_LLM = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
UNUSED_TOWER = re.compile(
    r"vision_model\.(post_layernorm\.(weight|bias)|head\..+|embeddings\.position_ids)"
)
TOWER_LAYER = re.compile(r"(?:vision_model\.)?encoder\.layers\.(\d{1,4})\..+")


def check_llm(config: LlmConfig, tensors: Mapping[str, TensorInfo], folder: Path) -> None:
    """Compare llm/ with its config.

    Raises:
        VilaDeployError: names the first tensor that is missing, wrong or unknown.
    """
    known = _check_specs(llm_tensor_specs(config), tensors, folder)
    for name in tensors:
        tied = name == HEAD and config.tie_word_embeddings
        if name not in known and not tied and not UNUSED_LLM.fullmatch(name):
            raise _unknown(tensors[name], folder)


def check_tower(config: VilaConfig, tensors: Mapping[str, TensorInfo], folder: Path) -> None:
    """Compare vision_tower/ with its config; layers behind the selected one may be absent."""
    linears = tower_linears(config)
    for name in config.vision.int8_linears:
        if name not in linears:
            raise VilaDeployError(
                f"has int8 for {short(name)}, a linear that this tower lacks",
                where=f"{folder / 'config.json'}: quantization_config",
                fix="correct this key",
            )
    known = _check_specs(_stored_tower_specs(config), tensors, folder)
    for name in tensors:
        if name not in known and not unused_tensor(config, name):
            raise _unknown(tensors[name], folder)


def tower_linears(config: VilaConfig) -> dict[str, tuple[int, ...]]:
    """Return name → shape [out, in] of the linears in a tower's layers, those that int8 is for."""
    specs = tower_tensor_specs(config)
    return {
        spec.name.removesuffix(".weight"): spec.shape
        for spec in specs
        if is_tower_linear(spec.name, spec.shape)
    }


def _stored_tower_specs(config: VilaConfig) -> Iterator[TensorSpec]:
    """Yield the tensors of vision_tower/ as stored, with the scales of those in int8."""
    int8 = {f"{name}.weight" for name in config.vision.int8_linears}
    for spec in tower_tensor_specs(config):
        if spec.name not in int8:
            yield spec
        else:
            yield TensorSpec(spec.name, spec.shape, ("I8",))
            yield TensorSpec(spec.name + SCALE, (spec.shape[0], 1))


def unused_tensor(config: VilaConfig, name: str) -> bool:
    """Return whether a tensor of vision_tower/ lies behind the selected hidden state."""
    layer = TOWER_LAYER.fullmatch(name)
    if layer:
        return config.vision_layers_used <= int(layer[1]) < config.vision.num_layers
    return bool(UNUSED_TOWER.fullmatch(name))


def check_projector(config: VilaConfig, tensors: Mapping[str, TensorInfo], folder: Path) -> None:
    """Compare mm_projector/ with its config."""
    known = _check_specs(projector_tensor_specs(config), tensors, folder)
    for name in tensors:
        if name not in known:
            raise _unknown(tensors[name], folder)


def llm_tensor_specs(config: LlmConfig) -> Iterator[TensorSpec]:
    """Yield every tensor of llm/, decoder linears in fp or in the format that its config names."""
    yield TensorSpec(EMBEDDING, (config.vocab_size, config.hidden_size))
    if config.head_is_quantized:
        assert config.quantization is not None
        head = config.vocab_size, config.hidden_size
        yield from _quantized_specs(HEAD_LINEAR, *head, config.quantization)
    elif not config.tie_word_embeddings:
        yield TensorSpec(HEAD, (config.vocab_size, config.hidden_size))
    yield TensorSpec(FINAL_NORM, (config.hidden_size,))
    linears = config.linears
    for index in range(config.num_layers):
        prefix = layer_prefix(index)
        for norm in NORMS:
            yield TensorSpec(f"{prefix}.{norm}.weight", (config.hidden_size,))
        for name, (rows, columns) in linears.items():
            if config.quantization is None:
                yield TensorSpec(f"{prefix}.{name}.weight", (rows, columns))
            else:
                yield from _quantized_specs(f"{prefix}.{name}", rows, columns, config.quantization)
            if config.has_bias(name):
                yield TensorSpec(f"{prefix}.{name}.bias", (rows,))


def _quantized_specs(
    prefix: str, rows: int, columns: int, quantization: QuantizationConfig
) -> Iterator[TensorSpec]:
    """Yield the tensors of a linear of `rows` output and `columns` input channels, but its bias."""
    scheme = quantization.scheme.of(prefix)
    specs = format_of(quantization).packing.tensor_specs(
        rows, columns, scheme.group_size, scheme.bits, not scheme.symmetric
    )
    for part, shape, dtypes in specs:
        yield TensorSpec(f"{prefix}.{part}", shape, dtypes)


def tower_tensor_specs(config: VilaConfig) -> Iterator[TensorSpec]:
    """Yield the tensors of vision_tower/ up to the selected hidden state."""
    vision = config.vision
    prefix, width = vision.family.prefix, vision.hidden_size
    internvit = vision.family.name == "internvit"
    embeddings = f"{prefix}embeddings"
    patch = (width, 3, vision.patch_size, vision.patch_size)
    yield TensorSpec(f"{embeddings}.patch_embedding.weight", patch)
    if vision.family.name != "clip":
        yield TensorSpec(f"{embeddings}.patch_embedding.bias", (width,))
    if internvit:
        yield TensorSpec(f"{embeddings}.class_embedding", (1, 1, width))
        yield TensorSpec(f"{embeddings}.position_embedding", (1, vision.positions, width))
    else:
        yield TensorSpec(f"{embeddings}.position_embedding.weight", (vision.positions, width))
    if vision.family.name == "clip":
        yield TensorSpec(f"{embeddings}.class_embedding", (width,))
        # transformers' own spelling.
        yield from _with_bias(f"{prefix}pre_layrnorm", (width,))
    layer = _internvit_layer if internvit else _tower_layer
    for index in range(config.vision_layers_used):
        yield from layer(vision, f"{prefix}encoder.layers.{index}")


def _tower_layer(vision: VisionConfig, prefix: str) -> Iterator[TensorSpec]:
    """Yield a layer of SigLIP or CLIP."""
    width, inner = vision.hidden_size, vision.intermediate_size
    for norm in ("layer_norm1", "layer_norm2"):
        yield from _with_bias(f"{prefix}.{norm}", (width,))
    for name in ("q", "k", "v", "out"):
        yield from _with_bias(f"{prefix}.self_attn.{name}_proj", (width, width))
    yield from _with_bias(f"{prefix}.mlp.fc1", (inner, width))
    yield from _with_bias(f"{prefix}.mlp.fc2", (width, inner))


def _internvit_layer(vision: VisionConfig, prefix: str) -> Iterator[TensorSpec]:
    """Yield a layer of InternViT: RMS norms, one matrix for q, k and v, a scale on each branch."""
    width, inner = vision.hidden_size, vision.intermediate_size
    for name in ("norm1.weight", "norm2.weight", "ls1", "ls2"):
        yield TensorSpec(f"{prefix}.{name}", (width,))
    yield TensorSpec(f"{prefix}.attn.qkv.weight", (3 * width, width))
    if vision.qkv_bias:
        yield TensorSpec(f"{prefix}.attn.qkv.bias", (3 * width,))
    if vision.qk_norm:
        yield TensorSpec(f"{prefix}.attn.q_norm.weight", (width,))
        yield TensorSpec(f"{prefix}.attn.k_norm.weight", (width,))
    yield from _with_bias(f"{prefix}.attn.proj", (width, width))
    yield from _with_bias(f"{prefix}.mlp.fc1", (inner, width))
    yield from _with_bias(f"{prefix}.mlp.fc2", (width, inner))


def _with_bias(prefix: str, shape: tuple[int, ...]) -> Iterator[TensorSpec]:
    yield TensorSpec(f"{prefix}.weight", shape)
    yield TensorSpec(f"{prefix}.bias", shape[:1])


def projector_tensor_specs(config: VilaConfig) -> Iterator[TensorSpec]:
    """Yield the tensors of mm_projector/, as its row in PROJECTOR_TYPES lays them out."""
    kind = config.projector
    for index, shape in kind.shapes(config.feature_channels, config.llm.hidden_size).items():
        yield TensorSpec(f"{kind.prefix(index)}.weight", shape)
        yield TensorSpec(f"{kind.prefix(index)}.bias", shape[:1])


def parameters(specs: Iterable[TensorSpec]) -> int:
    """Return how many parameters there are in all."""
    return sum(math.prod(spec.shape) for spec in specs)


def _check_specs(
    expected: Iterator[TensorSpec], tensors: Mapping[str, TensorInfo], folder: Path
) -> set[str]:
    """Return the expected names; raise for the first that is missing or wrong."""
    known: set[str] = set()
    for name, shape, dtypes in expected:
        known.add(name)
        info = tensors.get(name)
        if info is None:
            raise VilaDeployError(
                f"tensor {name} is missing",
                where=folder,
                fix="download the whole checkpoint, or correct config.json there",
            )
        if info.shape != shape:
            raise VilaDeployError(
                f"tensor {name} is {list(info.shape)}, config.json asks for {list(shape)}",
                where=info.file,
                fix=f"correct {folder.name}/config.json or download this file again",
            )
        if info.dtype not in dtypes:
            raise VilaDeployError(
                f"tensor {name} is {info.dtype}, must be {' or '.join(dtypes)}",
                where=info.file,
                fix="convert it or download this file again",
            )
    return known


def _unknown(info: TensorInfo, folder: Path) -> VilaDeployError:
    return VilaDeployError(
        f"tensor {info.name[:120]} is not part of the model that config.json describes",
        where=info.file,
        fix=f"correct {folder.name}/config.json or use a checkpoint of a supported family",
    )
