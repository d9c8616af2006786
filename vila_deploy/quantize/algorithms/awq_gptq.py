"""The default algorithm: learned scales folded as AWQ does, GPTQ, and error correction.

Unlike llm-awq's, the inputs of each linear are those behind everything quantized so far, and o_proj
and down_proj are first moved towards the weights that bring the hidden states back to the fp ones
(Zhang et al. 2025, Qronos; Li et al. 2025, GPTAQ: asymmetric calibration).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from vila_deploy.checkpoint import Checkpoint
from vila_deploy.checkpoint.llm_config import LINEARS, NORMS, layer_prefix
from vila_deploy.eval.metrics import relative_errors
from vila_deploy.formats.base import QuantizedLinear, QuantScheme
from vila_deploy.formats.rtn import fake_quantize
from vila_deploy.model.layerwise import (
    PackedHiddenStates,
    after_attention,
    after_mlp,
    down_proj_inputs,
)
from vila_deploy.model.llm import load_decoder_layer
from vila_deploy.quantize.algorithms.awq_scales import (
    ATTENTION_GROUP,
    DOWN_GROUP,
    MLP_GROUP,
    OUT_GROUP,
    ScaleChoice,
    ScaleGroup,
    bias_of,
    fold_scales,
    weight_of,
)
from vila_deploy.quantize.algorithms.base import (
    LayerEntry,
    LayerQuantizer,
    LayerTensors,
    OnStep,
    stored_tensors,
)
from vila_deploy.quantize.algorithms.gptq import gptq_quantize
from vila_deploy.quantize.algorithms.hessian import HessianAccumulator, HessianFactor
from vila_deploy.quantize.algorithms.learned_scales import learn_scales
from vila_deploy.quantize.algorithms.output_hessian import OutputFactor, output_factors
from vila_deploy.quantize.calibrate import Calibration
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.limits import CHUNK_TOKENS

# Every so-manyth token is enough to learn scales from.
SCALE_TOKEN_STRIDE = 4
# The share of the earlier layers' error that o_proj and down_proj correct.
ERROR_CORRECTION = 0.5
# Rows of each linear that the reported errors are measured on.
ERROR_ROWS = 512
STEPS_PER_LAYER = 5


@dataclass(frozen=True)
class QuantizedLayer:
    """A quantized decoder layer; linears and norms by their name inside the layer.

    Args:
        norms: float32 weights, scales folded in, exact in float16.
        errors: for each linear: mean square error of its output over its mean square, by round to
            nearest and as stored; both on the inputs behind the quantized layers before, and
            against the weights after error correction; of q_proj and k_proj as far as it changes
            attention's output.
        relative_error: of the hidden states behind the layer, per token: square of the difference
            between quantized and fp over the square of fp; mean over the tokens.
    """

    linears: dict[str, QuantizedLinear]
    norms: dict[str, Tensor]
    errors: dict[str, tuple[float, float]]
    relative_error: float

    def report_entry(self, index: int) -> LayerEntry:
        """Return the layer's entry in report.json."""
        linears = {
            name: {"output_error_before": rtn, "output_error_after": stored}
            for name, (rtn, stored) in self.errors.items()
        }
        return {"layer": index, "drift": self.relative_error, "linears": linears}


class AwqGptq(LayerQuantizer):
    """Learns scales, rounds by GPTQ and corrects the error of earlier layers."""

    steps_per_layer = STEPS_PER_LAYER

    def __init__(
        self,
        checkpoint: Checkpoint,
        scheme: QuantScheme,
        calibration: Calibration,
        device: torch.device,
        scratch: Path,
    ):
        super().__init__(checkpoint, scheme, device)
        self._fp = PackedHiddenStates.on_host(
            self.config, calibration.embeds, scratch, device, CHUNK_TOKENS
        )
        self._quantized = self._fp.copy()

    def quantize(self, index: int, on_step: OnStep) -> tuple[LayerTensors, LayerEntry]:
        prefix = layer_prefix(index)
        layer = self.load(index)
        result = quantize_layer(layer, self._fp, self._quantized, self.scheme, prefix, on_step)
        return stored_tensors(prefix, result.norms, result.linears), result.report_entry(index)

    def skip(self, index: int, tensors: LayerTensors) -> None:
        # One layer after the other, so that only one is in memory.
        _advance(self._fp, self.load(index))
        finished = load_decoder_layer(self.config, _FinishedLayer(tensors), index)
        _advance(self._quantized, finished.to(self.device))


