"""Choose the bits of each linear under a budget: mixed precision by sensitivity."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vila_deploy.formats.base import BITS, QuantScheme


@dataclass(frozen=True)
class BitChoice:
    """What a search has given to each linear.

    Args:
        bits: by full name.
        predicted_kl: by full name, in nats per token: in 4 bits, and in its bits.
        mean_bits: of a quantized value, over all linears.
    """

    bits: Mapping[str, int]
    predicted_kl: Mapping[str, tuple[float, float]]
    mean_bits: float

    def scheme(self, base: QuantScheme) -> QuantScheme:
        """Return `base` with these bits."""
        others = {name: bits for name, bits in self.bits.items() if bits != base.bits}
        return QuantScheme(base.group_size, base.symmetric, base.bits, others)

    def to_json(self) -> dict[str, Any]:
        """Return what report.json and the work folder keep."""
        return {
            "mean_bits": self.mean_bits,
            "predicted_kl": sum(kl for _, kl in self.predicted_kl.values()),
            "predicted_kl_4_bits": sum(kl for kl, _ in self.predicted_kl.values()),
            "linears": {
                name: {
                    "bits": bits,
                    "predicted_kl_4_bits": self.predicted_kl[name][0],
                    "predicted_kl": self.predicted_kl[name][1],
                }
                for name, bits in self.bits.items()
            },
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> BitChoice:
        """Return what `to_json` gave."""
        linears = values["linears"]
        return cls(
            {name: row["bits"] for name, row in linears.items()},
            {n: (row["predicted_kl_4_bits"], row["predicted_kl"]) for n, row in linears.items()},
            values["mean_bits"],
        )


def choose_bits(
    sensitivities: Mapping[str, Mapping[int, float]],
    sizes: Mapping[str, int],
    widths: Sequence[int],
    mean_bits: float,
) -> BitChoice:
    """Return the bits with the least predicted KL whose mean over all weights is in the budget.

    A knapsack, solved by greedy ratio: all begin in 4 bits, and the steps to more bits are taken in
    the order of KL saved for a bit of storage, as long as they fit.

    Args:
        sensitivities: KL by linear and bits.
        sizes: weights of each linear.
        widths: bits that a linear may have, among them 4.
        mean_bits: the budget.
    """
    widths = sorted(widths)
    bits = dict.fromkeys(sizes, BITS)
    room = (mean_bits - BITS) * sum(sizes.values())
    steps = []
    for name, size in sizes.items():
        for low, high in itertools.pairwise(widths):
            saved = sensitivities[name][low] - sensitivities[name][high]
            cost = (high - low) * size
            steps.append((-saved / cost, low, name, high, cost))
    for _, low, name, high, cost in sorted(steps):
        # A step that is left out leaves those above it out too.
        if bits[name] == low and cost <= room + 1e-6:
            bits[name], room = high, room - cost
    predicted = {n: (sensitivities[n][BITS], sensitivities[n][b]) for n, b in bits.items()}
    used = sum(bits[name] * size for name, size in sizes.items()) / sum(sizes.values())
    return BitChoice(bits, predicted, used)
