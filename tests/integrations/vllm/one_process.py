"""vLLM within the test's process, and our reference following its answers token by token."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

from tests.support.openai_messages import as_openai
from tests.support.vllm_cases import questions
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.integrations.served_model import ServedModel
from vila_deploy.model.vila import ReferenceSession
from vila_deploy.processing.images import place_features
from vila_deploy.processing.multimodal_prompt import merge_embeddings
from vila_deploy.runtime.prompt import Message, prepare_prompt

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
    "VLLM_HOST_IP": "127.0.0.1", "VLLM_NO_USAGE_STATS": "1",
}  # fmt: skip
vllm = pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")
NEW_TOKENS = 24


def answers(served: ServedModel, case: str, dtype: str) -> list[Any]:
    """Return vLLM's answers to the questions of a case."""
    from vllm.distributed import cleanup_dist_env_and_memory

    layout = served.layout
    model = vllm.LLM(
        str(layout.root), tokenizer=str(layout.folder("llm")), config_format="vila",
        tokenizer_mode="vila", generation_config="vllm", dtype=dtype, enforce_eager=True,
        max_num_seqs=4, distributed_executor_backend="uni",
    )  # fmt: skip
    try:
        sampling = vllm.SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
        asked = [as_openai(messages) for messages in questions(case)]
        return model.chat(asked, sampling, use_tqdm=False)
    finally:
        del model
        cleanup_dist_env_and_memory()


def check_answers(served: ServedModel, case: str, found: list[Any], tolerance: float) -> None:
    """Check that our reference finds each token the likeliest.

    Args:
        tolerance: logits that are closer than this may change places.
    """
    session = ReferenceSession(open_checkpoint(served.layout.root, served.config))
    for messages, answer in zip(questions(case), found, strict=True):
        _check(session, served, messages, answer, tolerance)


def _check(
    session: ReferenceSession,
    served: ServedModel,
    asked: list[Message],
    answer: Any,
    tolerance: float,
) -> None:
    prompt = prepare_prompt(asked, served.info, served.tokenizer)
    assert len(answer.prompt_token_ids) == len(prompt)
    features = [
        place
        for image in prompt.images
        for place in place_features(
            session.encode_images(image.pixels.tiles, image.pixels.grid), image.pixels
        )
    ]
    session.truncate(0)
    logits = session.prefill(merge_embeddings(prompt.chunks, features, session.embed_tokens))
    tokens = list(answer.outputs[0].token_ids)
    for token in tokens:
        assert logits[token] >= np.max(logits) - tolerance
        logits = session.decode(token)
    assert len(tokens) == NEW_TOKENS or tokens[-1] in served.info.stop_token_ids
