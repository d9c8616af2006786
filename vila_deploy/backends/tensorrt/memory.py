"""Memory of a TensorRT engine, and of the compiler that makes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from vila_deploy.backends.tensorrt.decoder import PREFILL_TOKENS
from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.llm_config import QKV
from vila_deploy.checkpoint.tensor_schema import projector_tensor_specs, tower_tensor_specs
from vila_deploy.engine.build_request import BuildRequest
from vila_deploy.engine.memory import (
    Items,
    MemoryEstimate,
    MemoryRow,
    Storage,
    activation_item,
    cache_item,
    decoder_activations,
    tower_activations,
    weight_items,
)
from vila_deploy.engine.target import Target
from vila_deploy.formats.module_dtypes import FP16
from vila_deploy.onnx_export.matrix_pieces import (
    CONTIGUOUS_FACTOR,
    MAX_MATRIX_BYTES,
    largest_piece_bytes,
)
from vila_deploy.utils.estimates import (
    MemoryItem,
    PlanStep,
    available_memory_bytes,
    free_swap_bytes,
    total_contiguous_bytes,
)

STORAGE = Storage()
PRIMITIVE = "primitive"
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
# TensorRT's compiler at its peak, in weights of the graph that it compiles: measured with
# tensorrt-rtx 1.7 (1.14 GB for 0.50 GB, 3.6 for 1.51, 10.0 for 4.76, 14.5 for 7.07). What it maps
# of the weights' file comes on top, and leaves again where memory is short. On the device it is
# assumed: by the source of 10.3's parser it copies the weights once, then there are those of the
# builder and of the engine that it returns.
COMPILER_FACTOR, COMPILER_BYTES = {"tensorrt-rtx": 2.0, "tensorrt": 3.2}, 400 << 20
CONTIGUOUS_FIX = "start the kernel with a larger cma= (docs/orin.md)"
# Weights of the largest graph, the LLM's.
LLM_GRAPH = (MemoryRow.DECODER_LINEARS, MemoryRow.HEAD, MemoryRow.NORMS)


def estimate_memory(
    config: VilaConfig, request: BuildRequest, precision: str, limit_bytes: int
) -> MemoryEstimate:
    """Return the memory of the engine on its GPU, and of compiling it here or there."""
    llm, limits, modules = config.llm, request.limits, request.module_precision
    items: Items = {
        **weight_items(config, precision, STORAGE, modules),
        MemoryRow.KV_CACHE: cache_item(llm, limits, STORAGE, modules.kv_cache),
        MemoryRow.ACTIVATIONS: _activations(config, request),
    }
    compile_step = _compile_step(request.target, items, limit_bytes)
    block = contiguous_block(config, precision, request)
    return MemoryEstimate(items, build_steps=(compile_step, *([block] if block else [])))


def max_matrix_bytes(target: Target) -> int | None:
    """Return how large a matrix may be in the graphs for `target`; None means of any size."""
    limited = target.tensorrt is not None and target.tensorrt.contiguous_bytes is not None
    return MAX_MATRIX_BYTES if limited else None


def contiguous_block(config: VilaConfig, precision: str, request: BuildRequest) -> PlanStep | None:
    """Return the largest block in one piece that compiling asks for, by the graphs' matrices.

    None where the target has no limit. Source of the factor: onnx_export.matrix_pieces.
    """
    sizes = dict(_matrix_bytes(config, precision, request))
    return contiguous_step(sizes, request.target, smaller_head=True)


def contiguous_step(
    sizes: Mapping[str, int], target: Target, *, smaller_head: bool = False
) -> PlanStep | None:
    """Return the largest block in one piece for matrices of `sizes` bytes; None without a limit.

    Args:
        smaller_head: the backend could have the output head in fewer bits.
    """
    given = None if target.tensorrt is None else target.tensorrt.contiguous_bytes
    if given is None:
        return None
    matrix = max(sizes, key=lambda name: sizes[name])
    needed = int(CONTIGUOUS_FACTOR * sizes[matrix])
    name = f"of that in one piece, for {matrix}; the board gives {given / 1e9:.2f} GB"
    if needed > given:
        smaller = smaller_head and matrix == MemoryRow.HEAD.value
        name = f"{name}: {CONTIGUOUS_FIX}{' or take --lm-head int8' if smaller else ''}"
    return PlanStep(name, needed)


def _matrix_bytes(
    config: VilaConfig, precision: str, request: BuildRequest
) -> Iterator[tuple[str, int]]:
    """Yield the bytes of the largest piece of each module's matrices, as its graph has them."""
    llm, largest = config.llm, max_matrix_bytes(request.target)
    head = largest_piece_bytes(llm.vocab_size, 2 * llm.hidden_size, largest)
    quantized_head = request.module_precision.lm_head != FP16
    yield MemoryRow.HEAD.value, head // 4 if quantized_head else head
    merged: dict[tuple[str, int], int] = {}
    for name, (outputs, inputs) in llm.linears.items():
        # q, k and v are one matrix, gate and up another.
        shared = "gate_up" if name in GATE_UP else "qkv" if name in QKV else name
        merged[shared, inputs] = merged.get((shared, inputs), 0) + outputs
    bytes_per_weight = 2 if precision == FP16 else 0.5
    yield (
        MemoryRow.DECODER_LINEARS.value,
        max(
            largest_piece_bytes(outputs, bytes_per_weight * inputs, largest)
            for (_, inputs), outputs in merged.items()
        ),
    )
    for row, specs in (
        (MemoryRow.VISION, tower_tensor_specs(config)),
        (MemoryRow.PROJECTOR, projector_tensor_specs(config)),
    ):
        matrices = [spec.shape for spec in specs if len(spec.shape) == 2]
        yield (
            row.value,
            max(largest_piece_bytes(shape[0], 2 * shape[1], largest) for shape in matrices),
        )


