"""What each component of an engine beside its decoder layers is kept in, and who can do that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace

from vila_deploy.checkpoint.fields import Fields
from vila_deploy.errors import VilaDeployError

FP16, INT8, INT4 = "fp16", "int8", "int4"
# Values of each component; the first is what every backend has.
CHOICES: Mapping[str, tuple[str, ...]] = {
    "vision": (FP16, INT8),
    "lm_head": (FP16, INT8, INT4),
    "kv_cache": (FP16, INT8),
}
# What backends have beside fp16. "primitive" and "standard" aren't told apart: both can.
SUPPORTED: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "onnxruntime": {},
    "native": {},
    "tensorrt": {},
    "tensorrt-llm": {},
}
# Weights of a head in int4 that may share a scale; the largest that fits is taken.
HEAD_GROUP_SIZES = (128, 64, 32, 16)
BITS = {INT8: 8, INT4: 4}
# Why a backend has none of it, where there is more to say than that.
REASONS: Mapping[tuple[str, str], str] = {}


@dataclass(frozen=True)
class Components:
    """Precision of the vision tower's linears, of the output head and of the key/value cache.

    fp16 means unquantized: a CPU widens it to float32 when it loads it.
    """

    vision: str = FP16
    lm_head: str = FP16
    kv_cache: str = FP16

    def to_json(self) -> dict[str, str]:
        return asdict(self)

    @classmethod
    def from_fields(cls, parent: Fields, key: str = "components") -> Components:
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


ALL_FP16 = Components()


def check_components(backend: str, components: Components) -> None:
    """Raises VilaDeployError for the first component that `backend` can't keep like that."""
    for name, value in components.quantized().items():
        if value in SUPPORTED[backend].get(name, ()):
            continue
        option = f"--{_option(name)}"
        able = [other for other, can in SUPPORTED.items() if value in can.get(name, ())]
        has = " or ".join((FP16, *SUPPORTED[backend].get(name, ())))
        reason = REASONS.get((backend, name))
        raise VilaDeployError(
            f"backend {backend} has {option} {has}, not {value}{f': {reason}' if reason else ''}",
            fix=f"use --backend {' or '.join(able)}, or leave {option} out"
            if able
            else f"leave {option} out: no backend of this version has it",
        )


def supported_part(backend: str, components: Components) -> Components:
    """`components` with fp16 where `backend` has nothing else."""
    can = SUPPORTED.get(backend, {})
    unable = {n: FP16 for n, value in components.quantized().items() if value not in can.get(n, ())}
    return replace(components, **unable)


def head_group_size(hidden_size: int, kept_as: str) -> int:
    """Weights of a quantized head that have one scale: a whole row in int8, a group in int4.

    Raises:
        VilaDeployError: `hidden_size` is not a multiple of any size that groups may have.
    """
    if kept_as == INT8:
        return hidden_size
    for group_size in HEAD_GROUP_SIZES:
        if hidden_size % group_size == 0:
            return group_size
    raise VilaDeployError(
        f"the model's hidden size {hidden_size} has no groups of {HEAD_GROUP_SIZES[-1]} or more",
        where="--lm-head int4",
        fix="use --lm-head int8",
    )


def is_tower_linear(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of the vision tower is a matrix of its layers, which int8 is about."""
    return "encoder.layers." in name and len(shape) == 2


def _option(name: str) -> str:
    return name.replace("_", "-")


assert list(CHOICES) == [field.name for field in fields(Components)]
