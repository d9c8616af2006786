"""What an engine will take on its target, from the configs alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from vila_deploy.backends.tensorrt.decoder import PREFILL_TOKENS
from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.llm_config import LlmConfig
from vila_deploy.checkpoint.tensor_schema import (
    TensorSpec,
    projector_tensor_specs,
    tower_tensor_specs,
)
from vila_deploy.engine.manifest import Limits
from vila_deploy.engine.precision import ALL_FP16, BITS, ModulePrecision
from vila_deploy.engine.target import Target, TensorRt
from vila_deploy.formats.module_dtypes import FP16, INT8, head_group_size, is_tower_linear
from vila_deploy.utils.estimates import MemoryItem, PlanStep, available_memory_bytes, parameters

DEFAULT_GROUP_SIZE = 128
TENSORRT, PRIMITIVE = "tensorrt", "primitive"
# Python with onnxruntime, and a CUDA context with its libraries.
CPU_PROGRAM_BYTES, GPU_PROGRAM_BYTES = 200 << 20, 800 << 20
# TensorRT's compiler at its peak, in weights of the graph that it compiles: measured with
# tensorrt-rtx 1.7 (1.14 GB for 0.50 GB, 3.6 for 1.51, 10.0 for 4.76, 14.5 for 7.07). What it maps
# of the weights' file comes on top, and leaves again where memory is short. On the device, assumed
# with it.
COMPILER_FACTOR, COMPILER_BYTES = {"tensorrt-rtx": 2.0, "tensorrt": 3.2}, 400 << 20
COMPILED_AS_ONE = ("llm decoder linears", "llm head", "llm norms")


@dataclass(frozen=True)
class Storage:
    """Bits in device memory of what a backend keeps there."""

    dense_bits: int
    scale_bits: int
    cache_bits: int
    # Of a group of weights: in the decoder layers, and in an int4 head.
    zero_bits: int = 4
    head_zero_bits: int = 0


# onnxruntime's CPU kernels compute in float32, so float16 weights are widened when it loads them.
CPU_STORAGE = Storage(dense_bits=32, scale_bits=32, cache_bits=32)
GPU_STORAGE = Storage(dense_bits=16, scale_bits=16, cache_bits=16)
# Our kernels keep every zero point as float16.
NATIVE_STORAGE = replace(GPU_STORAGE, zero_bits=16, head_zero_bits=16)
# Parts that backend native can leave in the memory of a card's host, in the order of what it costs.
EMBEDDINGS, VISION = "embeddings", "vision tower"
# Layers of a tower left there that are on the card at a time: one computes, one may be on its way.
VISITING_LAYERS = 2
# Tokens of a prompt at a time; how many there must be before weights are written out in float16.
NATIVE_PREFILL_TOKENS, NATIVE_DENSE_TOKENS = 1024, 256


@dataclass(frozen=True)
class EnginePlan:
    """Memory while running (`device_bytes`) against what the target has (`limit_bytes`).

    `components` are the parts of that memory, `module_precision` what some of them are in, and
    `in_host_memory` what stays outside, in the memory of the host that the card is in.
    """

    target: str
    backend: str
    precision: str
    fits: bool
    device_bytes: int
    limit_bytes: int
    components: tuple[MemoryItem, ...]
    stages: tuple[PlanStep, ...]
    module_precision: ModulePrecision = ALL_FP16
    in_host_memory: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        # The key that programs know.
        return {("kept_as" if k == "module_precision" else k): v for k, v in values.items()}


def plan_engine(
    config: VilaConfig,
    target: Target,
    backend: str,
    precision: str,
    limits: Limits,
    module_precision: ModulePrecision = ALL_FP16,
) -> EnginePlan:
    """Bytes of weights, cache and activations on `target`; no weights are read."""
    on_cpu = target.compute_capability is None
    storage = CPU_STORAGE if on_cpu else GPU_STORAGE
    if backend == "native":
        storage = NATIVE_STORAGE
        activations = _native_activations(config, limits, precision, module_precision.vision)
    else:
        tensorrt = target.tensorrt if backend == TENSORRT else None
        activations = _activations(config, limits, storage, tensorrt)
    components = (
        *_weights(config, precision, storage, module_precision),
        _cache(config.llm, limits, storage, module_precision.kv_cache),
        activations,
    )
    program = CPU_PROGRAM_BYTES if on_cpu else GPU_PROGRAM_BYTES
    limit_bytes = target.usable_bytes or available_memory_bytes()
    moved: dict[str, int] = {}
    if backend == "native" and target.reserved_bytes is None:
        room_bytes = limit_bytes - program
        components, moved = _into_host_memory(
            config, components, room_bytes, module_precision.vision
        )
    device_bytes = program + sum(component.bytes for component in components)
    stages = _stages(config, target, backend, components, limit_bytes, device_bytes)
    if moved:
        said = f"in the host's memory: {' and '.join(moved)}"
        if VISION in moved:
            said += f"; {moved[VISION] / 1e9:.1f} GB come to the card for each picture"
        stages = (*stages, PlanStep(said, sum(moved.values())))
    return EnginePlan(
        target=target.name,
        backend=backend,
        precision=precision,
        fits=device_bytes <= limit_bytes,
        device_bytes=device_bytes,
        limit_bytes=limit_bytes,
        components=components,
        stages=stages,
        module_precision=module_precision,
        in_host_memory=tuple(moved),
    )


def _stages(
    config: VilaConfig,
    target: Target,
    backend: str,
    components: tuple[MemoryItem, ...],
    limit_bytes: int,
    device_bytes: int,
) -> tuple[PlanStep, ...]:
    """What is done where, and the memory that it takes there; estimates."""
    layer = sum(map(math.prod, config.llm.linears.values())) * 4
    head = config.llm.vocab_size * config.llm.hidden_size * 6
    graphs = PlanStep("build graphs on this computer", (600 << 20) + max(2 * layer, head))
    run = PlanStep(f"run on {target.title}", device_bytes)
    if backend != "tensorrt" or target.tensorrt is None:
        return graphs, run
    weights = sum(part.bytes for part in components if part.name in COMPILED_AS_ONE)
    needed = compiler_memory_bytes(target.tensorrt.package, weights)
    if target.tensorrt.package == "tensorrt-rtx":
        here = "this computer" if needed <= available_memory_bytes() else "one with more memory"
        return graphs, PlanStep(f"compile on {here}", needed), run
    swap = "" if needed <= limit_bytes else f": {(needed - limit_bytes) / 1e9:.0f} GB of swap"
    return graphs, PlanStep(f"compile on {target.title}{swap}", needed), run


def compiler_memory_bytes(package: str, weight_bytes: int) -> int:
    """What TensorRT's compiler needs for a graph with so many bytes of weights; an estimate."""
    return COMPILER_BYTES + int(COMPILER_FACTOR[package] * weight_bytes)


