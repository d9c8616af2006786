"""Embedded sequences with which a backend calibrates what it rounds while building."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vila_deploy.checkpoint.llm_config import EMBEDDING, LlmConfig
from vila_deploy.checkpoint.weight_source import WeightSource
from vila_deploy.utils.arrays import Floats

if TYPE_CHECKING:
    from vila_deploy.checkpoint import Checkpoint

SEQUENCES = 16
RANDOM_TOKENS = 256


def builtin_prompts(checkpoint: Checkpoint) -> list[Floats]:
    """Return embeddings [tokens, hidden] of built-in texts and conversations about images."""
    from vila_deploy.data.examples import load_examples
    from vila_deploy.eval.data import EvaluationData

    data = EvaluationData(checkpoint, load_examples(None, None), max_sequences=SEQUENCES)
    return [embeds.numpy() for embeds in data.embeds(checkpoint)]


def random_prompts(config: LlmConfig, llm: WeightSource) -> list[Floats]:
    """Return embeddings of one sequence of random tokens, for random weights."""
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=RANDOM_TOKENS)
    rows: Floats = llm.tensor(EMBEDDING)[tokens].float().numpy()
    return [rows]
