"""The input tensors with which Triton's backend for TensorRT-LLM answers a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vila_deploy.backends.tensorrt_llm.sequence import PromptSequence
from vila_deploy.engine.sampling import SamplingParams

PAD_ID = 0


def llm_inputs(
    sequence: PromptSequence, sampling: SamplingParams, max_tokens: int, stops: Sequence[int]
) -> dict[str, NDArray[Any]]:
    """Return the tensors of a request, each with a batch of one.

    Args:
        sequence: the prompt; its table holds the embeddings of images.
        max_tokens: to generate at most.
        stops: tokens that end an answer.
    """
    greedy = sampling.temperature == 0
    values: dict[str, Any] = {
        "input_ids": np.array([sequence.ids], np.int32),
        "input_lengths": np.int32(len(sequence)),
        "request_output_len": np.int32(max_tokens),
        "pad_id": np.int32(PAD_ID),
        "runtime_top_k": np.int32(1 if greedy else sampling.top_k),
        "streaming": np.bool_(True),
    }
    if stops:
        # Words of one token: all tokens, then where each word ends.
        ends = range(1, len(stops) + 1)
        values["end_id"] = np.int32(stops[0])
        values["stop_words_list"] = np.array([[stops, ends]], np.int32)
    if not greedy:
        values["temperature"] = np.float32(sampling.temperature)
        values["runtime_top_p"] = np.float32(sampling.top_p)
        if sampling.seed is not None:
            values["seed"] = np.uint64(sampling.seed)
    if len(sequence.table):
        values["prompt_embedding_table"] = sequence.table[None]
        values["prompt_vocab_size"] = np.int32(len(sequence.table))
        # Without them requests about other images would find this one's blocks in the cache.
        values["prompt_table_extra_ids"] = np.array([sequence.extra_ids], np.uint64)
    return {
        name: value if isinstance(value, np.ndarray) else np.array([[value]], value.dtype)
        for name, value in values.items()
    }
