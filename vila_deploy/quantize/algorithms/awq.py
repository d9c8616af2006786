"""AWQ as llm-awq does it: measure, search scales, fold them, search clip values, round.

Lin et al. 2023, https://arxiv.org/abs/2306.00978.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from vila_deploy.checkpoint import Checkpoint
from vila_deploy.checkpoint.llm_config import LINEARS, NORMS, LlmConfig, layer_prefix
from vila_deploy.formats.base import QuantizedLinear, QuantScheme
from vila_deploy.formats.rtn import fake_quantize, round_to_nearest
from vila_deploy.model.layerwise import PackedHiddenStates, mlp
from vila_deploy.model.llm import dense_weight
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
from vila_deploy.quantize.algorithms.awq_stats import InputStats, watch_inputs
from vila_deploy.quantize.algorithms.base import (
    LayerEntry,
    LayerQuantizer,
    LayerTensors,
    OnStep,
    stored_tensors,
)
from vila_deploy.quantize.calibrate import Calibration
from vila_deploy.utils.errors import VilaDeployError


@dataclass(frozen=True)
class AwqLayer:
    """A quantized decoder layer; linears and norms by their name inside the layer.

    Args:
        norms: float32 weights, scales folded in.
        choices: the outcome of each scale search.
        clips: clip values [out, in/group] of each clipped linear.
        clipped: share of each clipped linear's groups whose range was reduced.
        errors: for each linear and for the whole `layer`: mean square error of the output over its
            mean square, by round to nearest and by AWQ. The layer's is over what it adds.
    """

    linears: dict[str, QuantizedLinear]
    norms: dict[str, Tensor]
    choices: tuple[ScaleChoice, ...]
    clips: dict[str, Tensor]
    clipped: dict[str, float]
    errors: dict[str, tuple[float, float]]

    def report_entry(self, index: int) -> LayerEntry:
        """Return the layer's entry in report.json."""
        errors = dict(self.errors)
        before, after = errors.pop("layer")
        return {
            "layer": index,
            "output_error_before": before,
            "output_error_after": after,
            "scale_ratios": ratios(self.choices),
            "linears": {
                name: {
                    "output_error_before": rtn,
                    "output_error_after": awq,
                    "clipped_groups": self.clipped.get(name, 0.0),
                }
                for name, (rtn, awq) in errors.items()
            },
        }


