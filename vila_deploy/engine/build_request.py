"""What a backend is asked to build, and what it reports about the files that it wrote."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.engine.manifest import Limits, PendingStep
from vila_deploy.engine.precision import ALL_FP16, DefaultChoice, ModulePrecision
from vila_deploy.engine.target import Target
from vila_deploy.utils.arrays import Floats
from vila_deploy.utils.errors import VilaDeployError

DEFAULT_MAX_SEQ_LEN = 4096
# Models of videos take one of their own length by default, with its question and answer, unless
# that is longer than this.
DEFAULT_MAX_VIDEO_LEN, QUESTION_TOKENS, ROUNDED_TO = 16384, 512, 256


@dataclass(frozen=True)
class BuildRequest:
    """What an engine must be.

    Args:
        target: the device that it is for.
        limits: batch and lengths that it must take.
        tp: GPUs that share each layer.
        pp: pipeline stages, on `tp` GPUs each, that the layers are cut into.
        jetpack: release of JetPack on a Jetson; None means the target's usual one.
        module_precision: dtype of vision tower, output head and key/value cache.
        kernel_launch: a name in KERNEL_LAUNCHES, how the native backend's kernels follow each
            other; None means auto.
        activations: a name in ACTIVATIONS, of the 4-bit linears of backend onnxruntime; None where
            there are none, or another backend.
        defaults: why the backend's own choices are what they are, by option.
        gpu_layers: of backend llamacpp, on the GPU, the head counted as one; None: those that fit.
        prompts: returns embeddings [tokens, hidden] of sequences to calibrate with.
        random_weights: the weights are made up, so that errors measured with them mean nothing.
    """

    target: Target
    limits: Limits
    tp: int = 1
    pp: int = 1
    jetpack: str | None = None
    module_precision: ModulePrecision = ALL_FP16
    kernel_launch: str | None = None
    activations: str | None = None
    defaults: Mapping[str, str] = field(default_factory=dict)
    gpu_layers: int | None = None
    prompts: Callable[[], Sequence[Floats]] | None = field(default=None, compare=False)
    random_weights: bool = False

    @property
    def gpus(self) -> int:
        return self.tp * self.pp


@dataclass(frozen=True)
class BuildResult:
    """What the manifest records about the files that a backend wrote.

    Args:
        weight_bytes_per_token: bytes of weights that one decoding step reads.
        versions: of the tools that made them.
        pending_steps: steps left for the device; empty when the engine is complete.
        chosen: dtypes that only building could decide, by field of ModulePrecision; each was one
            of the request's `defaults`.
    """

    weight_bytes_per_token: int
    versions: Mapping[str, str]
    pending_steps: tuple[PendingStep, ...] = ()
    chosen: Mapping[str, DefaultChoice] = field(default_factory=dict)


def default_max_seq_len(config: VilaConfig) -> int:
    """Return 4096 tokens, or what a video of the model's own frames needs, within reason."""
    needed = video_seq_len(config)
    return max(DEFAULT_MAX_SEQ_LEN, needed if needed <= DEFAULT_MAX_VIDEO_LEN else 0)


def video_seq_len(config: VilaConfig) -> int:
    """Return the sequence that a video of the model's own frames needs, question and answer too."""
    return math.ceil((config.tokens_per_video + QUESTION_TOKENS) / ROUNDED_TO) * ROUNDED_TO


def resolve_limits(
    config: VilaConfig,
    max_batch_size: int = 1,
    max_input_len: int | None = None,
    max_seq_len: int | None = None,
) -> Limits:
    """Return an engine's limits; None means the length it was tuned on, at most the default.

    Raises:
        VilaDeployError: longer than the model's positions, or a prompt longer than the sequence.
    """
    longest = config.llm.max_position_embeddings
    tuned = min(config.model_max_length, longest)
    max_seq_len = max_seq_len or min(tuned, default_max_seq_len(config))
    if max_seq_len > longest:
        raise VilaDeployError(
            f"--max-seq-len {max_seq_len} is more than the model's {longest}",
            fix=f"use {longest} or less",
        )
    max_input_len = max_input_len or max_seq_len
    if max_input_len > max_seq_len:
        raise VilaDeployError(
            f"--max-input-len {max_input_len} is more than --max-seq-len {max_seq_len}",
            fix="the prompt is part of the sequence: raise --max-seq-len",
        )
    return Limits(max_batch_size, max_input_len, max_seq_len)
