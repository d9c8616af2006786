"""The algorithms behind `--algorithm`: how one decoder layer after the other is quantized."""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vila_deploy.checkpoint import Checkpoint
from vila_deploy.checkpoint.llm_config import LINEARS, NORMS, layer_prefix
from vila_deploy.formats.base import QuantizedLinear
from vila_deploy.formats.rtn import round_to_nearest, to_float16
from vila_deploy.formats.scheme import QuantScheme
from vila_deploy.model.hidden_states import Sequences
from vila_deploy.model.llm import dense_weight, load_decoder_layer
from vila_deploy.model.streams import Streams
from vila_deploy.quantize.algorithms import awq, awq_gptq
from vila_deploy.quantize.calibrate import Calibration
from vila_deploy.quantize.report import compensated_entry, layer_entry, rtn_entry

LayerEntry = dict[str, Any]
LayerTensors = dict[str, Tensor | QuantizedLinear]
OnStep = Callable[[str], None]


class Method(ABC):
    """Quantizes the layers of a checkpoint, first to last."""

    steps_per_layer: int

    def __init__(self, checkpoint: Checkpoint, scheme: QuantScheme, device: torch.device):
        self.checkpoint, self.scheme, self.device = checkpoint, scheme, device
        self.config = checkpoint.config.llm

    @abstractmethod
    def quantize(self, index: int, on_step: OnStep) -> tuple[LayerTensors, LayerEntry]:
        """The layer's norms and linears by name and what the report says of it.

        Args:
            on_step: to be called `steps_per_layer` times with what is being done.
        """

    @abstractmethod
    def skip(self, index: int, tensors: LayerTensors) -> None:
        """Does to the state of this object what quantizing the layer to `tensors` did."""

    def load(self, index: int) -> nn.Module:
        """The layer with weights that may be changed."""
        # What is left of the layer before must go first.
        gc.collect()
        layer = load_decoder_layer(self.config, self.checkpoint.llm, index)
        # Loading maps float32 weights from the file; folding must not write into it.
        for parameter in layer.parameters():
            parameter.data = parameter.data.to(self.device, copy=True)
        return layer


class Rtn(Method):
    """Rounds to nearest."""

    steps_per_layer = len(LINEARS)

    def quantize(self, index: int, on_step: OnStep) -> tuple[LayerTensors, LayerEntry]:
        llm, where = self.checkpoint.llm, layer_prefix(index)
        tensors = _norm_tensors(where, {n: llm.tensor(f"{where}.{n}.weight") for n in NORMS})
        errors = {}
        for name in LINEARS:
            on_step(f"rounding {name}")
            full = f"{where}.{name}"
            weight = dense_weight(llm, full, torch.float32).to(self.device)
            bias = llm.tensor(f"{full}.bias") if self.config.has_bias(name) else None
            linear = round_to_nearest(weight, self.scheme, full, bias)
            power = float(weight.square().mean())
            lost = float((linear.dequantize() - weight).square().mean())
            errors[name] = lost / power if power else 0.0
            tensors[full] = linear.cpu()
        return tensors, rtn_entry(index, errors)

    def skip(self, index: int, tensors: LayerTensors) -> None:
        pass


class Awq(Method):
    """Searches scales and clips on calibration data, exactly as llm-awq does."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        scheme: QuantScheme,
        calibration: Calibration,
        device: torch.device,
    ):
        super().__init__(checkpoint, scheme, device)
        self._sequences = Sequences.of(self.config, calibration.embeds, device)
        calibration.embeds.clear()
        self.steps_per_layer = awq.steps_per_layer(self.config)

    def quantize(self, index: int, on_step: OnStep) -> tuple[LayerTensors, LayerEntry]:
        where = layer_prefix(index)
        result = awq.quantize_layer(
            self.load(index),
            lambda name: self._original(f"{where}.{name}"),
            self._sequences,
            self.scheme,
            where,
            on_step,
        )
        return _tensors(where, result.norms, result.linears), layer_entry(index, result)

    def _original(self, name: str) -> Tensor:
        return dense_weight(self.checkpoint.llm, name, torch.float32).to(self.device)

    def skip(self, index: int, tensors: LayerTensors) -> None:
        self._sequences.pass_through(self.load(index))


class AwqGptq(Method):
    """Learns scales, rounds with error feedback and makes up for the error of earlier layers."""

    steps_per_layer = awq_gptq.STEPS_PER_LAYER

    def __init__(
        self,
        checkpoint: Checkpoint,
        scheme: QuantScheme,
        calibration: Calibration,
        device: torch.device,
        scratch: Path,
    ):
        super().__init__(checkpoint, scheme, device)
        self._streams = Streams.of(self.config, calibration.embeds, scratch, device)

    def quantize(self, index: int, on_step: OnStep) -> tuple[LayerTensors, LayerEntry]:
        where, layer = layer_prefix(index), self.load(index)
        result = awq_gptq.quantize_layer(layer, self._streams, self.scheme, where, on_step)
        return _tensors(where, result.norms, result.linears), compensated_entry(index, result)

    def skip(self, index: int, tensors: LayerTensors) -> None:
        # One after the other, so that one alone is in memory.
        self._streams.pass_exact(self.load(index))
        finished = load_decoder_layer(self.config, _Finished(tensors), index)
        self._streams.pass_quantized(finished.to(self.device))


class _Finished:
    """A layer's tensors as a source of weights."""

    def __init__(self, tensors: Mapping[str, Tensor | QuantizedLinear]):
        self._tensors = tensors

    def tensor(self, name: str) -> Tensor:
        prefix, _, part = name.rpartition(".")
        found = self._tensors[prefix if part == "bias" else name]
        if not isinstance(found, QuantizedLinear):
            return found
        assert found.bias is not None
        return found.bias

    def linear(self, prefix: str) -> Tensor | QuantizedLinear:
        return self._tensors[prefix]


def _tensors(
    where: str, norms: Mapping[str, Tensor], linears: Mapping[str, QuantizedLinear]
) -> LayerTensors:
    tensors = _norm_tensors(where, norms)
    return tensors | {f"{where}.{name}": linear.cpu() for name, linear in linears.items()}


def _norm_tensors(where: str, norms: Mapping[str, Tensor]) -> LayerTensors:
    names = {f"{where}.{name}.weight": weight for name, weight in norms.items()}
    return {name: to_float16(weight, name).contiguous().cpu() for name, weight in names.items()}
