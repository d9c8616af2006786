"""Precision of the vision tower, the output head and the KV cache: by backend, and in MB."""

from __future__ import annotations

from benchmarks.page_tables.sources import markdown
from vila_deploy.backends.registry import get_backend
from vila_deploy.builder.memory_plan import plan_engine
from vila_deploy.checkpoint.presets import preset
from vila_deploy.engine.build_request import BuildRequest, resolve_limits
from vila_deploy.engine.memory import MemoryRow
from vila_deploy.engine.precision import CHOICES, ModulePrecision
from vila_deploy.engine.target import get_target

# A target and backend for each row of the table.
BACKENDS = {
    "onnxruntime (`cpu`)": ("cpu", "onnxruntime"),
    "tensorrt with tensorrt-rtx (`rtx4090`, `a100`)": ("rtx4090", "tensorrt"),
    "tensorrt on the device (`orin…`, `h100`, `h200`)": ("orin", "tensorrt"),
    "native": ("h200", "native"),
    "tensorrt-llm": ("a100", "tensorrt-llm"),
    "llamacpp": ("vulkan", "llamacpp"),
}
MODELS = ("VILA1.5-3b", "Llama-3-VILA1.5-8B", "VILA1.5-40b")
SIZES = {
    MemoryRow.HEAD: (
        ModulePrecision(),
        ModulePrecision(lm_head="int8"),
        ModulePrecision(lm_head="int4"),
    ),
    MemoryRow.VISION: (ModulePrecision(), ModulePrecision(vision="int8")),
}


def module_support() -> str:
    """Return which data types each backend has for tower, head and cache."""
    rows = []
    for title, (target, backend) in BACKENDS.items():
        cells = [
            ", ".join(
                value
                for value in values
                if get_backend(backend).supports(get_target(target), name, value)
            )
            for name, values in CHOICES.items()
        ]
        rows.append([title, *cells])
    options = (f"`--{name.replace('_', '-')}`" for name in CHOICES)
    return markdown(["backend", *options], rows)


def module_sizes() -> str:
    """Return the MB of output head and vision tower in each data type, as --plan computes them."""
    rows = []
    for model in MODELS:
        sizes = [
            f"{_size_bytes(model, row, precision) / 1e6:,.0f} MB"
            for row, precisions in SIZES.items()
            for precision in precisions
        ]
        rows.append([model, *sizes])
    return markdown(["", "head fp16", "int8", "int4", "tower fp16", "int8"], rows)


def _size_bytes(model: str, row: MemoryRow, precision: ModulePrecision) -> int:
    config = preset(model, "int4")
    limits = resolve_limits(config)
    request = BuildRequest(get_target("a100"), limits, module_precision=precision)
    return plan_engine(config, get_backend("tensorrt"), "int4", request).items[row].bytes
