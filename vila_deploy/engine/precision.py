"""What each component of an engine beside its decoder layers is kept in, and who can do that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace

from vila_deploy.checkpoint.fields import Fields
from vila_deploy.engine.target import Target
from vila_deploy.formats.module_dtypes import FP16, INT4, INT8
from vila_deploy.utils.errors import VilaDeployError

# Values of each component; the first is what every backend has.
CHOICES: Mapping[str, tuple[str, ...]] = {
    "vision": (FP16, INT8),
    "lm_head": (FP16, INT8, INT4),
    "kv_cache": (FP16, INT8),
}
RTX = "tensorrt-rtx"
# What backends have beside fp16; backend tensorrt in its two forms.
SUPPORTED: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "onnxruntime": {"lm_head": (INT8, INT4)},
    "native": {"vision": (INT8,), "lm_head": (INT8, INT4), "kv_cache": (INT8,)},
    RTX: {"vision": (INT8,), "lm_head": (INT8, INT4)},
    "tensorrt": {"lm_head": (INT8, INT4)},
    "tensorrt-llm": {},
}
BITS = {INT8: 8, INT4: 4}
# Why a backend has none of it, where there is more to say than that.
REASONS: Mapping[tuple[str, str], str] = {
    ("tensorrt", "vision"): "it keeps weights in int8 only where activations are int8 too, and "
    "those would have to be calibrated",
    (RTX, "kv_cache"): "its operator that updates a cache in place takes floats only",
    ("tensorrt", "kv_cache"): "it would widen the whole cache in every step",
}


@dataclass(frozen=True)
class ModulePrecision:
    """Precision of the vision tower's linears, of the output head and of the key/value cache.

    fp16 means unquantized: a CPU widens it to float32 when it loads it.
    """

    vision: str = FP16
    lm_head: str = FP16
    kv_cache: str = FP16

    def to_json(self) -> dict[str, str]:
        return asdict(self)

    @classmethod
    def from_fields(cls, parent: Fields, key: str = "components") -> ModulePrecision:
        """Reads what `to_json` wrote; all fp16 where nothing is written, as in older files."""
        if key not in parent:
            return cls()
        found = parent.child(key)
        return cls(**{name: found.choice(name, values) for name, values in CHOICES.items()})

    def quantized(self) -> dict[str, str]:
        """Those that are not fp16, by name."""
        return {name: value for name, value in self.to_json().items() if value != FP16}

    def summary(self) -> str:
        """Those that are not fp16, e.g. "lm-head int4"; empty if there are none."""
        return ", ".join(f"{_option(name)} {value}" for name, value in self.quantized().items())


ALL_FP16 = ModulePrecision()


def check_precision(target: Target, backend: str, module_precision: ModulePrecision) -> None:
    """Raises VilaDeployError for the first component that `backend` can't keep like that."""
    row = _row(target, backend)
    for name, value in module_precision.quantized().items():
        if supports(row, name, value):
            continue
        can = SUPPORTED[row].get(name, ())
        option = f"--{_option(name)}"
        able = [each for each in target.backends if supports(_row(target, each), name, value)]
        reason = REASONS.get((row, name))
        raise VilaDeployError(
            f"backend {row} has {option} {' or '.join((FP16, *can))}, not {value}"
            f"{f': {reason}' if reason else ''}",
            fix=f"use --backend {' or '.join(able)}, or leave {option} out"
            if able
            else f"leave {option} out: no backend of target {target.name} has it",
        )


def supports(row: str, name: str, value: str) -> bool:
    """Whether what `row` of SUPPORTED stands for keeps component `name` as `value`."""
    return value in (FP16, *SUPPORTED.get(row, {}).get(name, ()))


def supported_part(
    target: Target, backend: str, module_precision: ModulePrecision
) -> ModulePrecision:
    """`module_precision` with fp16 where `backend` has nothing else."""
    row, asked = _row(target, backend), module_precision.quantized()
    unable = {name: FP16 for name, value in asked.items() if not supports(row, name, value)}
    return replace(module_precision, **unable)


def _row(target: Target, backend: str) -> str:
    """What of SUPPORTED applies to a backend on a target."""
    is_rtx = target.tensorrt is not None and target.tensorrt.package == RTX
    return RTX if backend == "tensorrt" and is_rtx else backend


def _option(name: str) -> str:
    return name.replace("_", "-")


assert list(CHOICES) == [field.name for field in fields(ModulePrecision)]