class Awq(LayerQuantizer):
    """Searches scales and clip values on calibration data, exactly as llm-awq does."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        scheme: QuantScheme,
        calibration: Calibration,
        device: torch.device,
    ):
        super().__init__(checkpoint, scheme, device)
        self._states = PackedHiddenStates.on_device(self.config, calibration.embeds, device)
        self.steps_per_layer = steps_per_layer(self.config)

    def quantize(self, index: int, on_step: OnStep) -> tuple[LayerTensors, LayerEntry]:
        prefix = layer_prefix(index)
        result = quantize_layer(
            self.load(index),
            lambda name: self._original(f"{prefix}.{name}"),
            self._states,
            self.scheme,
            prefix,
            on_step,
        )
        return stored_tensors(prefix, result.norms, result.linears), result.report_entry(index)

    def _original(self, name: str) -> Tensor:
        return dense_weight(self.checkpoint.llm, name, torch.float32).to(self.device)

    def skip(self, index: int, tensors: LayerTensors) -> None:
        # Recomputed, not stored: it costs a twentieth of the search and no space on the disk.
        self._states.advance(self.load(index))


@torch.inference_mode()
def quantize_layer(
    layer: nn.Module,
    original: Callable[[str], Tensor],
    states: PackedHiddenStates,
    scheme: QuantScheme,
    where: str,
    on_step: OnStep = lambda text: None,
    quantizer: FakeQuantize | None = None,
) -> AwqLayer:
    """Quantize `layer`, whose weights are changed, and advance `states` to its outputs.

    As in llm-awq all scales are searched on the unscaled layer, clips on the scaled one, and the
    next layer's inputs are the outputs of this one before any change.

    Args:
        layer: decoder layer, float32.
        original: name of a linear → its unchanged weight [out, in].
        states: inputs of the layer; its outputs afterwards.
        where: name of the layer, for messages.
        on_step: called with the name of each step when it begins.
        quantizer: arithmetic that the searches assume; by default that of the stored weights.

    Raises:
        VilaDeployError: the layer's outputs are not finite.
    """
    schemes = {name: scheme.of(f"{where}.{name}") for name in LINEARS}
    quantizers = {n: quantizer or partial(fake_quantize, scheme=s) for n, s in schemes.items()}
    search = _LayerSearch(layer, states, quantizers, on_step)
    inputs = states.hidden
    search.search_attention()
    search.search_mlp()
    _check_finite(states.hidden, where)
    on_step("round to nearest, for comparison")
    rounded = {name: fake_quantize(weight_of(layer, name), schemes[name]) for name in LINEARS}
    before = search.relative_errors(rounded, original) | {
        "layer": search.layer_error(inputs, rounded)
    }
    del rounded
    search.fold()
    for name in LINEARS:
        if name not in SKIPPED:
            on_step(f"clip {name}")
            search.clip(name, scheme.group_size)
    on_step("rounding")
    linears = {
        n: round_to_nearest(weight_of(layer, n), schemes[n], f"{where}.{n}", bias_of(layer, n))
        for n in LINEARS
    }
    for name, linear in linears.items():
        weight_of(layer, name).copy_(linear.dequantize())
    after = search.relative_errors(search.effective_weights(), original)
    after["layer"] = search.layer_error(inputs)
    return AwqLayer(
        linears=linears,
        norms={name: weight_of(layer, name) for name in NORMS},
        choices=tuple(search.choices),
        clips=search.clips,
        clipped=search.clipped,
        errors={name: (before[name], after[name]) for name in before},
    )


def _check_finite(outputs: Tensor, where: str) -> None:
    if not bool(torch.isfinite(outputs).all()):
        raise VilaDeployError(
            "its outputs on the calibration data are not finite",
            where=where,
            fix="check that this checkpoint is not damaged",
        )


class _LayerSearch:
    """The searches on one layer: statistics, choices, and scales folded into its weights."""

    def __init__(
        self,
        layer: nn.Module,
        states: PackedHiddenStates,
        quantizers: Mapping[str, FakeQuantize],
        on_step: OnStep,
    ):
        self.layer, self.states = layer, states
        self.quantizers, self.on_step = quantizers, on_step
        self.stats = {group: InputStats(len(states.hidden)) for group in GROUPS}
        self.choices: list[ScaleChoice] = []
        self.columns: dict[str, Tensor] = {}
        self.rows: dict[str, Tensor] = {}
        self.clips: dict[str, Tensor] = {}
        self.clipped: dict[str, float] = {}

    def search_attention(self) -> None:
        self.on_step("attention")
        module, lengths = self.layer.get_submodule("self_attn"), self.states.lengths
        inputs = self.layer.get_submodule("input_layernorm")(self.states.hidden)
        self.stats[ATTENTION_GROUP].add(inputs)
        with watch_inputs(module.get_submodule("o_proj"), self.stats[OUT_GROUP]):
            outputs = self.states.attention(module, inputs, lengths)
        self._search(
            ATTENTION_GROUP,
            lambda weights: _mean_square(
                self.states.attention(module, inputs, lengths, weights) - outputs
            ),
        )
        self._search_linear(OUT_GROUP)
        self.states.hidden = self.states.hidden + outputs

    def search_mlp(self) -> None:
        self.on_step("feed-forward")
        module = self.layer.get_submodule("mlp")
        inputs = self.layer.get_submodule("post_attention_layernorm")(self.states.hidden)
        self.stats[MLP_GROUP].add(inputs)
        with watch_inputs(module.get_submodule("down_proj"), self.stats[DOWN_GROUP]):
            outputs = mlp(module, inputs)
        self._search(
            MLP_GROUP, lambda weights: _mean_square(mlp(module, inputs, weights) - outputs)
        )
        self._search_linear(DOWN_GROUP)
        self.states.hidden = self.states.hidden + outputs

    def _search(self, group: ScaleGroup, error: Callable[[Mapping[str, Tensor]], float]) -> None:
        weights = {name: weight_of(self.layer, name) for name in group.linears}
        names = [f"{name.removeprefix(group.inspected + '.')}.weight" for name in weights]
        short_names = ", ".join(name.partition(".")[2].removesuffix("_proj") for name in weights)
        ratio_number = itertools.count(1)

        def error_of(candidates: Sequence[Tensor]) -> float:
            self.on_step(f"scales of {short_names}, {next(ratio_number)}/{GRID}")
            return error(dict(zip(names, candidates, strict=True)))

        mean_abs = self.stats[group].mean_abs
        quantizers = [self.quantizers[name] for name in group.linears]
        choice = search_scales(group, mean_abs, list(weights.values()), quantizers, error_of)
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
        clip = search_clip(weight, samples, group_size, self.quantizers[name])
        full = weight.unflatten(1, (clip.shape[1], -1)).abs().amax(-1)
        self.clipped[name] = float((clip < full).float().mean())
        self.clips[name] = clip
        weight.copy_(apply_clip(weight, clip))

    def effective_weights(self) -> dict[str, Tensor]:
        """Return the layer's present weights as they act on inputs and outputs before folding."""
        weights = {}
        for name in LINEARS:
            weight = weight_of(self.layer, name)
            weight = weight / self.columns[name] if name in self.columns else weight
            weights[name] = weight * self.rows[name][:, None] if name in self.rows else weight
        return weights

    def relative_errors(
        self, weights: Mapping[str, Tensor], original: Callable[[str], Tensor]
    ) -> dict[str, float]:
        """Return the output error of each linear with `weights`, relative to its output."""
        errors = {}
        for name, weight in weights.items():
            stats, exact = self._stats_of(name), original(name)
            mean_square = stats.output_error(exact)
            error = stats.output_error(weight - exact)
            errors[name] = error / mean_square if mean_square else 0.0
        return errors

    def layer_error(self, inputs: Tensor, weights: Mapping[str, Tensor] | None = None) -> float:
        """Return the layer's error with `weights`, relative to what it adds to its inputs."""
        parts: dict[str, dict[str, Tensor]] = {"self_attn": {}, "mlp": {}}
        for name, weight in (weights or {}).items():
            part, _, linear = name.partition(".")
            parts[part][f"{linear}.weight"] = weight
        block = self.layer.get_submodule
        normed, lengths = block("input_layernorm")(inputs), self.states.lengths
        hidden = inputs + self.states.attention(
            block("self_attn"), normed, lengths, parts["self_attn"]
        )
        normed = block("post_attention_layernorm")(hidden)
        hidden = hidden + mlp(block("mlp"), normed, parts["mlp"])
        added = _mean_square(self.states.hidden - inputs)
        return _mean_square(self.states.hidden - hidden) / added if added else 0.0

    def _stats_of(self, name: str) -> InputStats:
        return next(stats for group, stats in self.stats.items() if name in group.linears)


def steps_per_layer(config: LlmConfig) -> int:
    """Return how often `quantize_layer` calls `on_step`."""
    rows = config.num_kv_heads * config.head_dim
    tied = rows == config.num_heads * config.head_dim == config.hidden_size
    searches = len(GROUPS) if tied else len(GROUPS) - 1
    return 2 + GRID * searches + 1 + len(LINEARS) - len(SKIPPED) + 1


def ratios(choices: Sequence[ScaleChoice]) -> dict[str, float]:
    """Return the chosen ratio by group, named by the operation that takes up the scales."""
    return {choice.group.previous: choice.ratio for choice in choices}


def _mean_square(value: Tensor) -> float:
    """Return the mean of squares, row by row first so that millions of terms keep digits."""
    return float(value.square().mean(-1, dtype=torch.float32).mean(dtype=torch.float64))
