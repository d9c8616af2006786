"""Measure what rounding each linear costs: one pass forward and one back, a layer at a time.

To second order, outputs of a linear that are off by δ cost the model KL ≈ ½ E[(g · δ)²], where g is
the gradient of the log-probability of a token drawn from the model's own predictions (its Fisher
information). Rounding errors of different outputs are independent, so that is
½ Σ over outputs of E[g²] · E[δ²]. E[δ²] is the rounding error that `learned_scales` expects of the
algorithm, with the tokens weighted by their gradients: those that nothing depends on count little.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from vila_deploy.checkpoint import Checkpoint
from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.llm_config import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    LINEARS,
    layer_prefix,
)
from vila_deploy.checkpoint.tensor_schema import tower_linears
from vila_deploy.data.examples import LazyImage
from vila_deploy.formats.base import HEAD_LINEAR, QuantScheme
from vila_deploy.model.layerwise import PackedHiddenStates, mlp
from vila_deploy.model.llm import load_decoder_layer
from vila_deploy.quantize.algorithms.awq_scales import GROUPS, ScaleGroup, weight_of
from vila_deploy.quantize.algorithms.hessian import HessianAccumulator, HessianFactor
from vila_deploy.quantize.algorithms.learned_scales import learn_scales
from vila_deploy.quantize.bit_choice import BitChoice, choose_bits
from vila_deploy.quantize.calibrate import Calibration
from vila_deploy.quantize.head_sensitivity import HeadStatistics
from vila_deploy.quantize.options import LM_HEAD, MODULES, VISION, QuantizeOptions
from vila_deploy.quantize.rounding_kl import grouped_rounding_kl
from vila_deploy.quantize.tower_sensitivity import tower_sensitivities
from vila_deploy.utils.limits import HEAD_ROWS, LOGIT_ROWS, MAX_TOKENS, SENSITIVITY_TOKENS
from vila_deploy.utils.progress import progress

# KL in nats per token that each linear costs by itself, by name and bits.
Sensitivities = dict[str, dict[int, float]]


def search_bits(
    checkpoint: Checkpoint,
    calibration: Calibration,
    options: QuantizeOptions,
    device: torch.device,
    scratch: Path,
) -> BitChoice:
    """Return the bits of each linear within the budget of --bits-per-weight.

    Args:
        calibration: its embeddings are only read.
        scratch: folder for activations that are too large for memory.
    """
    assert options.bits_per_weight is not None
    config, float16 = checkpoint.config, kept_in_float16(checkpoint.config, options)
    if VISION not in float16 and not any(calibration.images_of):
        float16[VISION] = "there are no images among the calibration data to measure it on"
    found = measure_sensitivities(
        checkpoint,
        calibration,
        options.scheme,
        options.widths,
        algorithm=options.algorithm,
        seed=options.seed,
        device=device,
        scratch=scratch,
        modules={*MODULES} - {*float16},
    )
    llm = config.llm
    linears = {name: s for i in range(llm.num_layers) for name, s in llm.layer_linears(i).items()}
    shapes = {HEAD_LINEAR: (llm.vocab_size, llm.hidden_size), **linears, **tower_linears(config)}
    return choose_bits(
        {name: kl for name, kl in found.items() if name in linears},
        {name: math.prod(shapes[name]) for name in found},
        options.bits_per_weight,
        {name: kl for name, kl in found.items() if name not in linears},
        float16,
    )


def kept_in_float16(config: VilaConfig, options: QuantizeOptions) -> dict[str, str]:
    """Return which of MODULES the search leaves out, as the configs and options tell, and why."""
    reasons = dict.fromkeys(options.keep_fp16, "asked for by --keep-fp16")
    if config.llm.tie_word_embeddings:
        reasons[LM_HEAD] = "it is the embedding table, which is looked up in float16"
    return reasons


def measure_sensitivities(
    checkpoint: Checkpoint,
    calibration: Calibration,
    scheme: QuantScheme,
    widths: Sequence[int],
    *,
    algorithm: str,
    seed: int,
    device: torch.device,
    scratch: Path,
    modules: Collection[str] = (),
) -> Sensitivities:
    """Return the KL that each linear of the decoder costs in each of `widths` bits.

    Args:
        calibration: its embeddings are only read.
        algorithm: the one that will round: all but RTN scale channels, and GPTQ corrects errors.
        scratch: folder for activations that are too large for memory.
        modules: of MODULES, what is measured beside them, in MODULE_WIDTHS.
    """
    llm = checkpoint.config.llm
    chosen = _sample(calibration)
    predicts = chosen.predicts()
    predicted = int(predicts.sum())
    states = PackedHiddenStates.on_host(llm, chosen.embeds, scratch, device, MAX_TOKENS)
    inputs: list[Tensor] = []
    found: Sensitivities = {}
    with progress(2 * llm.num_layers + 1, "measuring sensitivity") as advance:
        for index in range(llm.num_layers):
            inputs.append(states.matrix(llm.hidden_size).copy_(states.hidden))
            layer = load_decoder_layer(llm, checkpoint.llm, index).to(device)
            states.advance(layer)
            advance(f"layer {index + 1}/{llm.num_layers} forward")
        head = HeadStatistics(llm, device) if LM_HEAD in modules else None
        gradient = _head_gradient(checkpoint, states, predicts, seed, head)
        advance("head")
        for index in reversed(range(llm.num_layers)):
            layer = load_decoder_layer(llm, checkpoint.llm, index).to(device)
            statistics = _backward(layer, states, inputs.pop(), gradient)
            for name in LINEARS:
                kl = statistics.kl(layer, name, algorithm, scheme, widths)
                whole = {bits: cost / predicted for bits, cost in kl.items()}
                found[f"{layer_prefix(index)}.{name}"] = whole
            advance(f"layer {index + 1}/{llm.num_layers} backward")
    found = {name: found[name] for i in range(llm.num_layers) for name in llm.layer_linears(i)}
    if head is not None:
        found[HEAD_LINEAR] = head.kl(checkpoint.llm.tensor(HEAD), predicted, scheme.group_size)
    if VISION in modules and any(chosen.images_of):
        shown, gradients = chosen.image_gradients(gradient)
        found |= tower_sensitivities(checkpoint, shown, gradients, predicted, device)
    return found


@dataclass(frozen=True)
class _Sample:
    """Some sequences of the calibration data.

    Args:
        is_image: bool [tokens] of each, whether an embedding is an image's.
        images_of: the images of each.
    """

    embeds: list[Tensor]
    is_image: tuple[Tensor, ...]
    images_of: tuple[tuple[LazyImage, ...], ...]

    def predicts(self) -> Tensor:
        """Return which tokens predict, bool [tokens of all]; those within an image do not."""
        return ~torch.cat(self.is_image)

    def image_gradients(self, gradient: Tensor) -> tuple[list[tuple[LazyImage, ...]], list[Tensor]]:
        """Return the images of each sequence that has some, and the gradient of their embeddings.

        Args:
            gradient: [tokens of all sequences, hidden].
        """
        rows_of = gradient.split([len(is_image) for is_image in self.is_image])
        parts = zip(self.images_of, rows_of, self.is_image, strict=True)
        shown = [(images, rows[image]) for images, rows, image in parts if images]
        return [images for images, _ in shown], [rows for _, rows in shown]


def _sample(calibration: Calibration) -> _Sample:
    """Return sequences from all over the calibration data."""
    count = len(calibration.embeds)
    starts = torch.tensor([0, *map(len, calibration.embeds)]).cumsum(0).tolist()
    chosen: list[int] = []
    # Neighbours in this order are far apart, so any number of them covers all kinds.
    order = sorted(range(count), key=lambda index: (index * 0.618034) % 1)
    for index in order:
        if chosen and sum(len(calibration.embeds[i]) for i in chosen) >= SENSITIVITY_TOKENS:
            break
        chosen.append(index)
    images_of = calibration.images_of or ((),) * count
    if not any(images_of[index] for index in chosen):
        chosen += [index for index in order if images_of[index]][:1]
    chosen.sort(key=lambda index: len(calibration.embeds[index]))
    return _Sample(
        [calibration.embeds[index] for index in chosen],
        tuple(calibration.is_image[starts[i] : starts[i + 1]] for i in chosen),
        tuple(images_of[index] for index in chosen),
    )


@torch.no_grad()
def _head_gradient(
    checkpoint: Checkpoint,
    states: PackedHiddenStates,
    predicts: Tensor,
    seed: int,
    statistics: HeadStatistics | None = None,
) -> Tensor:
    """Return the gradient [tokens, hidden] of drawn tokens' log-probabilities, before the norm.

    Args:
        predicts: bool [tokens]; predictions within an image count for nothing.
        statistics: take note of these tokens.
    """
    llm, device = checkpoint.config.llm, states.device
    norm = LlamaRMSNorm(llm.hidden_size, eps=llm.rms_norm_eps)
    weight = checkpoint.llm.tensor(FINAL_NORM).float().to(device)
    norm.weight = nn.Parameter(weight, requires_grad=False)
    head = checkpoint.llm.tensor(EMBEDDING if llm.tie_word_embeddings else HEAD)
    generator = torch.Generator().manual_seed(seed)
    gradient = states.matrix(llm.hidden_size)
    for begin in range(0, len(gradient), LOGIT_ROWS):
        rows = slice(begin, begin + LOGIT_ROWS)
        hidden = states.hidden[rows].to(device)
        with torch.enable_grad():
            hidden.requires_grad_(True)
            normed = norm(hidden)
        parts = [part.to(device).float() for part in head.split(HEAD_ROWS)]
        logits = torch.cat([normed.detach() @ part.T for part in parts], 1)
        probability = torch.softmax(logits, 1)
        if statistics is not None:
            statistics.add(normed.detach(), probability, predicts[rows].to(device))
        drawn = torch.multinomial(probability.cpu(), 1, generator=generator).to(device)
        error = probability.neg_().scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float))
        error *= predicts[rows, None].to(device)
        columns = error.split(HEAD_ROWS, 1)
        normed_gradient = sum(e @ part for e, part in zip(columns, parts, strict=True))
        assert isinstance(normed_gradient, Tensor)
        gradient[rows] = torch.autograd.grad(normed, hidden, normed_gradient)[0].to(gradient.device)
    return gradient


class _Statistics:
    """Sums over a layer's tokens: squared gradients of each linear's outputs, XᵀX of its inputs."""

    def __init__(self, layer: nn.Module, device: torch.device):
        weights = {name: weight_of(layer, name) for name in LINEARS}
        self._squared_gradients = {n: w.new_zeros(len(w)) for n, w in weights.items()}
        self._weighted_squares = {n: w.new_zeros(w.shape[1]) for n, w in weights.items()}
        self._group_of = {name: group for group in GROUPS for name in group.linears}
        self._hessians = {
            group: HessianAccumulator(weights[group.linears[0]].shape[1], device=device)
            for group in GROUPS
        }
        self._factors: dict[ScaleGroup, HessianFactor] = {}
        self._scales: dict[ScaleGroup, Tensor] = {}

    def add(self, name: str, inputs: Tensor, gradient: Tensor) -> None:
        """Add the next tokens: inputs [.., in] of a linear and the gradient [.., out]."""
        inputs, squares = inputs.flatten(0, -2), gradient.flatten(0, -2).square()
        self._squared_gradients[name] += squares.sum(0)
        self._weighted_squares[name] += squares.sum(1) @ inputs.square()
        group = self._group_of[name]
        if name == group.linears[0]:
            self._hessians[group].add(inputs)

    def kl(
        self,
        layer: nn.Module,
        name: str,
        algorithm: str,
        scheme: QuantScheme,
        widths: Sequence[int],
    ) -> dict[int, float]:
        """Return the KL of the linear `name` in each of `widths`, summed over the tokens."""
        scales = self._scales_of(layer, name, algorithm, scheme)
        weight = weight_of(layer, name) * scales
        importance = self._importance(name, algorithm) / scales**2
        squares = self._squared_gradients[name]
        return {
            bits: grouped_rounding_kl(
                weight,
                squares,
                importance,
                QuantScheme(scheme.group_size, scheme.symmetric, bits).of(name),
            )
            for bits in widths
        }

    def _importance(self, name: str, algorithm: str) -> Tensor:
        """Return what an error of each input channel [in] costs in an output's mean square."""
        total = self._squared_gradients[name].sum().clamp(min=torch.finfo(torch.float32).tiny)
        weighted = self._weighted_squares[name] / total
        if algorithm != "awq-gptq":
            return weighted
        factor = self._factor(self._group_of[name])
        # GPTQ's share of the mean square, as it is over all tokens.
        return factor.d * weighted / factor.hessian.diagonal()

    def _scales_of(
        self, layer: nn.Module, name: str, algorithm: str, scheme: QuantScheme
    ) -> Tensor | float:
        """Return scales [in] like those that the algorithm will find, for the linear's inputs."""
        if algorithm == "rtn":
            return 1.0
        group = self._group_of[name]
        if group not in self._scales:
            weight = torch.cat([weight_of(layer, linear) for linear in group.linears])
            self._scales[group] = learn_scales(weight, self._factor(group), scheme)
        return self._scales[group]

    def _factor(self, group: ScaleGroup) -> HessianFactor:
        if group not in self._factors:
            self._factors[group] = self._hessians.pop(group).factor()
        return self._factors[group]


