"""The session over TensorRT-LLM's executor, with a module in its place that acts as it does."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.trtllm_executor import Engine, FakeExecutor, make_api
from vila_deploy.backends.tensorrt_llm import executor, files, session, vision_engine
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
# Padding of the vocabulary has no weights.
HEAD[VOCABULARY:] = 0
# Release of the stand-in, target and GPUs.
KINDS = {"Orin": ("0.12", "orin", 1), "one GPU": ("1.2", "a100", 1), "2 GPUs": ("1.2", "a100", 2)}


def expected_logits(embeds: np.ndarray) -> np.ndarray:
    """What the stand-in computes: it depends on every token and on their order."""
    weights = 0.8 ** np.arange(len(embeds))[::-1]
    hidden = (embeds.astype(np.float32) * weights[:, None]).sum(0)
    return (HEAD @ torch.tensor(hidden, dtype=torch.float32)).numpy()[:VOCABULARY]


class FakeVision:
    @staticmethod
    def from_serialized_engine(engine: Any) -> FakeVision:
        assert bytes(memoryview(engine)) == b"vision engine"
        return FakeVision()

    def infer_shapes(self, infos):
        (info,) = infos
        assert (info.name, info.dtype) == ("input", "HALF")
        assert info.shape[0] <= 4
        return [SimpleNamespace(shape=(info.shape[0], 2, HIDDEN))]

    def run(self, inputs, outputs, stream) -> bool:
        assert stream == 77
        means = inputs["input"].float().mean((1, 2, 3))
        ((name, output),) = outputs.items()
        assert name in ("output", "encoder_output")
        output[:] = means[:, None, None]
        return True


def open_session(folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> Any:
    """A session over the stand-in, with what the stand-in was asked as `session.api`."""
    release, target, ranks = KINDS[kind]
    api = make_api(release, Engine(TABLE, HEAD, MAX_INPUT, MAX_SEQ))
    runtime = SimpleNamespace(
        Session=FakeVision,
        TensorInfo=lambda name, dtype, shape: SimpleNamespace(name=name, dtype=dtype, shape=shape),
    )
    utils = SimpleNamespace(str_dtype_to_trt={"float16": "HALF"}.get)
    worker = folder / "tensorrt_llm" / "bin" / "executorWorker"
    worker.parent.mkdir(parents=True)
    worker.touch()
    package = SimpleNamespace(
        runtime=runtime, _utils=utils, __file__=str(worker.parent.parent / "__init__.py")
    )
    monkeypatch.setattr(session, "import_tensorrt_llm", lambda: (package, api, torch))
    for module in (executor, vision_engine):
        monkeypatch.setattr(module, "DEVICE", "cpu")
    stream = SimpleNamespace(cuda_stream=77, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda handle: handle)
    monkeypatch.setattr(torch.cuda, "stream", lambda handle: nullcontext())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    (folder / "llm").mkdir()
    (folder / "vision").mkdir()
    config = {"pretrained_config": {"mapping": {"world_size": ranks}, "vocab_size": PADDED}}
    (folder / "llm" / "config.json").write_text(json.dumps(config))
    name = "visual_encoder.engine" if target == "orin" else "model.engine"
    (folder / "vision" / name).write_bytes(b"vision engine")
    np.save(folder / files.EMBEDDING, TABLE)
    model = SimpleNamespace(vocab_size=VOCABULARY, stop_token_ids=(STOP,), hidden_size=HIDDEN)
    assert set(vars(model)) <= set(ModelInfo.__dataclass_fields__)
    manifest = SimpleNamespace(model=model, limits=Limits(1, MAX_INPUT, MAX_SEQ), target=target)
    opened = session.TensorrtLlmSession(folder, manifest)
    opened.api = api
    return opened


@pytest.fixture(params=KINDS)
def opened(request, tmp_path, monkeypatch):
    one = open_session(tmp_path, monkeypatch, request.param)
    yield one
    one.close()


def fake(opened: Any) -> FakeExecutor:
    return opened.api.executors[-1]


def test_logits_are_the_models_step_by_step(opened):
    embeds = RANDOM.standard_normal((5, HIDDEN)).astype(np.float16).astype(np.float32)
    np.testing.assert_allclose(opened.prefill(embeds), expected_logits(embeds), rtol=1e-5)
    for position, token in enumerate((3, 49, 0, 12), 6):
        embeds = np.concatenate([embeds, opened.embed_tokens([token])])
        found = opened.decode(token)
        assert opened.position == position
        np.testing.assert_allclose(found, expected_logits(embeds), rtol=1e-5, atol=1e-6)
    request = fake(opened).requests[0]
    length = getattr(request, "max_tokens", None) or request.max_new_tokens
    assert (length, request.sampling_config.top_k, request.end_id) == (15, 1, -1)


def test_one_request_answers_as_long_as_the_most_likely_token_is_taken(opened):
    """And on one GPU whatever token is taken."""
    one_gpu = fake(opened).ranks == 1
    logits = opened.prefill(TABLE[[1, 2]].astype(np.float32))
    for _ in range(5):
        logits = opened.decode(int(logits.argmax()))
    assert len(fake(opened).requests) == 1
    opened.decode(int(logits.argmin()))
    assert len(fake(opened).requests) == (1 if one_gpu else 2)


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


def test_a_beginning_is_kept(opened):
    """Of a prompt and of decoded tokens; keeping all does not end the generation."""
    prompt = TABLE[[1, 2, 3]].astype(np.float32)
    session = OneSlot(opened)
    session.prefill(0, prompt)
    session.decode([0], [5])
    count = len(fake(opened).requests)
    session.keep(0, 4)
    assert len(fake(opened).requests) == count
    for kept, token in ((4, 7), (2, 9), (1, 11)):
        session.keep(0, kept)
        whole = np.concatenate([TABLE[[1, 2, 3, 5]][:kept], TABLE[[token]]]).astype(np.float32)
        (found,) = session.decode([0], [token])
        np.testing.assert_allclose(found, expected_logits(whole), rtol=1e-5, atol=1e-6)
        assert session.length(0) == kept + 1
    session.keep(0, 0)
    np.testing.assert_allclose(session.prefill(0, prompt), expected_logits(prompt), rtol=1e-5)


def test_the_cache_is_reused_for_the_same_prompt_only(opened):
    """Rows of two prompts have the same ids; the stand-in takes a cached row by id and extra id."""
    prompts = RANDOM.standard_normal((2, 6, HIDDEN)).astype(np.float16).astype(np.float32)
    for prompt in (prompts[0], prompts[1], prompts[0]):
        opened.truncate(0)
        np.testing.assert_allclose(opened.prefill(prompt), expected_logits(prompt), rtol=1e-4)
    reuses = fake(opened).release != "0.12"
    assert fake(opened).passes[:3] == [6, 6, 0 if reuses else 6]
    assert fake(opened).config.kv_cache_config.max_tokens == MAX_SEQ


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
    assert opened.position == 0

    def fail(self, *args, **kwargs):
        raise RuntimeError("CUDA error: out of memory\nmore")

    with monkeypatch.context() as broken:
        broken.setattr(Engine, "logits", fail)
        with pytest.raises(VilaDeployError, match=r"failed \(CUDA error: out of memory\); build"):
            opened.prefill(np.zeros((3, HIDDEN), np.float32))
    assert opened.position == 0
    assert opened.prefill(TABLE[[1]].astype(np.float32)).shape == (VOCABULARY,)


def test_a_long_answer_goes_on_behind_the_longest_prompt(opened):
    """In the releases that take prompts in chunks; in 0.12 where no request begins again."""
    logits = opened.prefill(TABLE[[1, 2]].astype(np.float32))
    taken = [1, 2]
    while opened.position < opened.max_seq_len:
        taken.append(int(logits.argsort()[-2]))
        logits = opened.decode(taken[-1])
        expected = expected_logits(TABLE[taken])
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    assert opened.position > MAX_INPUT


def test_orins_engine_is_mapped_and_runs_with_its_own_names(tmp_path, monkeypatch):
    opened = open_session(tmp_path, monkeypatch, "Orin")
    assert fake(opened).arguments == {"use_mmap": True}
    knobs = fake(opened).config.extended_runtime_perf_knob_config
    assert knobs.multi_block_mode is True
    opened.close()


def test_several_gpus_are_asked_from_one_process(tmp_path, monkeypatch):
    opened = open_session(tmp_path, monkeypatch, "2 GPUs")
    assert fake(opened).config.gather_generation_logits is True
    fake(opened).engine.stops_after_first_pass = True
    opened.prefill(TABLE[[1]].astype(np.float32))
    opened.close()
    assert fake(opened).cancelled == {0}


def test_why_several_gpus_cannot_be_asked_is_one_line(tmp_path, monkeypatch):
    worker = tmp_path / "executorWorker"
    two = SimpleNamespace(cuda=SimpleNamespace(device_count=lambda: 2))
    with pytest.raises(VilaDeployError, match="was built for 4 GPUs, 2 are here; run it where"):
        executor.check_workers(two, worker, 4)
    with pytest.raises(VilaDeployError, match="which runs each GPU, is not here; install NVIDIA"):
        executor.check_workers(two, worker, 2)
    worker.touch()
    executor.check_workers(two, worker, 2)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(VilaDeployError, match=r"several processes .*; start it without mpirun"):
        executor.check_workers(two, worker, 2)


def test_an_executor_that_does_not_open_is_one_line(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("[TensorRT-LLM][ERROR] Assertion failed: no memory\nstack")

    monkeypatch.setattr(FakeExecutor, "__init__", fail)
    with pytest.raises(VilaDeployError, match=r"can't open it \(\[Tens.* no memory\); close other"):
        open_session(tmp_path, monkeypatch, "one GPU")


def test_without_tensorrt_llm_one_line_says_so():
    with pytest.raises(VilaDeployError, match=r"can't be loaded \(No module named 'tensorrt_llm"):
        session.import_tensorrt_llm()


PROGRAM = """
import json, os, sys
from pathlib import Path
folder = Path(sys.argv[1])
sys.path.insert(0, str(folder / "packages"))
from vila_deploy.backends.tensorrt_llm import session
class Quiet:
    def __init__(self, *arguments):
        os.write(1, b"[TensorRT-LLM][INFO] from C++\\n")
    def close(self):
        pass
