"""Every kind of model under vLLM in float32, token for token as our reference answers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.openai_messages import as_openai
from tests.support.tiny import make_checkpoint
from tests.support.vllm_cases import CASES, questions
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.integrations.vllm.served_model import ServedModel, read_served_model
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
# Logits that are closer than this may change places between two orders of summation.
NEAR_TIE = 1e-3


@pytest.fixture(params=CASES)
def served(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, ServedModel]:
    folder = make_checkpoint(tmp_path / "c", **CASES[request.param])
    return request.param, read_served_model(folder)


@pytest.fixture
def model(served: tuple[str, ServedModel]) -> Iterator[Any]:
    from vllm.distributed import cleanup_dist_env_and_memory

    root = served[1].layout.root
    loaded = vllm.LLM(
        str(root), tokenizer=str(root / "llm"), config_format="vila", tokenizer_mode="vila",
        generation_config="vllm", dtype="float32", enforce_eager=True, max_num_seqs=4,
        distributed_executor_backend="uni",
    )  # fmt: skip
    yield loaded
    del loaded
    cleanup_dist_env_and_memory()


def test_answers_equal_the_reference(served: tuple[str, ServedModel], model: Any) -> None:
    case, info = served
    asked = questions(case)
    sampling = vllm.SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
    answers = model.chat([as_openai(messages) for messages in asked], sampling, use_tqdm=False)
    session = ReferenceSession(open_checkpoint(info.layout.root, info.config))
    for messages, answer in zip(asked, answers, strict=True):
        check(session, info, messages, answer)


def check(
    session: ReferenceSession, served: ServedModel, asked: list[Message], answer: Any
) -> None:
    """Follow the answer with our reference, which must find each of its tokens the likeliest."""
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
        assert logits[token] >= np.max(logits) - NEAR_TIE
        logits = session.decode(token)
    assert len(tokens) == NEW_TOKENS or tokens[-1] in served.info.stop_token_ids