@torch.inference_mode()
def quantize_layer(
    layer: nn.Module,
    fp: PackedHiddenStates,
    quantized: PackedHiddenStates,
    scheme: QuantScheme,
    where: str,
    on_step: OnStep = lambda text: None,
) -> QuantizedLayer:
    """Quantize `layer`, whose weights are changed, and advance `fp` and `quantized`.

    Args:
        layer: decoder layer, float32.
        fp: hidden states behind the layers before, as the checkpoint has them.
        quantized: hidden states behind the same layers quantized.
        where: name of the layer, for messages.
        on_step: called STEPS_PER_LAYER times with the name of the step that begins.

    Raises:
        VilaDeployError: the layer's outputs are not finite, or a weight is too large for float16.
    """
    linears = _LinearQuantizer(layer, scheme, where)

    on_step("outputs before")
    fp_between, scales = _advance_fp(fp, layer, scheme, where)
    # Into the rows of v_proj and up_proj, before anything is rounded, so exactly.
    for group, group_scales in scales.items():
        _fold_output_scales(layer, group, group_scales)

    on_step("attention")
    linears.outputs.update(output_factors(layer, quantized))
    _quantize_behind_norm(ATTENTION_GROUP, layer, quantized, scheme, linears)

    on_step("attention output")
    inputs, factor = _capture_out(quantized, layer, fp_between)
    linears.quantize("self_attn.o_proj", factor, error_correction=True)
    del fp_between, factor
    _advance_quantized(quantized, layer, inputs, after_attention)
    del inputs

    on_step("feed-forward")
    _quantize_behind_norm(MLP_GROUP, layer, quantized, scheme, linears)

    on_step("feed-forward output")
    inputs, factor = _capture_down(quantized, layer, fp)
    linears.quantize("mlp.down_proj", factor, error_correction=True)
    del factor
    _advance_quantized(quantized, layer, inputs, after_mlp)

    return QuantizedLayer(
        linears={name: linears.results[name] for name in LINEARS},
        norms={name: weight_of(layer, name) for name in NORMS},
        errors={name: linears.errors[name] for name in LINEARS},
        relative_error=_mean_relative_error(fp, quantized),
    )


def _advance_fp(
    fp: PackedHiddenStates, layer: nn.Module, scheme: QuantScheme, where: str
) -> tuple[Tensor, dict[ScaleGroup, Tensor]]:
    """Advance `fp` through the unchanged layer, and learn the scales that fold into linears.

    Returns:
        the hidden states between attention and feed-forward block; scales [in] by group.
    """
    between = fp.matrix(fp.hidden.shape[1])
    out_hessian = _hessian(weight_of(layer, OUT_GROUP.linears[0]), fp)
    down_hessian = _hessian(weight_of(layer, DOWN_GROUP.linears[0]), fp)
    for chunk in fp.chunks:
        hidden = fp.load(chunk)
        heads = fp.o_proj_inputs(layer, hidden, chunk)
        out_hessian.add(heads[::SCALE_TOKEN_STRIDE])
        hidden = after_attention(layer, hidden, heads)
        between[chunk.tokens] = hidden
        inner = down_proj_inputs(layer, hidden)
        down_hessian.add(inner[::SCALE_TOKEN_STRIDE])
        fp.hidden[chunk.tokens] = after_mlp(layer, hidden, inner)
    if not bool(torch.isfinite(fp.hidden).all()):
        raise VilaDeployError(
            "its outputs on the calibration data are not finite",
            where=where,
            fix="check that this checkpoint is not damaged",
        )
    scales = {}
    for group, hessian in ((OUT_GROUP, out_hessian), (DOWN_GROUP, down_hessian)):
        weight = weight_of(layer, group.linears[0])
        scales[group] = learn_scales(weight, hessian.factor(), scheme, _source_rows(layer, group))
    return between, scales


