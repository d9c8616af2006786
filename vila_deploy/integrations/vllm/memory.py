"""Memory of each process that vLLM starts, from the configs alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.engine.memory import MemoryRow, Storage, weight_items
from vila_deploy.engine.precision import ALL_FP16
from vila_deploy.formats.module_dtypes import FP16, INT4
from vila_deploy.integrations.vllm.parallel import Parallel

MATRICES = (MemoryRow.DECODER_LINEARS, MemoryRow.NORMS)
GROUPED = Storage(zero_bits=4)


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one process: of the weights that it has, and of a token in its cache.

    Args:
        layers: decoder layers of its pipeline stage.
        vision_bytes: of tower and projector, which each rank of the first stage has whole.
    """

    stage: int
    layers: int
    llm_bytes: int
    vision_bytes: int
    cache_bytes_per_token: int


def rank_memory(config: VilaConfig, parallel: Parallel) -> list[RankMemory]:
    """Return what a rank of each pipeline stage holds; ranks of one stage hold the same."""
    return list(_stages(config, parallel))


def _stages(config: VilaConfig, parallel: Parallel) -> Iterator[RankMemory]:
    llm = config.llm
    precision = FP16 if llm.quantization is None else INT4
    items = weight_items(config, precision, GROUPED, ALL_FP16)
    decoder = sum(items[row].bytes for row in MATRICES) / llm.num_layers
    vision = items[MemoryRow.VISION].bytes + items[MemoryRow.PROJECTOR].bytes
    kv_heads = math.ceil(llm.num_kv_heads / parallel.tensor)
    for stage in range(parallel.pipeline):
        first, last = stage == 0, stage == parallel.pipeline - 1
        layers = _layers_of(stage, llm.num_layers, parallel.pipeline)
        weights = layers * decoder
        if first or (last and llm.tie_word_embeddings):
            weights += items[MemoryRow.EMBEDDINGS].bytes
        if last and not llm.tie_word_embeddings:
            weights += items[MemoryRow.HEAD].bytes
        yield RankMemory(
            stage=stage,
            layers=layers,
            llm_bytes=int(weights / parallel.tensor),
            vision_bytes=vision if first else 0,
            cache_bytes_per_token=2 * layers * kv_heads * llm.head_dim * 2,
        )


def _layers_of(stage: int, layers: int, stages: int) -> int:
    """Return how many layers vLLM gives a stage: what is left over goes to all but the last.

    Source: `get_pp_indices` in vllm/distributed/utils.py.
    """
    counts = [layers // stages] * stages
    for index in range(2, layers % stages + 2):
        counts[-index] += 1
    return counts[stage]
