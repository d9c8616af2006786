"""Dtypes of an engine's modules beside its decoder layers: vision tower, head, cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from vila_deploy.formats.module_dtypes import FP16, INT4, INT8
from vila_deploy.utils.fields import Fields

# Dtypes of the LLM's decoder linears.
LLM_PRECISIONS = (INT4, FP16)
# Dtypes of each module; the first is what every backend has.
CHOICES: Mapping[str, tuple[str, ...]] = {
    "vision": (FP16, INT8),
    "lm_head": (FP16, INT8, INT4),
    "kv_cache": (FP16, INT8),
}
BITS = {INT8: 8, INT4: 4}


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
        """Read what `to_json` wrote; all fp16 where nothing is written, as in older files."""
        if key not in parent:
            return cls()
        found = parent.child(key)
        return cls(**{name: found.choice(name, values) for name, values in CHOICES.items()})

    def quantized(self) -> dict[str, str]:
        """Return those that are not fp16, by name."""
        return {name: value for name, value in self.to_json().items() if value != FP16}

    def summary(self) -> str:
        """Return those that are not fp16, e.g. "lm-head int4"; empty if there are none."""
        return ", ".join(f"{option_of(name)} {value}" for name, value in self.quantized().items())


def option_of(module: str) -> str:
    """Return the command's option, without its dashes, for a field of ModulePrecision."""
    return module.replace("_", "-")


ALL_FP16 = ModulePrecision()
# A build's own choice, which `resolve_build` replaces.
AUTO = "auto"
# Modules for which it may be given.
AUTO_MODULES = ("vision", "lm_head")
DEFAULT_MODULES = ModulePrecision(**dict.fromkeys(AUTO_MODULES, AUTO))


def accepted_dtypes(module: str) -> tuple[str, ...]:
    """Return what the command takes for a field of ModulePrecision."""
    return ((AUTO,) if module in AUTO_MODULES else ()) + CHOICES[module]


@dataclass(frozen=True)
class DefaultChoice:
    """What a backend takes where the user leaves the choice to it, and why."""

    value: str
    reason: str = ""


assert list(CHOICES) == [field.name for field in fields(ModulePrecision)]