def _weights(
    config: VilaConfig, precision: str, storage: Storage, module_precision: ModulePrecision
) -> Iterable[MemoryItem]:
    llm = config.llm
    linears = llm.num_layers * sum(map(math.prod, llm.linears.values()))
    group = llm.quantization.group_size if llm.quantization else DEFAULT_GROUP_SIZE
    bits = (
        storage.dense_bits
        if precision == "fp16"
        else 4 + (storage.scale_bits + storage.zero_bits) / group
    )
    table = llm.vocab_size * llm.hidden_size
    yield MemoryItem.of("llm decoder linears", linears, bits)
    # Looked up row by row, so it stays in float16 everywhere.
    yield MemoryItem.of("llm embeddings", table, 16)
    yield MemoryItem.of("llm head", table, _head_bits(llm, module_precision.lm_head, storage))
    yield MemoryItem.of("llm norms", llm.hidden_size * (2 * llm.num_layers + 1), storage.dense_bits)
    yield _tower(config, module_precision.vision, storage)
    yield MemoryItem.of("projector", parameters(projector_tensor_specs(config)), storage.dense_bits)


def _head_bits(llm: LlmConfig, dtype: str, storage: Storage) -> float:
    """At most: backends that know groups only have a scale for each of them in int8 too.

    TensorRT keeps two matrices of int4, each with its scales.
    """
    if dtype == FP16:
        return storage.dense_bits
    scales = 32 if dtype == INT8 else storage.scale_bits + storage.head_zero_bits
    return BITS[dtype] + scales / head_group_size(llm.hidden_size)


def _tower(config: VilaConfig, dtype: str, storage: Storage) -> MemoryItem:
    tensors = list(tower_tensor_specs(config))
    count = parameters(tensors)
    return MemoryItem.of("vision tower", count, _tower_bits(tensors, dtype, storage) / count)


