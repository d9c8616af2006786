"""The default algorithm on a decoder layer: learned scales, error feedback, compensation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vila_deploy.checkpoint.llm_config import LINEARS, NORMS
from vila_deploy.formats.base import QuantizedLinear
from vila_deploy.formats.rtn import fake_quantize
from vila_deploy.formats.scheme import QuantScheme
from vila_deploy.model.streams import Streams, after_attention, after_mlp, gated
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
from vila_deploy.quantize.algorithms.gptq import round_with_feedback
from vila_deploy.quantize.algorithms.hessian import InputMoments, Metric
from vila_deploy.quantize.algorithms.learned_scales import learn_scales
from vila_deploy.utils.errors import VilaDeployError

# Scales only need an idea of the moments; every so-manyth token gives it.
SCALE_TOKEN_STRIDE = 4
# How much of the error of what came before o_proj and down_proj make up for.
COMPENSATION = 0.5
# Of each linear, to say in the report how much is lost.
ERROR_ROWS = 512
STEPS_PER_LAYER = 5


@dataclass(frozen=True)
class CompensatedLayer:
    """A quantized decoder layer; linears and norms by their name inside the layer.

    Args:
        norms: float32 weights, scales folded in, exact in float16.
        errors: for each linear: mean square error of its output over its mean square, by round to
            nearest and as it is, both on what enters it behind the quantized layers before and
            against the weights that it was to have.
        drift: square of the difference between quantized and exact hidden state behind the layer,
            over the square of the exact one; mean over the tokens.
    """

    linears: dict[str, QuantizedLinear]
    norms: dict[str, Tensor]
    errors: dict[str, tuple[float, float]]
    drift: float


@torch.inference_mode()
def quantize_layer(
    layer: nn.Module,
    streams: Streams,
    scheme: QuantScheme,
    where: str,
    on_step: Callable[[str], None] = lambda text: None,
) -> CompensatedLayer:
    """Quantizes `layer`, whose weights are changed, and moves `streams` on.

    Unlike llm-awq's, the inputs of each linear are those behind everything quantized so far, and
    o_proj and down_proj are first moved towards the weights that bring the hidden states back to
    the exact ones (Zhang et al. 2025, Qronos; Li et al. 2025, GPTAQ).

    Args:
        layer: decoder layer, float32.
        where: name of the layer, for messages.
        on_step: is told STEPS_PER_LAYER times what is being done.

    Raises:
        VilaDeployError: the layer's outputs are not finite, or a weight is too large for float16.
    """
    work = _Work(layer, streams, scheme, where)
    on_step("outputs before")
    between = work.run_exact()
    work.fold_output_scales()
    on_step("attention")
    work.round_behind_norm(ATTENTION_GROUP)
    on_step("attention output")
    work.round_out(between)
    del between
    on_step("feed-forward")
    work.round_behind_norm(MLP_GROUP)
    on_step("feed-forward output")
    work.round_down()
    return CompensatedLayer(
        linears={name: work.linears[name] for name in LINEARS},
        norms={name: weight_of(layer, name) for name in NORMS},
        errors={name: work.errors[name] for name in LINEARS},
        drift=_drift(streams),
    )


class _Work:
    """One layer on its way."""

    def __init__(self, layer: nn.Module, streams: Streams, scheme: QuantScheme, where: str):
        self.layer, self.streams, self.scheme, self.where = layer, streams, scheme, where
        self.linears: dict[str, QuantizedLinear] = {}
        self.errors: dict[str, tuple[float, float]] = {}
        self._scales: dict[ScaleGroup, Tensor] = {}

    def run_exact(self) -> Tensor:
        """Moves the exact stream on, and learns the scales that fold into linears.

        Returns:
            the exact hidden states between attention and feed-forward block.
        """
        streams, layer = self.streams, self.layer
        between = streams.matrix(streams.exact.shape[1])
        into_out = self._moments(weight_of(layer, OUT_GROUP.linears[0]).shape[1])
        into_down = self._moments(weight_of(layer, DOWN_GROUP.linears[0]).shape[1])
        for chunk in streams.chunks:
            hidden = streams.load(streams.exact, chunk)
            heads = streams.heads(layer, hidden, chunk)
            into_out.add(heads[::SCALE_TOKEN_STRIDE])
            hidden = after_attention(layer, hidden, heads)
            between[chunk.tokens] = hidden
            inner = gated(layer, hidden)
            into_down.add(inner[::SCALE_TOKEN_STRIDE])
            streams.exact[chunk.tokens] = after_mlp(layer, hidden, inner)
        if not bool(torch.isfinite(streams.exact).all()):
            raise VilaDeployError(
                "its outputs on the calibration data are not finite",
                where=self.where,
                fix="check that this checkpoint is not damaged",
            )
        self._learn(OUT_GROUP, into_out.metric())
        self._learn(DOWN_GROUP, into_down.metric())
        return between

    def fold_output_scales(self) -> None:
        """Into the rows of v_proj and up_proj, before anything is rounded: so it is exact."""
        for group, scales in self._scales.items():
            previous = weight_of(self.layer, group.previous)
            # Heads that share a value head share its scales.
            rows = torch.empty_like(previous[:, 0]).index_copy_(0, self._rows_of(group), scales)
            previous.div_(rows[:, None])
            bias = bias_of(self.layer, group.previous)
            if bias is not None:
                bias.div_(rows)
            weight_of(self.layer, group.linears[0]).mul_(scales)

    def round_behind_norm(self, group: ScaleGroup) -> None:
        """Scales and rounds the linears behind a norm, whose weight takes up the scales."""
        norm = self.layer.get_submodule(group.previous)
        weights = [weight_of(self.layer, name) for name in group.linears]
        moments = self._moments(weights[0].shape[1])
        for chunk in self.streams.chunks:
            moments.add(norm(self.streams.load(self.streams.quantized, chunk)))
        metric = moments.metric()
        learned = learn_scales(torch.cat(weights), metric, self.scheme)
        metric.rescale(fold_scales(self.layer, ScaleChoice(group, 0.0, learned, ())))
        for name in group.linears:
            self._round(name, weight_of(self.layer, name), metric)

    def round_out(self, between: Tensor) -> None:
        """Rounds o_proj, compensated, and moves the quantized stream on behind the attention."""
        name = OUT_GROUP.linears[0]
        weight = weight_of(self.layer, name)
        streams, stream = self.streams, self.streams.quantized
        heads = streams.matrix(weight.shape[1])
        moments = self._moments(weight.shape[1], weight.shape[0])
        for chunk in streams.chunks:
            hidden = streams.load(stream, chunk)
            entering = streams.heads(self.layer, hidden, chunk)
            moments.add(entering, streams.load(between, chunk) - hidden)
            heads[chunk.tokens] = entering
        self._round(name, weight, moments.metric(), compensate=True)
        for chunk in streams.chunks:
            parts = streams.load(stream, chunk), streams.load(heads, chunk)
            stream[chunk.tokens] = after_attention(self.layer, *parts)

    def round_down(self) -> None:
        """Rounds down_proj, compensated, and moves the quantized stream on behind the layer."""
        name = DOWN_GROUP.linears[0]
        weight = weight_of(self.layer, name)
        streams, stream = self.streams, self.streams.quantized
        inner = streams.matrix(weight.shape[1])
        moments = self._moments(weight.shape[1], weight.shape[0])
        for chunk in streams.chunks:
            hidden = streams.load(stream, chunk)
            entering = gated(self.layer, hidden)
            moments.add(entering, streams.load(streams.exact, chunk) - hidden)
            inner[chunk.tokens] = entering
        self._round(name, weight, moments.metric(), compensate=True)
        for chunk in streams.chunks:
            parts = streams.load(stream, chunk), streams.load(inner, chunk)
            stream[chunk.tokens] = after_mlp(self.layer, *parts)

    def _moments(self, channels: int, outputs: int = 0) -> InputMoments:
        return InputMoments(channels, outputs, self.streams.device)

    def _learn(self, group: ScaleGroup, metric: Metric) -> None:
        weight = weight_of(self.layer, group.linears[0])
        self._scales[group] = learn_scales(weight, metric, self.scheme, self._rows_of(group))

    def _rows_of(self, group: ScaleGroup) -> Tensor:
        """The output channel of the linear before that each input channel [in] comes from."""
        channels = weight_of(self.layer, group.linears[0]).shape[1]
        rows = len(weight_of(self.layer, group.previous))
        if rows == channels:
            return torch.arange(channels, device=self.streams.device)
        width = self.layer.get_submodule("self_attn").head_dim
        assert isinstance(width, int)
        every = torch.arange(channels, device=self.streams.device)
        heads, within = every // width, every % width
        return heads // (channels // rows) * width + within

    def _round(self, name: str, weight: Tensor, metric: Metric, compensate: bool = False) -> None:
        bias = bias_of(self.layer, name)
        wanted = weight
        if compensate:
            wanted = weight + COMPENSATION * metric.fit(weight)
        linear = round_with_feedback(wanted, metric, self.scheme, f"{self.where}.{name}", bias)
        rows = torch.linspace(0, len(weight) - 1, min(ERROR_ROWS, len(weight))).long()
        sample = wanted[rows]
        power = metric.output_error(sample)
        rounded = metric.output_error(fake_quantize(sample, self.scheme) - sample)
        stored = linear.dequantize()
        left = metric.output_error(stored[rows] - sample)
        self.errors[name] = (rounded / power, left / power) if power else (0.0, 0.0)
        self.linears[name] = linear
        weight.copy_(stored)
        if bias is not None and linear.bias is not None:
            bias.copy_(linear.bias)


def _drift(streams: Streams) -> float:
    total = 0.0
    for chunk in streams.chunks:
        exact = streams.exact[chunk.tokens]
        lost = (streams.quantized[chunk.tokens] - exact).square().sum(-1)
        power = exact.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
        total += float((lost / power).sum(dtype=torch.float64))
    return total / len(streams.exact)