def _fold_output_scales(layer: nn.Module, group: ScaleGroup, scales: Tensor) -> None:
    """Divide the rows of the linear before by `scales` [in], and multiply the group's columns."""
    previous = weight_of(layer, group.previous)
    # Heads that share a value head share its scales.
    row_scales = torch.empty_like(previous[:, 0])
    row_scales.index_copy_(0, _source_rows(layer, group), scales)
    previous.div_(row_scales[:, None])
    bias = bias_of(layer, group.previous)
    if bias is not None:
        bias.div_(row_scales)
    weight_of(layer, group.linears[0]).mul_(scales)


def _source_rows(layer: nn.Module, group: ScaleGroup) -> Tensor:
    """Return the output row of the linear before that each input channel [in] comes from."""
    weight = weight_of(layer, group.linears[0])
    channels, rows = weight.shape[1], len(weight_of(layer, group.previous))
    all_channels = torch.arange(channels, device=weight.device)
    if rows == channels:
        return all_channels
    head_dim = layer.get_submodule("self_attn").head_dim
    assert isinstance(head_dim, int)
    heads, within = all_channels // head_dim, all_channels % head_dim
    return heads // (channels // rows) * head_dim + within


def _quantize_behind_norm(
    group: ScaleGroup,
    layer: nn.Module,
    quantized: PackedHiddenStates,
    scheme: QuantScheme,
    linears: _LinearQuantizer,
) -> None:
    """Capture the Hessian behind a norm, fold learned scales into it, quantize its linears."""
    norm = layer.get_submodule(group.previous)
    weights = [weight_of(layer, name) for name in group.linears]
    hessian = _hessian(weights[0], quantized)
    for chunk in quantized.chunks:
        hessian.add(norm(quantized.load(chunk)))
    factor = hessian.factor()
    row_bits = linears.row_bits(group.linears)
    scales = learn_scales(torch.cat(weights), factor, scheme, row_bits=row_bits)
    factor.rescale(fold_scales(layer, ScaleChoice(group, 0.0, scales, ())))
    for name in group.linears:
        linears.quantize(name, factor)


def _capture_out(
    quantized: PackedHiddenStates, layer: nn.Module, fp_between: Tensor
) -> tuple[Tensor, HessianFactor]:
    """Return the inputs of o_proj and their Hessian; targets are fp's states after attention."""
    weight = weight_of(layer, OUT_GROUP.linears[0])
    inputs = quantized.matrix(weight.shape[1])
    hessian = _hessian(weight, quantized, has_targets=True)
    for chunk in quantized.chunks:
        hidden = quantized.load(chunk)
        heads = quantized.o_proj_inputs(layer, hidden, chunk)
        hessian.add(heads, quantized.load(chunk, fp_between) - hidden)
        inputs[chunk.tokens] = heads
    return inputs, hessian.factor()


def _capture_down(
    quantized: PackedHiddenStates, layer: nn.Module, fp: PackedHiddenStates
) -> tuple[Tensor, HessianFactor]:
    """Return the inputs of down_proj and their Hessian; targets are fp's states after it."""
    weight = weight_of(layer, DOWN_GROUP.linears[0])
    inputs = quantized.matrix(weight.shape[1])
    hessian = _hessian(weight, quantized, has_targets=True)
    for chunk in quantized.chunks:
        hidden = quantized.load(chunk)
        inner = down_proj_inputs(layer, hidden)
        hessian.add(inner, fp.load(chunk) - hidden)
        inputs[chunk.tokens] = inner
    return inputs, hessian.factor()


def _advance_quantized(
    quantized: PackedHiddenStates,
    layer: nn.Module,
    inputs: Tensor,
    after: Callable[[nn.Module, Tensor, Tensor], Tensor],
) -> None:
    """Advance behind the linear that has just been quantized, whose `inputs` were captured."""
    for chunk in quantized.chunks:
        hidden = quantized.load(chunk)
        quantized.hidden[chunk.tokens] = after(layer, hidden, quantized.load(chunk, inputs))


