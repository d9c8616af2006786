"""Round to nearest (RTN): each decoder layer by itself, without calibration data."""

from __future__ import annotations

import torch

from vila_deploy.checkpoint.llm_config import LINEARS, NORMS, layer_prefix
from vila_deploy.formats.rtn import round_to_nearest
from vila_deploy.model.llm import dense_weight
from vila_deploy.quantize.algorithms.base import (
    LayerEntry,
    LayerQuantizer,
    LayerTensors,
    OnStep,
    stored_tensors,
)


class Rtn(LayerQuantizer):
    """Rounds each weight to the nearest quantized value."""

    steps_per_layer = len(LINEARS)

    def quantize(self, index: int, on_step: OnStep) -> tuple[LayerTensors, LayerEntry]:
        llm, prefix = self.checkpoint.llm, layer_prefix(index)
        tensors = stored_tensors(
            prefix, {name: llm.tensor(f"{prefix}.{name}.weight") for name in NORMS}, {}
        )
        errors = {}
        for name in LINEARS:
            on_step(f"rounding {name}")
            full_name = f"{prefix}.{name}"
            weight = dense_weight(llm, full_name, torch.float32).to(self.device)
            bias = llm.tensor(f"{full_name}.bias") if self.config.has_bias(name) else None
            linear = round_to_nearest(weight, self.scheme.of(full_name), full_name, bias)
            mean_square = float(weight.square().mean())
            error = float((linear.dequantize() - weight).square().mean())
            errors[name] = error / mean_square if mean_square else 0.0
            tensors[full_name] = linear.cpu()
        linears = {name: {"weight_error": error} for name, error in errors.items()}
        return tensors, {"layer": index, "linears": linears}

    def skip(self, index: int, tensors: LayerTensors) -> None:
        """Do nothing: no layer depends on another."""
