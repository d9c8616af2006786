"""AWQ on one decoder layer: measure, search scales, fold them, search clips, round."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vila_deploy.checkpoint.llm_config import LINEARS, NORMS, LlmConfig
from vila_deploy.formats.base import QuantizedLinear
from vila_deploy.formats.rtn import fake_quantize, round_to_nearest
from vila_deploy.formats.scheme import QuantScheme
from vila_deploy.model.hidden_states import Sequences, mean_square, mlp, watch_inputs
from vila_deploy.quantize.algorithms.awq_clip import SKIPPED, apply_clip, search_clip
from vila_deploy.quantize.algorithms.awq_scales import (
    ATTENTION_GROUP,
    DOWN_GROUP,
    GRID,
    GROUPS,
    MLP_GROUP,
    OUT_GROUP,
    FakeQuantize,
    ScaleChoice,
    ScaleGroup,
    bias_of,
    fold_scales,
    has_group,
    search_scales,
    weight_of,
)
from vila_deploy.quantize.algorithms.awq_stats import InputStats
from vila_deploy.utils.errors import VilaDeployError


@dataclass(frozen=True)
class LayerResult:
    """A quantized decoder layer; linears and norms by their name inside the layer.

    Args:
        norms: float32 weights, scales folded in.
        choices: the outcome of each scale search.
        limits: largest magnitudes kept, [out, in/group], of each clipped linear.
        clipped: share of each clipped linear's groups whose range was reduced.
        errors: for each linear and for the whole `layer`: mean square error of the output over its
            mean square, by round to nearest and by AWQ. The layer's is over what it adds.
    """

    linears: dict[str, QuantizedLinear]
    norms: dict[str, Tensor]
    choices: tuple[ScaleChoice, ...]
    limits: dict[str, Tensor]
    clipped: dict[str, float]
    errors: dict[str, tuple[float, float]]


@torch.inference_mode()
def quantize_layer(
    layer: nn.Module,
    original: Callable[[str], Tensor],
    sequences: Sequences,
    scheme: QuantScheme,
    where: str,
    on_step: Callable[[str], None] = lambda text: None,
    quantizer: FakeQuantize | None = None,
) -> LayerResult:
    """Quantizes `layer`, whose weights are changed, and moves `sequences` on to its outputs.

    As in llm-awq all scales are searched on the unscaled layer, clips on the scaled one, and the
    next layer's inputs are the outputs of this one before any change.

    Args:
        layer: decoder layer, float32.
        original: name of a linear → its unchanged weight [out, in].
        sequences: inputs of the layer; holds its outputs afterwards.
        where: name of the layer, for messages.
        on_step: is told what is being done.
        quantizer: arithmetic that the searches assume; by default that of what is stored.

    Raises:
        VilaDeployError: the layer's outputs are not finite.
    """
    quantizer = quantizer or (lambda weight: fake_quantize(weight, scheme))
    work = _Work(layer, sequences, quantizer, on_step)
    inputs = sequences.hidden
    work.search_attention()
    work.search_mlp()
    _check_finite(sequences.hidden, where)
    on_step("round to nearest, for comparison")
    rounded = {name: fake_quantize(weight_of(layer, name), scheme) for name in LINEARS}
    before = work.relative_errors(rounded, original) | {"layer": work.layer_error(inputs, rounded)}
    del rounded
    work.fold()
    for name in LINEARS:
        if name not in SKIPPED:
            on_step(f"clip {name}")
            work.clip(name, scheme.group_size)
    on_step("rounding")
    linears = {
        n: round_to_nearest(weight_of(layer, n), scheme, f"{where}.{n}", bias_of(layer, n))
        for n in LINEARS
    }
    for name, linear in linears.items():
        weight_of(layer, name).copy_(linear.dequantize())
    after = work.relative_errors(work.effective_weights(), original)
    after["layer"] = work.layer_error(inputs)
    return LayerResult(
        linears=linears,
        norms={name: weight_of(layer, name) for name in NORMS},
        choices=tuple(work.choices),
        limits=work.limits,
        clipped=work.clipped,
        errors={name: (before[name], after[name]) for name in before},
    )


def _check_finite(outputs: Tensor, where: str) -> None:
    if not bool(torch.isfinite(outputs).all()):
        raise VilaDeployError(
            "its outputs on the calibration data are not finite",
            where=where,
            fix="check that this checkpoint is not damaged",
        )


class _Work:
    """One layer on its way: statistics, choices, and what has been folded into its weights."""

    def __init__(
        self,
        layer: nn.Module,
        sequences: Sequences,
        quantizer: FakeQuantize,
        on_step: Callable[[str], None],
    ):
        self.layer, self.sequences = layer, sequences
        self.quantizer, self.on_step = quantizer, on_step
        self.stats = {group: InputStats(len(sequences.hidden)) for group in GROUPS}
        self.choices: list[ScaleChoice] = []
        self.columns: dict[str, Tensor] = {}
        self.rows: dict[str, Tensor] = {}
        self.limits: dict[str, Tensor] = {}
        self.clipped: dict[str, float] = {}

    def search_attention(self) -> None:
        self.on_step("attention")
        module = self.layer.get_submodule("self_attn")
        inputs = self.layer.get_submodule("input_layernorm")(self.sequences.hidden)
        self.stats[ATTENTION_GROUP].add(inputs)
        with watch_inputs(module.get_submodule("o_proj"), self.stats[OUT_GROUP]):
            outputs = self.sequences.attention(module, inputs)
        self._search(
            ATTENTION_GROUP,
            lambda weights: mean_square(
                self.sequences.attention(module, inputs, weights) - outputs
            ),
        )
        self._search_linear(OUT_GROUP)
        self.sequences.hidden = self.sequences.hidden + outputs

    def search_mlp(self) -> None:
        self.on_step("feed-forward")
        module = self.layer.get_submodule("mlp")
        inputs = self.layer.get_submodule("post_attention_layernorm")(self.sequences.hidden)
        self.stats[MLP_GROUP].add(inputs)
        with watch_inputs(module.get_submodule("down_proj"), self.stats[DOWN_GROUP]):
            outputs = mlp(module, inputs)
        self._search(MLP_GROUP, lambda weights: mean_square(mlp(module, inputs, weights) - outputs))
        self._search_linear(DOWN_GROUP)
        self.sequences.hidden = self.sequences.hidden + outputs

    def _search(self, group: ScaleGroup, error: Callable[[Mapping[str, Tensor]], float]) -> None:
        weights = {name: weight_of(self.layer, name) for name in group.linears}
        names = [f"{name.removeprefix(group.inspected + '.')}.weight" for name in weights]
        short = ", ".join(name.partition(".")[2].removesuffix("_proj") for name in weights)
        tried = itertools.count(1)

        def error_of(candidates: Sequence[Tensor]) -> float:
            self.on_step(f"scales of {short}, {next(tried)}/{GRID}")
            return error(dict(zip(names, candidates, strict=True)))

        mean_abs = self.stats[group].mean_abs
        choice = search_scales(group, mean_abs, list(weights.values()), self.quantizer, error_of)
        self.choices.append(choice)

    def _search_linear(self, group: ScaleGroup) -> None:
        if has_group(self.layer, group):
            weight, stats = weight_of(self.layer, group.linears[0]), self.stats[group]
            self._search(
                group,
                lambda weights: stats.output_error(next(iter(weights.values())) - weight),
            )

    def fold(self) -> None:
        for choice in self.choices:
            scales = fold_scales(self.layer, choice)
            self.columns |= dict.fromkeys(choice.group.linears, scales)
            if choice.group.previous in LINEARS:
                self.rows[choice.group.previous] = scales

    def clip(self, name: str, group_size: int) -> None:
        weight = weight_of(self.layer, name)
        samples = self._stats_of(name).samples
        if name in self.columns:
            samples = samples / self.columns[name]
        limit = search_clip(weight, samples, group_size, self.quantizer)
        full = weight.unflatten(1, (limit.shape[1], -1)).abs().amax(-1)
        self.clipped[name] = float((limit < full).float().mean())
        self.limits[name] = limit
        weight.copy_(apply_clip(weight, limit))

    def effective_weights(self) -> dict[str, Tensor]:
        """The layer's present weights, as they act on inputs and outputs before folding."""
        weights = {}
        for name in LINEARS:
            weight = weight_of(self.layer, name)
            weight = weight / self.columns[name] if name in self.columns else weight
            weights[name] = weight * self.rows[name][:, None] if name in self.rows else weight
        return weights

    def relative_errors(
        self, weights: Mapping[str, Tensor], original: Callable[[str], Tensor]
    ) -> dict[str, float]:
        """Output error of each linear with `weights`, relative to its output."""
        errors = {}
        for name, weight in weights.items():
            stats, exact = self._stats_of(name), original(name)
            power = stats.output_error(exact)
            errors[name] = stats.output_error(weight - exact) / power if power else 0.0
        return errors

    def layer_error(self, inputs: Tensor, weights: Mapping[str, Tensor] | None = None) -> float:
        """Output error of the layer with `weights`, relative to what it adds to its inputs."""
        parts: dict[str, dict[str, Tensor]] = {"self_attn": {}, "mlp": {}}
        for name, weight in (weights or {}).items():
            part, _, linear = name.partition(".")
            parts[part][f"{linear}.weight"] = weight
        block = self.layer.get_submodule
        hidden = inputs + self.sequences.attention(
            block("self_attn"), block("input_layernorm")(inputs), parts["self_attn"]
        )
        normed = block("post_attention_layernorm")(hidden)
        hidden = hidden + mlp(block("mlp"), normed, parts["mlp"])
        added = mean_square(self.sequences.hidden - inputs)
        return mean_square(self.sequences.hidden - hidden) / added if added else 0.0

    def _stats_of(self, name: str) -> InputStats:
        return next(stats for group, stats in self.stats.items() if name in group.linears)


def steps_per_layer(config: LlmConfig) -> int:
    """How often `quantize_layer` calls `on_step`."""
    rows = config.num_kv_heads * config.head_dim
    tied = rows == config.num_heads * config.head_dim == config.hidden_size
    searches = len(GROUPS) if tied else len(GROUPS) - 1
    return 2 + GRID * searches + 1 + len(LINEARS) - len(SKIPPED) + 1


def ratios(choices: Sequence[ScaleChoice]) -> dict[str, float]:
    """Chosen ratio by group, under the name of the operation that takes up the scales."""
    return {choice.group.previous: choice.ratio for choice in choices}