session.LlmExecutor = session.VisionEngine = Quiet
from types import SimpleNamespace
limits = SimpleNamespace(max_seq_len=8, max_input_len=4)
model = SimpleNamespace(vocab_size=4, hidden_size=2)
manifest = SimpleNamespace(limits=limits, model=model, target="a100")
opened = session.TensorrtLlmSession(folder, manifest)
print(json.dumps({"text": "an answer"}))
opened.close()
"""


def test_what_it_prints_stays_out_of_answers(tmp_path):
    """As the real package does when it is imported, and its C++ code at any time."""
    package = tmp_path / "packages" / "tensorrt_llm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('print("[TensorRT-LLM] TensorRT LLM version: 1.2.1")')
    (package / "bindings.py").write_text("executor = None")
    (package.parent / "torch.py").touch()
    (package / "_utils.py").touch()
    (package / "runtime.py").touch()
    (tmp_path / "llm").mkdir()
    config = {"pretrained_config": {"mapping": {"world_size": 1}, "vocab_size": 64}}
    (tmp_path / "llm" / "config.json").write_text(json.dumps(config))
    np.save(tmp_path / files.EMBEDDING, TABLE)
    done = subprocess.run([sys.executable, "-c", PROGRAM, tmp_path], capture_output=True, text=True)
    assert json.loads(done.stdout) == {"text": "an answer"}, done.stderr
    assert "TensorRT LLM version: 1.2.1" in done.stderr
    assert "from C++" in done.stderr


# Packages that TensorRT-LLM pins to older versions, or that its environment lacks.
LEFT_OUT = ("transformers", "onnxruntime", "triton", "accelerate", "sentencepiece")
CLOSURE = """
import sys
class LeftOut:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {left_out}:
            raise ImportError(f"{{name}} was imported")
sys.meta_path.insert(0, LeftOut())
import vila_deploy.backends.tensorrt_llm.build, vila_deploy.backends.tensorrt_llm.session
import vila_deploy.builder.finish, vila_deploy.cli.build_engine, vila_deploy.cli.chat
import vila_deploy.runtime.generate, vila_deploy.runtime.open_engine
"""


def test_finishing_and_asking_import_nothing_that_tensorrt_llm_pins():
    program = CLOSURE.format(left_out=LEFT_OUT)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