def _tower_bits(tensors: Iterable[TensorSpec], dtype: str, storage: Storage) -> int:
    """In int8 are only the matrices of its layers, with a scale for each of their outputs."""
    bits = 0
    for tensor in tensors:
        count, small = math.prod(tensor.shape), is_tower_linear(tensor.name, tensor.shape)
        if dtype == FP16 or not small:
            bits += count * storage.dense_bits
        else:
            bits += count * BITS[dtype] + tensor.shape[0] * storage.scale_bits
    return bits


def _cache(llm: LlmConfig, limits: Limits, storage: Storage, dtype: str) -> MemoryItem:
    """In int8 with a scale for each key and each value of a head."""
    per_token = 2 * llm.num_layers * llm.num_kv_heads * llm.head_dim
    count = limits.max_batch_size * limits.max_seq_len * per_token
    bits: float = storage.cache_bits
    if dtype != FP16:
        bits = BITS[dtype] + storage.scale_bits / llm.head_dim
    return MemoryItem.of(f"key/value cache of {limits.max_seq_len} tokens", count, bits)


def _activations(
    config: VilaConfig, limits: Limits, storage: Storage, tensorrt: TensorRt | None = None
) -> MemoryItem:
    """The widest moment: the tower's attention, or one chunk of the prompt in the decoder.

    Backend tensorrt has memory for both at a time; where attention is not one operator, also for
    its scores, twice in float32, and for the cache's new rows.
    """
    vision, llm = config.vision, config.llm
    patches = vision.positions
    tower = patches * (
        vision.num_heads * patches + 4 * vision.hidden_size + vision.intermediate_size
    )
    chunk = min(PREFILL_TOKENS, limits.max_input_len)
    decoder = chunk * (6 * llm.hidden_size + 3 * llm.intermediate_size)
    count = max(tower, decoder) if tensorrt is None else tower + decoder
    if tensorrt is not None and tensorrt.dialect == PRIMITIVE:
        count += 4 * llm.num_heads * chunk * (limits.max_seq_len + chunk)
        count += 2 * llm.num_layers * llm.num_kv_heads * llm.head_dim * chunk
    count += llm.vocab_size
    return MemoryItem.of("activations (estimate)", count, storage.dense_bits)


def _native_activations(
    config: VilaConfig, limits: Limits, precision: str, vision: str
) -> MemoryItem:
    """Buffers of a chunk of the prompt and, for long ones, the widest weight in float16.

    Or what the tower takes, with its widest matrix in float16 if it is kept in int8.
    """
    llm = config.llm
    tokens = min(NATIVE_PREFILL_TOKENS, limits.max_input_len)
    queries, keys = (n * llm.head_dim for n in (llm.num_heads, llm.num_kv_heads))
    # The stream in float32 twice, its norm, q, k, v and attention; gate and up, and what they make.
    count = tokens * (5 * llm.hidden_size + 3 * queries + 2 * keys + 5 * llm.intermediate_size)
    if precision == "int4" and tokens > NATIVE_DENSE_TOKENS:
        count += 2 * llm.intermediate_size * llm.hidden_size
    tower = _activations(config, limits, NATIVE_STORAGE).parameters
    if vision != FP16:
        tower += max(
            math.prod(tensor.shape)
            for tensor in tower_tensor_specs(config)
            if is_tower_linear(tensor.name, tensor.shape)
        )
    return MemoryItem.of("activations (estimate)", max(count, tower), 16)


def _into_host_memory(
    config: VilaConfig, components: tuple[MemoryItem, ...], room_bytes: int, vision: str
) -> tuple[tuple[MemoryItem, ...], dict[str, int]]:
    """Components after what doesn't fit into `room_bytes` was left outside, and bytes of that."""
    layers, others = list[TensorSpec](), list[TensorSpec]()
    for tensor in tower_tensor_specs(config):
        (layers if "encoder.layers." in tensor.name else others).append(tensor)
    rest, inside = (_tower_bits(part, vision, NATIVE_STORAGE) // 8 for part in (others, layers))
    visiting = VISITING_LAYERS * inside // max(1, config.vision_layers_used)
    ways = {"llm embeddings": (EMBEDDINGS, 0), "vision tower": (VISION, rest + visiting)}
    moved: dict[str, int] = {}
    for name, (label, left) in ways.items():
        if sum(part.bytes for part in components) <= room_bytes:
            break
        (part,) = (part for part in components if part.name == name)
        if left < part.bytes:
            moved[label] = part.bytes
            where = "in host memory" if not left else f"{VISITING_LAYERS} layers at a time"
            small = replace(part, name=f"{name}, {where}", bytes=left)
            components = tuple(small if each is part else each for each in components)
    return components, moved
