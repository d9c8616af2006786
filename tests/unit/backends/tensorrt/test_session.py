"""The graphs for TensorRT on onnxruntime, through the real Session, against the reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.support import fake_tensorrt
from tests.support.session_contract import check_session
from tests.support.tensorrt_cases import DIALECTS, write_engine
from tests.support.tiny import make_checkpoint
from vila_deploy.backends.tensorrt import compilers, cuda, decoder, files, open_session
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.engine.session import OneSlot
from vila_deploy.engine.target import get_target
from vila_deploy.formats.base import SYMMETRIC_ZERO
from vila_deploy.model.vila import ReferenceSession
from vila_deploy.utils.errors import VilaDeployError

# Of the logits' spread; float16 arithmetic of these sizes differs by 1e-3 to 5e-3.
TOLERANCE = 1e-2


class Symmetric:
    """A 4-bit WeightSource whose zero points are all 8."""

    def __init__(self, source: Any):
        self.tensor, self._linear = source.tensor, source.linear

    def linear(self, prefix: str) -> Any:
        linear = self._linear(prefix)
        return replace(linear, zero=torch.full_like(linear.zero, SYMMETRIC_ZERO))


def install(monkeypatch: pytest.MonkeyPatch, dialect: str, **other: str) -> fake_tensorrt.FakeCuda:
    name, _, package, version = DIALECTS[dialect]
    facts = {"version": version, "capability": str(get_target(name).compute_capability)}
    return fake_tensorrt.install(monkeypatch, package, **{**facts, **other})


def prompt(session: Any, size: int) -> np.ndarray:
    """Text, an image, text: the embeddings [tokens, hidden]."""
    pixels = np.random.default_rng(0).standard_normal((1, 3, size, size), np.float32)
    features = session.encode_images(pixels)[0]
    return np.concatenate(
        [session.embed_tokens([1, 5, 9]), features, session.embed_tokens(range(20, 50))]
    )


def deviation(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / expected.std())


VARIANTS: dict[str, dict[str, Any]] = {
    "fp16, grouped queries, tied": {"kv_heads": 2, "tied": True},
    "int4, grouped queries": {"quantized": True, "kv_heads": 1},
    "int4, symmetric": {"quantized": True},
    "Qwen2's biases, linear rope, int4": {
        "quantized": True,
        "qwen2": True,
        "llm_config": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    },
}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_the_reference(
    tmp_path: Path, variant: str, dialect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint: Any = open_checkpoint(make_checkpoint(tmp_path / "c", **VARIANTS[variant]))
    if "symmetric" in variant:
        parts = {"vision": checkpoint.vision, "projector": checkpoint.projector}
        checkpoint = SimpleNamespace(
            config=checkpoint.config, llm=Symmetric(checkpoint.llm), **parts
        )
    gpu = install(monkeypatch, dialect)
    manifest = write_engine(tmp_path / "engine", checkpoint, dialect)
    session = open_session(tmp_path / "engine", manifest).sequence
    reference = ReferenceSession(checkpoint)
    embeds = prompt(session, checkpoint.config.vision.image_size)
    assert deviation(embeds, prompt(reference, checkpoint.config.vision.image_size)) < TOLERANCE
    logits, expected = session.prefill(embeds), reference.prefill(embeds)
    assert deviation(logits, expected) < TOLERANCE
    for _ in range(8):
        token = int(expected.argmax())
        logits, expected = session.decode(token), reference.decode(token)
        assert deviation(logits, expected) < TOLERANCE
    assert session.position == reference.position
    captures = session._decoder._engine.engine.captures
    assert captures == ([1, 0] if dialect == "standard" else [None, None])
    # The package for the device leaves recording to the session, tensorrt-rtx does it itself.
    assert gpu.launches == (0 if dialect == "standard" else 8 - decoder.RUNS_BEFORE_CAPTURE)
    session.close()
    assert not gpu.memory
    assert not gpu.graphs


def test_too_little_memory_for_a_profile_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real method raises, whatever its return value promises."""

    def refused(context: Any, profile: int, stream: int) -> bool:
        raise RuntimeError("Error in set optimization profile async.")

    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "c"))
    install(monkeypatch, "primitive")
    manifest = write_engine(tmp_path / "engine", checkpoint, "primitive")
    monkeypatch.setattr(fake_tensorrt.FakeContext, "set_optimization_profile_async", refused)
    with pytest.raises(VilaDeployError, match="can't prepare it"):
        open_session(tmp_path / "engine", manifest)


@pytest.mark.parametrize(
    "fails",
    ["execute_async_v3", "cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate"],
)
def test_a_step_that_cannot_be_recorded_runs_without_a_graph(
    tmp_path: Path, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "c"))
    gpu = install(monkeypatch, "primitive")
    manifest = write_engine(tmp_path / "engine", checkpoint, "primitive")
    session = open_session(tmp_path / "engine", manifest).sequence
    session.prefill(session.embed_tokens([1, 2]))
    for _ in range(decoder.RUNS_BEFORE_CAPTURE):
        session.decode(3)
    expected = session.decode(3)
    session.truncate(session.position - 1)
    monkeypatch.setattr(session._decoder, "_cuda_graph", None)
    with monkeypatch.context() as broken:
        if fails == "cudaStreamEndCapture":
            ended = gpu.cudaStreamEndCapture
            broken.setattr(gpu, fails, lambda stream: (901, *ended(stream)[1:]))
        elif fails == "execute_async_v3":
            run = fake_tensorrt.FakeContext.execute_async_v3
            broken.setattr(
                fake_tensorrt.FakeContext,
                fails,
                lambda context, stream: gpu.recorded is None and run(context, stream),
            )
        else:
            broken.setattr(gpu, fails, lambda *_: (901, None))
        launches = gpu.launches
        assert np.array_equal(session.decode(3), expected)
    assert gpu.recorded is None
    session.decode(3)
    assert gpu.launches == launches
    with monkeypatch.context() as broken:
        broken.setattr(fake_tensorrt.FakeContext, "execute_async_v3", lambda *_: False)
        with pytest.raises(VilaDeployError, match="can't run it"):
            session.decode(3)