def compiler_memory_bytes(package: str, weight_bytes: int) -> int:
    """Return what the compiler of `package` needs for a graph of so many bytes; an estimate."""
    return COMPILER_BYTES + int(COMPILER_FACTOR[package] * weight_bytes)


def compile_warnings(title: str, weight_bytes: int, block_bytes: int | None) -> Iterator[str]:
    """Yield what compiling on this board may lack.

    Args:
        weight_bytes: of the largest graph.
        block_bytes: memory in one piece that its matrices ask for; None: no limit is known.
    """
    given = total_contiguous_bytes()
    if block_bytes is not None and given is not None and block_bytes > given:
        yield (
            f"compiling asks for {block_bytes / 1e6:.0f} MB of memory in one piece, the kernel "
            f"of this {title} keeps {given / 1e6:.0f} MB: {CONTIGUOUS_FIX}"
        )
    needed, free = compiler_memory_bytes("tensorrt", weight_bytes), available_memory_bytes()
    if needed > free + free_swap_bytes():
        yield (
            f"compiling is assumed to take {needed / 1e9:.1f} GB of memory, "
            f"{free / 1e9:.1f} GB are available: close other programs and add swap (docs/orin.md)"
        )


def _activations(config: VilaConfig, request: BuildRequest) -> MemoryItem:
    """Those of tower and decoder, which TensorRT has memory for at the same time.

    Where attention is not one operator, its scores too, twice in float32, and the cache's new rows.
    """
    llm, limits, tensorrt = config.llm, request.limits, request.target.tensorrt
    chunk = min(PREFILL_TOKENS, limits.max_input_len)
    count = tower_activations(config) + decoder_activations(llm, chunk)
    if tensorrt is not None and tensorrt.dialect == PRIMITIVE:
        count += 4 * llm.num_heads * chunk * (limits.max_seq_len + chunk)
        count += 2 * llm.num_layers * llm.num_kv_heads * llm.head_dim * chunk
    return activation_item(count + llm.vocab_size, STORAGE)


def _compile_step(target: Target, items: Items, limit_bytes: int) -> PlanStep:
    package = target.tensorrt.package if target.tensorrt else "tensorrt"
    needed = compiler_memory_bytes(package, sum(items[row].bytes for row in LLM_GRAPH))
    if package == "tensorrt-rtx":
        here = "this computer" if needed <= available_memory_bytes() else "one with more memory"
        return PlanStep(f"compile on {here}", needed)
    swap = "" if needed <= limit_bytes else f", {(needed - limit_bytes) / 1e9:.0f} GB of it swap"
    return PlanStep(f"compile on {target.title} (assumed{swap})", needed)
