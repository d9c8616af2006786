"""The session over TensorRT-LLM's runtime, with a module in its place that acts as it does.

The stand-in's loop is ordered as `GenerationSession.handle_per_step` is: logits, logits processor,
sampler, stopping criteria, next pass; it refuses what `ModelRunner.generate` refuses.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vila_deploy.backends.tensorrt_llm import files, session
from vila_deploy.engine.manifest import Limits
from vila_deploy.engine.model_info import ModelInfo
from vila_deploy.engine.sampling import SamplingParams, sample
from vila_deploy.engine.session import OneSlot
from vila_deploy.runtime.generate import generate
from vila_deploy.utils.errors import VilaDeployError

VOCABULARY, PADDED, HIDDEN, STOP = 50, 64, 16, 7
MAX_INPUT, MAX_SEQ = 12, 20
RANDOM = np.random.default_rng(0)
TABLE = RANDOM.standard_normal((VOCABULARY, HIDDEN)).astype(np.float16)
HEAD = torch.tensor(RANDOM.standard_normal((PADDED, HIDDEN)), dtype=torch.float32)


def expected_logits(embeds: np.ndarray) -> np.ndarray:
    """What the stand-in computes: it depends on every token and on their order."""
    weights = 0.8 ** np.arange(len(embeds))[::-1]
    hidden = (embeds.astype(np.float32) * weights[:, None]).sum(0)
    return (HEAD @ torch.tensor(hidden, dtype=torch.float32)).numpy()[:VOCABULARY]


class FakeRunner:
    """ModelRunner, and the calls that it got."""

    vocab_size = PADDED
    calls: list[dict[str, Any]]

    @classmethod
    def from_dir(cls, engine_dir: str, *, rank: int = 0, stream: Any = None) -> FakeRunner:
        assert Path(engine_dir).name == files.LLM
        runner = cls()
        runner.calls, runner.steps, runner.threads = [], 0, set()
        FakeRunner.last = runner
        return runner

    def generate(
        self, batch_input_ids, sampling_config=None, prompt_table=None, prompt_tasks=None,
        lora_uids=None, streaming=False, stopping_criteria=None, logits_processor=None,
        medusa_choices=None, **kwargs,
    ):  # fmt: skip
        assert not kwargs
        self.calls.append({"sampling": sampling_config, "tasks": prompt_tasks})
        (ids,) = batch_input_ids
        assert ids.dtype == torch.int32
        if len(ids) > MAX_INPUT:
            raise RuntimeError(f"Maximum input length ({len(ids)}) exceeds the engine")
        if len(ids) + sampling_config.max_new_tokens > MAX_SEQ:
            raise RuntimeError("Maximum input length + maximum new tokens exceeds the engine")
        _, rows, hidden = prompt_table.shape
        assert hidden == HIDDEN
        assert int(ids.max()) - PADDED < rows
        embeds = [prompt_table[0, i - PADDED] if i >= PADDED else TABLE[i] for i in ids.tolist()]
        buffer = torch.empty(1, PADDED)
        for step in range(sampling_config.max_new_tokens):
            self.steps += 1
            weights = 0.8 ** torch.arange(len(embeds)).flip(0)
            stacked = torch.stack([torch.as_tensor(e).float() for e in embeds])
            buffer[0] = HEAD @ (stacked * weights[:, None]).sum(0)
            logits = logits_processor(step, torch.zeros(1, 1), buffer)
            assert logits.data_ptr() == buffer.data_ptr()  # the engine is bound to this address
            token = int(logits[0].argmax())
            if token == sampling_config.end_id or stopping_criteria(step, None, logits):
                return
            embeds.append(TABLE[token])


class FakeVision:
    @staticmethod
    def from_serialized_engine(engine: bytes) -> FakeVision:
        assert engine == b"vision engine"
        return FakeVision()

    def infer_shapes(self, infos):
        (info,) = infos
        assert (info.name, info.dtype) == ("input", "HALF")
        assert info.shape[0] <= 4
        return [SimpleNamespace(name="encoder_output", shape=(info.shape[0], 2, HIDDEN))]

    def run(self, inputs, outputs, stream) -> bool:
        assert stream == 77
        means = inputs["input"].float().mean((1, 2, 3))
        outputs["encoder_output"][:] = means[:, None, None]
        return True


@pytest.fixture
def opened(tmp_path, monkeypatch):
    runtime = SimpleNamespace(
        ModelRunner=FakeRunner,
        Session=FakeVision,
        TensorInfo=lambda name, dtype, shape: SimpleNamespace(name=name, dtype=dtype, shape=shape),
        SamplingConfig=SimpleNamespace,
    )
    utils = SimpleNamespace(str_dtype_to_trt={"float16": "HALF"}.get)
    stream = SimpleNamespace(cuda_stream=77, synchronize=lambda: None)
    monkeypatch.setattr(
        session, "_import", lambda: (SimpleNamespace(runtime=runtime, _utils=utils), torch)
    )
    monkeypatch.setattr(session.Runtime, "device", "cpu")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    (tmp_path / "llm").mkdir()
    (tmp_path / "vision").mkdir()
    config = {"pretrained_config": {"mapping": {"world_size": 1}}}
    (tmp_path / "llm" / "config.json").write_text(json.dumps(config))
    (tmp_path / "vision" / "model.engine").write_bytes(b"vision engine")
    np.save(tmp_path / files.EMBEDDING, TABLE)
    model = SimpleNamespace(vocab_size=VOCABULARY, stop_token_ids=(STOP,))
    assert {"vocab_size", "stop_token_ids"} <= set(ModelInfo.__dataclass_fields__)
    limits = Limits(1, MAX_INPUT, MAX_SEQ)
    manifest = SimpleNamespace(model=model, limits=limits, target="a100")
    one = session.TensorrtLlmSession(tmp_path, manifest)
    yield one
    one.close()


def test_logits_are_the_models_step_by_step(opened):
    embeds = RANDOM.standard_normal((5, HIDDEN)).astype(np.float16).astype(np.float32)
    np.testing.assert_allclose(opened.prefill(embeds), expected_logits(embeds), rtol=1e-5)
    for position, token in enumerate((3, 49, 0, 12), 6):
        embeds = np.concatenate([embeds, opened.embed_tokens([token])])
        found = opened.decode(token)
        assert opened.position == position
        np.testing.assert_allclose(found, expected_logits(embeds), rtol=1e-5, atol=1e-6)
    (call,) = FakeRunner.last.calls
    assert FakeRunner.last.steps == 5
    sampling = call["sampling"]
    assert call["tasks"] == "0"
    assert (sampling.max_new_tokens, sampling.top_k, sampling.min_length) == (15, 1, 0)
    assert sampling.end_id == sampling.pad_id == STOP


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_the_one_generation_loop_runs_over_it(opened, temperature):
    sampling = SamplingParams(max_new_tokens=40, temperature=temperature, seed=3)
    prompt = TABLE[[1, 2, 3, 4]].astype(np.float32)
    first = list(generate(OneSlot(opened), prompt, {STOP}, sampling))
    assert len(first) > 1
    embeds, random = prompt, np.random.default_rng(3)
    for token in first:
        assert token == sample(expected_logits(embeds), sampling, random)
        embeds = np.concatenate([embeds, TABLE[[token]]])
    assert first[-1] == STOP or len(first) == opened.max_seq_len - len(prompt) + 1
    assert list(generate(OneSlot(opened), prompt, {STOP}, sampling)) == first


def test_an_end_token_in_the_middle_starts_again(opened):
    prompt = TABLE[[1, 2]].astype(np.float32)
    opened.prefill(prompt)
    for token in (STOP, 9):
        prompt = np.concatenate([prompt, TABLE[[token]]])
        found = opened.decode(token)
        np.testing.assert_allclose(found, expected_logits(prompt), rtol=1e-5, atol=1e-6)
    assert len(FakeRunner.last.calls) == 2
    assert opened.position == 4


def test_a_beginning_is_kept(opened):
    """Of a prompt and of decoded tokens; keeping all does not end the generation."""
    prompt = TABLE[[1, 2, 3]].astype(np.float32)
    session = OneSlot(opened)
    session.prefill(0, prompt)
    session.decode([0], [5])
    session.keep(0, 4)
    assert len(FakeRunner.last.calls) == 1
    for kept, token in ((4, 7), (2, 9), (1, 11)):
        session.keep(0, kept)
        whole = np.concatenate([TABLE[[1, 2, 3, 5]][:kept], TABLE[[token]]]).astype(np.float32)
        (found,) = session.decode([0], [token])
        np.testing.assert_allclose(found, expected_logits(whole), rtol=1e-5, atol=1e-6)
        assert session.length(0) == kept + 1
    session.keep(0, 0)
    np.testing.assert_allclose(session.prefill(0, prompt), expected_logits(prompt), rtol=1e-5)


def test_more_prompt_and_pictures_between(opened):
    prompt = TABLE[[1, 2]].astype(np.float32)
    opened.prefill(prompt)
    opened.decode(5)
    pixels = np.ones((6, 3, 4, 4), np.float32) * np.arange(6)[:, None, None, None]
    features = opened.encode_images(pixels.astype(np.float32))
    assert features.shape == (6, 2, HIDDEN)
    assert features[:, 0, 0].tolist() == list(range(6))
    more = features[3]
    found = opened.prefill(more)
    whole = np.concatenate([prompt, TABLE[[5]], more])
    np.testing.assert_allclose(found, expected_logits(whole), rtol=1e-3)
    assert opened.position == 5
    opened.truncate(0)
    np.testing.assert_allclose(opened.prefill(prompt), expected_logits(prompt), rtol=1e-5)


def test_room_and_failures_are_one_line(opened, monkeypatch):
    with pytest.raises(VilaDeployError, match="the prompt is empty"):
        OneSlot(opened).prefill(0, np.empty((0, HIDDEN), np.float32))
    with pytest.raises(VilaDeployError, match=r"20 tokens don't fit into the 19 positions"):
        OneSlot(opened).prefill(0, np.zeros((20, HIDDEN), np.float32))
    with pytest.raises(VilaDeployError, match="13 tokens are more than the 12 that this engine"):
        opened.prefill(np.zeros((13, HIDDEN), np.float32))

    def fail(self, *args, **kwargs):
        raise RuntimeError("CUDA error: out of memory\nmore")

    with monkeypatch.context() as broken:
        broken.setattr(FakeRunner, "generate", fail)
        with pytest.raises(VilaDeployError, match=r"failed \(CUDA error: out of memory\); build"):
            opened.prefill(np.zeros((3, HIDDEN), np.float32))
    opened.truncate(0)
    assert opened.prefill(TABLE[[1]].astype(np.float32)).shape == (VOCABULARY,)


def test_several_gpus_are_left_to_its_own_runner(tmp_path):
    (tmp_path / "llm").mkdir()
    config = {"pretrained_config": {"mapping": {"world_size": 4}}}
    (tmp_path / "llm" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        VilaDeployError, match=r"built for 4 GPUs.*without --tp and --pp.*mpirun -n 4"
    ):
        session.TensorrtLlmSession(tmp_path, SimpleNamespace())


def test_without_tensorrt_llm_one_line_says_so():
    with pytest.raises(VilaDeployError, match=r"can't be loaded \(No module named 'tensorrt_llm"):
        session._import()


PROGRAM = """
import json, os, sys
from pathlib import Path
folder = Path(sys.argv[1])
sys.path.insert(0, str(folder / "packages"))
from vila_deploy.backends.tensorrt_llm import session
class Quiet:
    def __init__(self, folder, manifest):
        session._import()
        os.write(1, b"[TensorRT-LLM][INFO] from C++\\n")
session.Runtime = Quiet
from types import SimpleNamespace
limits = SimpleNamespace(max_seq_len=8, max_input_len=4)
manifest = SimpleNamespace(limits=limits, model=SimpleNamespace(vocab_size=4))
opened = session.TensorrtLlmSession(folder, manifest)
print(json.dumps({"text": "an answer"}))
opened.close()
"""


def test_what_it_prints_stays_out_of_answers(tmp_path):
    """As the real package does when it is imported, and its C++ code at any time."""
    package = tmp_path / "packages" / "tensorrt_llm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('print("[TensorRT-LLM] TensorRT LLM version: 1.2.1")')
    (package / "_utils.py").touch()
    (package / "runtime.py").touch()
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "config.json").write_text("{}")
    np.save(tmp_path / files.EMBEDDING, TABLE)
    done = subprocess.run([sys.executable, "-c", PROGRAM, tmp_path], capture_output=True, text=True)
    assert json.loads(done.stdout) == {"text": "an answer"}, done.stderr
    assert "TensorRT LLM version: 1.2.1" in done.stderr
    assert "from C++" in done.stderr