def test_chunks_of_a_prompt_have_few_lengths_where_kernels_are_made_for_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And contexts share the memory of their activations."""
    checkpoint: Any = open_checkpoint(make_checkpoint(tmp_path / "c", quantized=True))
    gpu = install(monkeypatch, "standard")
    manifest = write_engine(tmp_path / "engine", checkpoint, "standard")
    session = open_session(tmp_path / "engine", manifest).sequence
    engine = session._decoder._engine.engine
    reference = ReferenceSession(checkpoint)
    # The last one has no room for padding: 9 of 160 positions are left.
    for count in (2, 13, 29, 20, 70, 17, 9):
        embeds = session.embed_tokens(np.random.default_rng(count).integers(0, 60, count))
        logits, expected = session.prefill(embeds), reference.prefill(embeds)
        assert deviation(logits, expected) < TOLERANCE
    assert session.position == 160
    decode, prefill = engine.contexts
    assert prefill.lengths == [1, 16, 16, 64, 64, 70, 17, 9]
    assert engine.strategy == fake_tensorrt.USER_MANAGED
    assert decode.memory == prefill.memory
    session.close()
    assert not gpu.memory


def test_lengths_stay_as_they_are_where_kernels_serve_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "c"))
    install(monkeypatch, "primitive")
    manifest = write_engine(tmp_path / "engine", checkpoint, "primitive")
    session = open_session(tmp_path / "engine", manifest).sequence
    session.prefill(session.embed_tokens(range(13)))
    assert session._decoder._engine.engine.contexts[1].lengths == [1, 13]


def test_a_missing_driver_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuda-bindings up to 12.8 raise where later ones return an error."""

    def missing(*arguments: Any) -> Any:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    gpu = install(monkeypatch, "primitive")
    monkeypatch.setattr(gpu, "cudaDeviceGetAttribute", missing)
    with pytest.raises(VilaDeployError, match=r"libcuda\.so\.1\).*--runtime nvidia"):
        cuda.compute_capability()


def test_a_library_that_makes_no_runtime_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As pybind11 says it of a null pointer."""

    def null(*arguments: Any) -> Any:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "c"))
    install(monkeypatch, "primitive")
    manifest = write_engine(tmp_path / "engine", checkpoint, "primitive")
    trt = compilers.COMPILERS["tensorrt"].load()
    monkeypatch.setattr(trt, "Runtime", null)
    with pytest.raises(VilaDeployError, match=r"can't make its Runtime \(pybind11.*; check that"):
        open_session(tmp_path / "engine", manifest)


def test_a_driver_that_is_too_old_is_told_from_a_broken_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = install(monkeypatch, "primitive")
    gpu.error = 35
    with pytest.raises(VilaDeployError, match=r"driver version is insufficient.*JetPack 6: 12\.8"):
        cuda.compute_capability()
    gpu.error = 999
    with pytest.raises(VilaDeployError, match="nvidia-smi"):
        cuda.compute_capability()


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_prompt_in_chunks_equals_prompt_at_once(
    tmp_path: Path, dialect: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "c", quantized=True, kv_heads=2))
    install(monkeypatch, dialect)
    manifest = write_engine(tmp_path / "engine", checkpoint, dialect)
    session = open_session(tmp_path / "engine", manifest).sequence
    embeds = session.embed_tokens(np.random.default_rng(0).integers(0, 60, 100))
    expected = session.prefill(embeds)
    # What an earlier conversation left in the cache must not be seen.
    session.truncate(0)
    session._decoder.chunk = chunk
    assert deviation(session.prefill(embeds), expected) < TOLERANCE
    assert session.position == 100
    with pytest.raises(VilaDeployError, match="161 tokens don't fit into the 160 positions"):
        OneSlot(session).prefill(0, embeds[:61])


@pytest.mark.parametrize("dialect", DIALECTS)
def test_it_keeps_the_contract(
    tmp_path: Path, dialect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "c", kv_heads=2))
    install(monkeypatch, dialect)
    session = open_session(
        tmp_path / "engine", write_engine(tmp_path / "engine", checkpoint, dialect)
    )
    check_session(session, ReferenceSession(checkpoint), TOLERANCE)


def test_kernels_are_kept_beside_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "c"))
    install(monkeypatch, "standard")
    manifest = write_engine(tmp_path / "engine", checkpoint, "standard")
    session = open_session(tmp_path / "engine", manifest).sequence
    session.prefill(session.embed_tokens([1, 2]))
    session.close()
    cache = tmp_path / "engine" / files.LLM / files.RUNTIME_CACHE
    assert cache.read_bytes() == b"kernels"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"version": "1.8.0"}, r"was built with tensorrt-rtx 1\.7\.1, here is 1\.8\.0; install"),
        ({"capability": "9.0"}, r"compute capability 8\.9 \(rtx4090\), this GPU has 9\.0; build"),
    ],
)
def test_other_version_or_gpu_is_refused(
    tmp_path: Path, other: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "c"))
    install(monkeypatch, "standard", **other)
    manifest = write_engine(tmp_path / "engine", checkpoint, "standard")
    with pytest.raises(VilaDeployError, match=message):
        open_session(tmp_path / "engine", manifest)
