"""Precision of the vision tower, the output head and the KV cache: by backend, and in MB."""

from __future__ import annotations

from benchmarks.page_tables.sources import markdown
from vila_deploy.builder.build import default_limits
from vila_deploy.builder.memory_plan import plan_engine
from vila_deploy.checkpoint.presets import preset
from vila_deploy.engine.precision import CHOICES, ModulePrecision, check_precision
from vila_deploy.engine.target import get_target
from vila_deploy.utils.errors import VilaDeployError

# A target and backend for each row of the table.
BACKENDS = {
    "onnxruntime (`cpu`)": ("cpu", "onnxruntime"),
    "tensorrt with tensorrt-rtx (`a100`, `rtx4090`)": ("rtx4090", "tensorrt"),
    "tensorrt on the device (`orin…`, `h100`, `h200`)": ("orin", "tensorrt"),
    "native": ("h200", "native"),
    "tensorrt-llm": ("a100", "tensorrt-llm"),
}
MODELS = ("VILA1.5-3b", "Llama-3-VILA1.5-8B", "VILA1.5-40b")
SIZES = {
    "llm head": (
        ModulePrecision(),
        ModulePrecision(lm_head="int8"),
        ModulePrecision(lm_head="int4"),
    ),
    "vision tower": (ModulePrecision(), ModulePrecision(vision="int8")),
}


def module_support() -> str:
    """Return which data types each backend has for tower, head and cache."""
    rows = []
    for title, (target, backend) in BACKENDS.items():
        cells = [
            ", ".join(value for value in values if _supports(target, backend, name, value))
            for name, values in CHOICES.items()
        ]
        rows.append([title, *cells])
    options = (f"`--{name.replace('_', '-')}`" for name in CHOICES)
    return markdown(["backend", *options], rows)


def _supports(target: str, backend: str, name: str, value: str) -> bool:
    try:
        check_precision(get_target(target), backend, ModulePrecision(**{name: value}))
    except VilaDeployError:
        return False
    return True


def module_sizes() -> str:
    """Return the MB of output head and vision tower in each data type, as --plan computes them."""
    rows = []
    for model in MODELS:
        sizes = [
            f"{_size_bytes(model, item, precision) / 1e6:,.0f} MB"
            for item, precisions in SIZES.items()
            for precision in precisions
        ]
        rows.append([model, *sizes])
    return markdown(["", "head fp16", "int8", "int4", "tower fp16", "int8"], rows)


def _size_bytes(model: str, item: str, precision: ModulePrecision) -> int:
    config = preset(model, "int4")
    limits = default_limits(config)
    plan = plan_engine(config, get_target("a100"), "tensorrt", "int4", limits, precision)
    return sum(row.bytes for row in plan.components if row.name == item)
