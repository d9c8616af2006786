"""Choose the bits of each linear under a budget: mixed precision by sensitivity."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vila_deploy.formats.base import BITS, HEAD_LINEAR, SYMMETRIC_BITS, QuantScheme

FLOAT16_BITS = 16
# What the output head and a vision tower's linears may have.
MODULE_WIDTHS = (SYMMETRIC_BITS, FLOAT16_BITS)


@dataclass(frozen=True)
class BitChoice:
    """What a search has given to each linear.

    Args:
        bits: of the linears of the LLM's layers, by full name.
        predicted_kl: by full name, in nats per token: in the fewest bits that the linear may have,
            and in its bits.
        mean_bits: of a quantized value, over all linears of the layers.
        module_bits: of the output head and the vision tower's linears in the search.
        float16: head and tower where they are not in the search, and why.
    """

    bits: Mapping[str, int]
    predicted_kl: Mapping[str, tuple[float, float]]
    mean_bits: float
    module_bits: Mapping[str, int] = field(default_factory=dict)
    float16: Mapping[str, str] = field(default_factory=dict)

    def scheme(self, base: QuantScheme) -> QuantScheme:
        """Return `base` with these bits of the LLM's linears, the head among them."""
        others = {name: bits for name, bits in self.bits.items() if bits != base.bits}
        if self.module_bits.get(HEAD_LINEAR) == SYMMETRIC_BITS:
            others[HEAD_LINEAR] = SYMMETRIC_BITS
        return QuantScheme(base.group_size, base.symmetric, base.bits, others)

    @property
    def tower_linears(self) -> tuple[str, ...]:
        """The vision tower's linears in the search."""
        return tuple(name for name in self.module_bits if name != HEAD_LINEAR)

    @property
    def int8_tower_linears(self) -> tuple[str, ...]:
        """Those of them that are stored in int8."""
        names = self.tower_linears
        return tuple(name for name in names if self.module_bits[name] == SYMMETRIC_BITS)

    def to_json(self) -> dict[str, Any]:
        """Return what report.json and the work folder keep."""
        layers = [self.predicted_kl[name] for name in self.bits]
        return {
            "mean_bits": self.mean_bits,
            "predicted_kl": math.fsum(kl for _, kl in layers),
            "predicted_kl_4_bits": math.fsum(kl for kl, _ in layers),
            "predicted_kl_head_and_tower": math.fsum(
                self.predicted_kl[name][1] for name in self.module_bits
            ),
            "linears": {name: self._row(name, bits, BITS) for name, bits in self.bits.items()},
            "head_and_tower": {
                name: self._row(name, bits, SYMMETRIC_BITS)
                for name, bits in self.module_bits.items()
            },
            "float16": dict(self.float16),
        }

    def _row(self, name: str, bits: int, fewest: int) -> dict[str, Any]:
        first, given = self.predicted_kl[name]
        return {"bits": bits, f"predicted_kl_{fewest}_bits": first, "predicted_kl": given}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> BitChoice:
        """Return what `to_json` gave."""
        kl = {}
        for key, fewest in (("linears", BITS), ("head_and_tower", SYMMETRIC_BITS)):
            for name, row in values[key].items():
                kl[name] = (row[f"predicted_kl_{fewest}_bits"], row["predicted_kl"])
        bits, module_bits = (
            {name: row["bits"] for name, row in values[key].items()}
            for key in ("linears", "head_and_tower")
        )
        return cls(bits, kl, values["mean_bits"], module_bits, values["float16"])


def choose_bits(
    sensitivities: Mapping[str, Mapping[int, float]],
    sizes: Mapping[str, int],
    mean_bits: float,
    module_sensitivities: Mapping[str, Mapping[int, float]] | None = None,
    float16: Mapping[str, str] | None = None,
) -> BitChoice:
    """Return the bits with the least predicted KL within the budget.

    A knapsack, solved by greedy ratio: all linears begin in their fewest bits, and the steps to
    more are taken in the order of KL saved for a bit of storage, as long as they fit. The budget is
    `mean_bits` for each weight of the layers' linears; head and tower pay from it for what they get
    beyond their fewest bits.

    Args:
        sensitivities: KL by linear of the layers, and by the bits that it may have.
        sizes: weights of every linear.
        module_sensitivities: the same of the head and the tower's linears.
        float16: kept in the result.
    """
    modules = module_sensitivities or {}
    every = {**sensitivities, **modules}
    bits = {name: min(kl) for name, kl in every.items()}
    room = sum((mean_bits - bits[name]) * sizes[name] for name in sensitivities)
    steps = []
    for name, kl in every.items():
        for low, high in itertools.pairwise(sorted(kl)):
            cost = (high - low) * sizes[name]
            steps.append(((kl[high] - kl[low]) / cost, low, name, high, cost))
    for _, low, name, high, cost in sorted(steps):
        # A step that is left out leaves those above it out too.
        if bits[name] == low and cost <= room + 1e-6:
            bits[name], room = high, room - cost
    predicted = {name: (kl[min(kl)], kl[bits[name]]) for name, kl in every.items()}
    total = sum(sizes[name] for name in sensitivities)
    used = sum(bits[name] * sizes[name] for name in sensitivities) / total
    given = [{name: bits[name] for name in part} for part in (sensitivities, modules)]
    return BitChoice(given[0], predicted, used, given[1], float16 or {})