def _hessian(
    weight: Tensor, states: PackedHiddenStates, has_targets: bool = False
) -> HessianAccumulator:
    outputs, channels = weight.shape
    return HessianAccumulator(channels, outputs if has_targets else 0, states.device)


@dataclass
class _LinearQuantizer:
    """Quantizes a layer's linears in place, each given its Hessian; collects results and errors."""

    layer: nn.Module
    scheme: QuantScheme
    where: str
    results: dict[str, QuantizedLinear] = field(default_factory=dict)
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    outputs: dict[str, OutputFactor] = field(default_factory=dict)

    def row_bits(self, names: Sequence[str]) -> Tensor:
        """Return the bits of each row of these linears, stacked."""
        bits = [self.scheme.of(f"{self.where}.{name}").bits for name in names]
        rows = [len(weight_of(self.layer, name)) for name in names]
        return torch.tensor(bits).repeat_interleave(torch.tensor(rows))

    def quantize(self, name: str, factor: HessianFactor, error_correction: bool = False) -> None:
        weight, bias = weight_of(self.layer, name), bias_of(self.layer, name)
        target = weight
        # A linear without any weight was pruned on purpose and stays so.
        if error_correction and bool(weight.any()):
            target = weight + ERROR_CORRECTION * factor.least_squares_update(weight)
        where, outputs = f"{self.where}.{name}", self.outputs.get(name)
        linear = gptq_quantize(target, factor, self.scheme.of(where), where, bias, outputs)
        stored = linear.dequantize()
        self.errors[name] = self._relative_errors(name, target, stored, factor)
        self.results[name] = linear
        weight.copy_(stored)
        if bias is not None and linear.bias is not None:
            bias.copy_(linear.bias)

    def _relative_errors(
        self, name: str, target: Tensor, stored: Tensor, factor: HessianFactor
    ) -> tuple[float, float]:
        """Return the relative output error by round to nearest and as stored, on sampled rows."""
        rows = torch.linspace(0, len(target) - 1, min(ERROR_ROWS, len(target))).long()
        outputs = self.outputs.get(name)
        if outputs is None:
            target, stored, rows = target[rows], stored[rows], torch.arange(len(rows))
        scheme = self.scheme.of(f"{self.where}.{name}")
        differences = [target, fake_quantize(target, scheme) - target, stored - target]
        if outputs is not None:
            differences = [outputs.weigh(part) for part in differences]
        mean_square, rtn, error = (factor.output_error(part[rows]) for part in differences)
        return (rtn / mean_square, error / mean_square) if mean_square else (0.0, 0.0)


def _mean_relative_error(fp: PackedHiddenStates, quantized: PackedHiddenStates) -> float:
    total = 0.0
    for chunk in fp.chunks:
        errors = relative_errors(fp.hidden[chunk.tokens], quantized.hidden[chunk.tokens])
        total += float(errors.sum(dtype=torch.float64))
    return total / len(fp.hidden)


@torch.inference_mode()
def _advance(states: PackedHiddenStates, layer: nn.Module) -> None:
    """Advance through a finished layer with the arithmetic of `quantize_layer`, bit for bit."""
    for chunk in states.chunks:
        hidden = states.load(chunk)
        hidden = after_attention(layer, hidden, states.o_proj_inputs(layer, hidden, chunk))
        states.hidden[chunk.tokens] = after_mlp(layer, hidden, down_proj_inputs(layer, hidden))


class _FinishedLayer:
    """A quantized layer's tensors as a WeightSource."""

    def __init__(self, tensors: Mapping[str, Tensor | QuantizedLinear]):
        self._tensors = tensors

    def tensor(self, name: str) -> Tensor:
        prefix, _, last = name.rpartition(".")
        tensor = self._tensors[prefix if last == "bias" else name]
        if not isinstance(tensor, QuantizedLinear):
            return tensor
        assert tensor.bias is not None
        return tensor.bias

    def linear(self, prefix: str) -> Tensor | QuantizedLinear:
        return self._tensors[prefix]
