"""Triton repositories around TensorRT-LLM's engines, and what its backend is sent."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from tests.support.paths import TINY_VILA
from vila_deploy import SamplingParams, build_engine
from vila_deploy.backends.tensorrt_llm.sequence import PromptSequence
from vila_deploy.engine.manifest import Limits, Manifest, read_manifest
from vila_deploy.integrations.triton.repository import write_models
from vila_deploy.integrations.triton.trtllm_request import llm_inputs


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    out = tmp_path_factory.mktemp("engine") / "tiny"
    build_engine(TINY_VILA, out, target="cpu", precision="fp16")
    made = read_manifest(out)
    return dataclasses.replace(made, backend="tensorrt-llm", limits=Limits(4, 512, 1024))


def test_the_llm_gets_a_model_of_its_own(manifest: Manifest, tmp_path: Path) -> None:
    write_models(Path("/e"), dataclasses.replace(manifest, target="a100"), tmp_path, 8)
    assert "trtllm_model import" in (tmp_path / "vila" / "1" / "model.py").read_text()
    llm = (tmp_path / "tensorrt_llm" / "config.pbtxt").read_text()
    assert 'backend: "tensorrtllm"\nmax_batch_size: 4\n' in llm
    assert '"gpt_model_path" value: { string_value: "/e/llm" }' in llm
    assert '"max_tokens_in_paged_kv_cache" value: { string_value: "4096" }' in llm
    assert list((tmp_path / "tensorrt_llm" / "1").iterdir()) == []


def test_a_jetson_has_our_scheduler(manifest: Manifest, tmp_path: Path) -> None:
    write_models(Path("/e"), dataclasses.replace(manifest, target="orin"), tmp_path, 8)
    assert [path.name for path in tmp_path.iterdir()] == ["vila"]
    assert "python_model import" in (tmp_path / "vila" / "1" / "model.py").read_text()


def sequence(images: int) -> PromptSequence:
    made = PromptSequence(100, hidden_size=2)
    made.ids += (1, 5)
    for index in range(images):
        made.append_embeds(np.full((2, 2), index, np.float32))
        made.ids += (7,)
    return made


def test_greedy_with_an_image() -> None:
    found = llm_inputs(sequence(1), SamplingParams(), 9, [2, 3])
    assert found["input_ids"].tolist() == [[1, 5, 100, 101, 7]]
    assert found["input_lengths"].tolist() == [[5]]
    assert found["request_output_len"].tolist() == [[9]]
    assert found["runtime_top_k"].tolist() == [[1]]
    assert found["stop_words_list"].tolist() == [[[2, 3], [1, 2]]]
    assert found["prompt_embedding_table"].shape == (1, 2, 2)
    assert found["prompt_vocab_size"].tolist() == [[2]]
    assert [bool(value) for value in found["prompt_table_extra_ids"][0]] == [0, 0, 1, 1, 0]
    assert "temperature" not in found


def test_drawn_without_an_image() -> None:
    sampling = SamplingParams(temperature=0.5, top_p=0.9, top_k=4, seed=3)
    found = llm_inputs(sequence(0), sampling, 9, [])
    assert found["runtime_top_k"].tolist() == [[4]]
    assert found["temperature"].dtype == np.float32
    assert found["seed"].tolist() == [[3]]
    assert found["seed"].dtype == np.uint64
    assert not {"end_id", "stop_words_list", "prompt_embedding_table"} & found.keys()


def test_images_of_the_same_shape_differ_in_the_cache() -> None:
    first, second = sequence(1), sequence(2)
    assert first.extra_ids[2] != second.extra_ids[5]
