"""Measure what quantization lost: the quantized checkpoint beside the original."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from vila_deploy.checkpoint import Checkpoint
from vila_deploy.checkpoint.llm_config import EMBEDDING, FINAL_NORM, HEAD
from vila_deploy.data.embed import IMAGE_TOKEN_ID
from vila_deploy.eval.data import EvaluationData
from vila_deploy.eval.metrics import Quality, TokenMetrics, compare_logits, relative_errors
from vila_deploy.formats.base import QuantizedLinear
from vila_deploy.model.layerwise import PackedHiddenStates
from vila_deploy.model.llm import load_decoder_layer
from vila_deploy.utils.device import CPU
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.limits import CHUNK_TOKENS as LAYER_TOKENS
from vila_deploy.utils.limits import HEAD_ROWS, LOGIT_ROWS
from vila_deploy.utils.progress import progress

TEXT, IMAGE = "text", "image"


@dataclass(frozen=True)
class LayerError:
    """Relative error (NMSE) of the hidden states behind a decoder layer, per modality.

    Mean over tokens of the square of the difference over the square of the original. None: there
    are no such tokens.
    """

    layer: int
    text_error: float | None
    image_error: float | None


@dataclass(frozen=True)
class Evaluation:
    """Quality by what is predicted: text, answers about images (`image`), and both (`all`)."""

    own_data: bool
    sequences: int
    image_sequences: int
    images: int
    positions: int
    image_positions: int
    sha256: str
    quality: dict[str, Quality | None]
    layers: tuple[LayerError, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class _Model:
    """One of the two models: its hidden states, one decoder layer further at a time."""

    def __init__(self, checkpoint: Checkpoint, embeds: list[Tensor], device: torch.device):
        self._checkpoint, self._config = checkpoint, checkpoint.config.llm
        self._device = device
        self.states = PackedHiddenStates.on_device(self._config, embeds, device, LAYER_TOKENS)

    def advance(self, index: int) -> None:
        layer = load_decoder_layer(self._config, self._checkpoint.llm, index).to(self._device)
        self.states.advance(layer)
        # Two layers at a time would be twice the memory; collecting garbage always takes long.
        alive = weakref.ref(layer)
        del layer
        if alive() is not None:
            gc.collect()

    def final_states(self, predicted: Tensor) -> Tensor:
        """Return normed hidden states [predicted positions, hidden] behind the last layer.

        Args:
            predicted: bool [positions].
        """
        norm = LlamaRMSNorm(self._config.hidden_size, eps=self._config.rms_norm_eps)
        weight = self._checkpoint.llm.tensor(FINAL_NORM).float().to(self._device)
        norm.weight = nn.Parameter(weight, requires_grad=False)
        mask, states = predicted.to(self._device), self.states
        parts = [states.load(chunk)[mask[chunk.tokens]] for chunk in states.chunks]
        return torch.cat([norm(part) for part in parts])

    def head(self) -> Tensor:
        """Return [vocabulary, hidden] as stored, mapped from the file unless it is quantized."""
        name = EMBEDDING if self._config.tie_word_embeddings else HEAD
        head = self._checkpoint.llm.linear(name.removesuffix(".weight"))
        return head.dequantize() if isinstance(head, QuantizedLinear) else head


@torch.inference_mode()
def evaluate(
    original: Checkpoint,
    quantized: Checkpoint,
    data: EvaluationData,
    device: torch.device = CPU,
) -> Evaluation:
    """Run both models on `data`, one decoder layer in memory at a time; deterministic.

    Raises:
        VilaDeployError: the two are not the same model.
    """
    _check_same_model(original, quantized)
    models = [_Model(c, data.embeds(c), device) for c in (original, quantized)]
    ids = torch.cat(data.ids)
    predicted = torch.cat([data.predicted(index) for index in range(len(data.ids))])
    targets = torch.cat([ids[1:], ids[:1]])[predicted]
    kinds = [i < data.image_sequences for i, ids_ in enumerate(data.ids) for _ in ids_]
    about_images = torch.tensor(kinds)[predicted]
    layers = []
    num_layers, chunks = original.config.llm.num_layers, math.ceil(len(targets) / LOGIT_ROWS)
    with progress(num_layers + chunks, "evaluating") as advance:
        for index in range(num_layers):
            advance(f"layer {index + 1}/{num_layers}", min(index, 1))
            for model in models:
                model.advance(index)
            layers.append(_layer_error(index, models, ids == IMAGE_TOKEN_ID))
        advance("logits")
        metrics = _compare_tokens(models, predicted, targets.to(device), advance)
    everything = torch.ones_like(about_images)
    classes = {"all": everything, TEXT: ~about_images, IMAGE: about_images}
    return Evaluation(
        own_data=data.own,
        sequences=len(data.sequences),
        image_sequences=data.image_sequences,
        images=data.images,
        positions=len(ids),
        image_positions=int((ids == IMAGE_TOKEN_ID).sum()),
        sha256=data.sha256,
        quality={name: Quality.of(metrics[chosen]) for name, chosen in classes.items()},
        layers=tuple(layers),
    )


def _compare_tokens(
    models: Sequence[_Model],
    predicted: Tensor,
    targets: Tensor,
    advance: Callable[[str], None],
) -> TokenMetrics:
    """Return both models' figures of each predicted token; `advance` is called for each chunk.

    Args:
        predicted: bool [positions].
        targets: int64 [predicted positions], the token that follows each.
    """
    metrics = TokenMetrics.zeros(len(targets))
    states = [model.final_states(predicted) for model in models]
    heads = [model.head() for model in models]
    # Allocated once: small results between freed logits would leave holes, chunk after chunk.
    buffers = states[0].new_empty(3, min(LOGIT_ROWS, len(targets)), len(heads[0]))
    for begin in range(0, len(targets), LOGIT_ROWS):
        tokens = slice(begin, begin + LOGIT_ROWS)
        following = targets[tokens]
        original, quantized, scratch = (buffer[: len(following)] for buffer in buffers)
        _logits(states[0][tokens], heads[0], original)
        _logits(states[1][tokens], heads[1], quantized)
        compare_logits(original, quantized, following, metrics[tokens], scratch)
        advance("logits")
    return metrics


def _check_same_model(original: Checkpoint, quantized: Checkpoint) -> None:
    first, second = original.config.llm, quantized.config.llm
    for name in ("num_layers", "hidden_size", "vocab_size"):
        if getattr(first, name) != getattr(second, name):
            raise VilaDeployError(
                f"{name} is {getattr(second, name)}, in {original.root} it is "
                f"{getattr(first, name)}",
                where=quantized.root,
                fix="compare a checkpoint with the one that it was quantized from",
            )


def _layer_error(index: int, models: Sequence[_Model], is_image: Tensor) -> LayerError:
    original, quantized = (model.states for model in models)
    errors = [
        relative_errors(original.load(chunk), quantized.load(chunk)) for chunk in original.chunks
    ]
    error = torch.cat(errors).cpu()
    return LayerError(index, _mean(error[~is_image]), _mean(error[is_image]))


def _mean(values: Tensor) -> float | None:
    return float(values.mean(dtype=torch.float64)) if len(values) else None


def _logits(rows: Tensor, head: Tensor, out: Tensor) -> Tensor:
    """Write float32 logits [rows, vocabulary] to `out`; the head is widened part by part."""
    for part, columns in zip(head.split(HEAD_ROWS), out.split(HEAD_ROWS, 1), strict=True):
        torch.mm(rows, part.to(rows.device).float().T, out=columns)
    return out