def _backward(
    layer: nn.Module, states: PackedHiddenStates, inputs: Tensor, gradient: Tensor
) -> _Statistics:
    """Take `gradient` [tokens, hidden] from behind the layer to before it, in place.

    Args:
        inputs: hidden states [tokens, hidden] before the layer.
    """
    statistics = _Statistics(layer, states.device)

    def watch(module: nn.Module, given: tuple[Tensor, ...], output: Tensor, name: str) -> None:
        add = partial(statistics.add, name, given[0].detach())
        output.register_hook(lambda gradient: add(gradient.detach()))

    hooks = [
        layer.get_submodule(name).register_forward_hook(partial(watch, name=name))
        for name in LINEARS
    ]
    module = layer.get_submodule
    for chunk in states.chunks:
        hidden = states.load(chunk, inputs).clone().requires_grad_(True)
        with torch.enable_grad():
            normed = module("input_layernorm")(hidden)
            between = hidden + states.attention(module("self_attn"), normed, chunk.lengths)
            normed = module("post_attention_layernorm")(between)
            output = between + mlp(module("mlp"), normed)
        behind = states.load(chunk, gradient)
        before = torch.autograd.grad(output, hidden, behind)[0]
        gradient[chunk.tokens] = before.to(gradient.device)
    for hook in hooks:
        hook.remove()
    return statistics
