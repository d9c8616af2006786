"""The CPU engine against the PyTorch reference that holds the same weights."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.session_contract import check_session
from tests.support.tiny import make_checkpoint
from vila_deploy.backends.onnxruntime import build as build_module
from vila_deploy.backends.onnxruntime import open_session
from vila_deploy.backends.onnxruntime import session as session_module
from vila_deploy.backends.onnxruntime.backend import BACKEND
from vila_deploy.backends.onnxruntime.session import OnnxRuntimeSession
from vila_deploy.builder.build import build_engine
from vila_deploy.builder.resolve import BuildOptions
from vila_deploy.checkpoint import Checkpoint, open_checkpoint
from vila_deploy.checkpoint.presets import preset
from vila_deploy.checkpoint.weight_source import ModelWeights
from vila_deploy.engine.build_request import BuildRequest
from vila_deploy.engine.manifest import Limits, Manifest
from vila_deploy.engine.model_info import ModelInfo
from vila_deploy.engine.target import get_target
from vila_deploy.formats.base import SYMMETRIC_ZERO
from vila_deploy.model.random_weights import random_weights
from vila_deploy.model.vila import ReferenceSession
from vila_deploy.utils.errors import VilaDeployError

MAX_SEQ_LEN = 160
# Of the logits' spread. float32 sums in another order differ by about 4e-6 here; two int8 terms of
# the activations by up to 4e-4, where float16 arithmetic differs by 4e-3 to 7e-3.
TOLERANCE, INT4_TOLERANCE = 5e-5, 1e-3
# One int8 term: 7 bits of the largest activation in a group.
INT8_TOLERANCE = 0.15


@dataclass(frozen=True)
class Symmetric:
    """A 4-bit WeightSource whose zero points are all 8."""

    source: Any

    def tensor(self, name: str) -> torch.Tensor:
        return self.source.tensor(name)

    def linear(self, prefix: str) -> Any:
        linear = self.source.linear(prefix)
        return replace(linear, zero=torch.full_like(linear.zero, SYMMETRIC_ZERO))


def request(max_seq_len: int = MAX_SEQ_LEN, activations: str | None = None) -> BuildRequest:
    limits = Limits(1, max_seq_len, max_seq_len)
    return BuildRequest(get_target("cpu"), limits, activations=activations)


def build(
    folder: Path, checkpoint: Any, max_seq_len: int = MAX_SEQ_LEN, activations: str = "int8x2"
) -> tuple[Path, Manifest]:
    """Build an engine; `activations` are those of 4-bit linears, if there are any."""
    config = checkpoint.config
    asked = activations if config.llm.quantization else None
    folder.mkdir()
    weights = ModelWeights(checkpoint.llm, checkpoint.vision, checkpoint.projector)
    built = build_module.build(folder, config, weights, request(max_seq_len, asked))
    return folder, Manifest(
        name="tiny",
        target="cpu",
        backend="onnxruntime",
        precision="int4" if config.llm.quantization else "fp16",
        weights="trained",
        weight_bytes_per_token=built.weight_bytes_per_token,
        checkpoint_fingerprint=None,
        limits=Limits(1, max_seq_len, max_seq_len),
        model=ModelInfo.from_config(config, None),
        versions=built.versions,
        activations=asked,
    )


def opened(
    folder: Path, checkpoint: Any, max_seq_len: int = MAX_SEQ_LEN, activations: str = "int8x2"
) -> OnnxRuntimeSession:
    return OnnxRuntimeSession(*build(folder, checkpoint, max_seq_len, activations))


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
    "fp16": {},
    "fp16, grouped queries, tied": {"kv_heads": 2, "tied": True},
    "int4": {"quantized": True},
    "int4, grouped queries, group 128": {"quantized": True, "group_size": 128, "kv_heads": 1},
    "int4, group 32": {"quantized": True, "group_size": 32},
    "int4, symmetric": {"quantized": True},
    "bfloat16": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_greedy_tokens_equal_the_reference(tmp_path: Path, variant: str) -> None:
    checkpoint: Any = open_checkpoint(make_checkpoint(tmp_path / "c", **VARIANTS[variant]))
    if "symmetric" in variant:
        checkpoint = SimpleNamespace(
            config=checkpoint.config,
            llm=Symmetric(checkpoint.llm),
            vision=checkpoint.vision,
            projector=checkpoint.projector,
        )
    reference = ReferenceSession(checkpoint)
    session = opened(tmp_path / "engine", checkpoint)
    embeds = prompt(reference, checkpoint.config.vision.image_size)
    logits, expected = session.prefill(0, embeds), reference.prefill(embeds)
    tolerance = INT4_TOLERANCE if VARIANTS[variant].get("quantized") else TOLERANCE
    assert deviation(logits, expected) < tolerance
    for _ in range(64):
        token = int(expected.argmax())
        assert int(logits.argmax()) == token
        logits, expected = session.decode([0], [token])[0], reference.decode(token)
        assert deviation(logits, expected) < tolerance
    assert session.length(0) == reference.position


def test_float32_activations_equal_the_reference(tmp_path: Path, int4: Checkpoint) -> None:
    reference = ReferenceSession(int4)
    session = opened(tmp_path / "engine", int4, activations="fp32")
    embeds = prompt(reference, int4.config.vision.image_size)
    assert deviation(session.prefill(0, embeds), reference.prefill(embeds)) < TOLERANCE
    for token in range(5, 25):
        assert deviation(session.decode([0], [token])[0], reference.decode(token)) < TOLERANCE


def test_one_int8_term_rounds_activations(tmp_path: Path, int4: Checkpoint) -> None:
    """It differs from float32 by more than two terms do, and by no more than int8 can."""
    reference = ReferenceSession(int4)
    embeds = prompt(reference, int4.config.vision.image_size)
    expected = [reference.prefill(embeds), *map(reference.decode, range(5, 25))]
    deviations = {}
    for activations in ("int8", "int8x2"):
        session = opened(tmp_path / activations, int4, activations=activations)
        actual = [
            session.prefill(0, embeds),
            *(session.decode([0], [token])[0] for token in range(5, 25)),
        ]
        deviations[activations] = max(map(deviation, actual, expected))
    assert deviations["int8x2"] < INT4_TOLERANCE < deviations["int8"] < INT8_TOLERANCE


def test_one_graph_takes_any_number_of_tokens(tmp_path: Path, int4: Checkpoint) -> None:
    """One int8 term needs no graph of its own for single tokens; a prompt's parts agree."""
    folder, manifest = build(tmp_path / "engine", int4, activations="int8")
    assert not (folder / "llm" / "prefill.onnx").exists()
    session = OnnxRuntimeSession(folder, manifest)
    tokens = list(range(3, 40))
    at_once = session.prefill(0, session.embed_tokens(tokens))
    session.keep(0, 0)
    one_by_one = [session.prefill(0, session.embed_tokens([token])) for token in tokens]
    # The kernel adds in another order for one row than for several.
    assert deviation(one_by_one[-1], at_once) < INT8_TOLERANCE
    session.keep(0, 0)
    session.prefill(0, session.embed_tokens(tokens[:1]))
    decoded = [session.decode([0], [token])[0] for token in tokens[1:]]
    assert np.array_equal(decoded, one_by_one[1:])


@pytest.mark.parametrize("quantized", [False, True])
def test_prompt_in_parts_equals_prompt_at_once(
    tmp_path: Path, quantized: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "c", quantized=quantized))
    session = opened(tmp_path / "engine", checkpoint)
    embeds = prompt(session, checkpoint.config.vision.image_size)
    expected = session.prefill(0, embeds)
    session.keep(0, 0)
    tolerance = INT4_TOLERANCE if quantized else TOLERANCE
    monkeypatch.setattr(session_module, "PREFILL_TOKENS", 5)
    assert deviation(session.prefill(0, embeds), expected) < tolerance
    session.keep(0, 0)
    for part in (embeds[:1], embeds[1:20], embeds[20:21], embeds[21:]):
        logits = session.prefill(0, part)
    assert deviation(logits, expected) < tolerance
    assert session.length(0) == len(embeds)


@pytest.mark.parametrize("order", ["row", "column"])
@pytest.mark.parametrize("image", [42, 56], ids=["odd grid", "even grid"])
@pytest.mark.parametrize("act", ["gelu_pytorch_tanh", "gelu"])
def test_vision_features_equal_the_reference(
    tmp_path: Path, order: str, image: int, act: str
) -> None:
    root = make_checkpoint(
        tmp_path / "c", image=image,
        root_config={"mm_projector_token_order": order}, vision_config={"hidden_act": act},
    )  # fmt: skip
    checkpoint = open_checkpoint(root)
    pixels = np.random.default_rng(1).standard_normal((3, 3, image, image), np.float32)
    features = opened(tmp_path / "engine", checkpoint).encode_images(pixels)
    expected = ReferenceSession(checkpoint).encode_images(pixels)
    assert features.shape == (3, checkpoint.config.tokens_per_block, 128)
    assert deviation(features, expected) < TOLERANCE


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(make_checkpoint(tmp_path_factory.mktemp("int4") / "c", quantized=True))


@pytest.mark.parametrize("quantized", [False, True])
def test_cache_is_written_in_place(tmp_path: Path, quantized: bool) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "c", quantized=quantized))
    session = opened(tmp_path / "engine", checkpoint)
    session.prefill(0, session.embed_tokens(range(3, 20)))
    session.decode([0], [5])
    addresses = {buffer.ctypes.data for buffer in session.rows.buffers}
    assert len(addresses) == 2 * checkpoint.config.llm.num_layers
    assert len(session._bound) == 2
    for bound in session._bound.values():
        assert addresses <= bound.output_addresses()
    for buffer in session.rows.buffers:
        assert np.abs(buffer[0, :, :18]).min() > 0
        assert not buffer[0, :, 18:].any()
    before = [buffer.copy() for buffer in session.rows.buffers]
    session.decode([0], [7])
    for buffer, old in zip(session.rows.buffers, before, strict=True):
        changed = np.flatnonzero((buffer != old).any(axis=(0, 1, 3)))
        assert changed.tolist() == [18]


# Run in a process of its own: the peak of earlier tests would be counted here.
MEMORY_OF_STEPS = """
import sys
from pathlib import Path
from vila_deploy.runtime.open_engine import open_engine
from vila_deploy.utils.host_memory import own_bytes
session = open_engine(Path(sys.argv[1])).session
before = own_bytes()
session.prefill(0, session.embed_tokens(range(3, 20)))
for token in range(20, 30):
    session.decode([0], [token])
status = dict(line.split(':', 1) for line in Path('/proc/self/status').read_text().splitlines())
print(int(status['VmHWM'].split()[0]) * 1024 - before)
"""


def test_memory_of_a_step_does_not_grow_with_the_cache(tmp_path: Path) -> None:
    long = 1 << 17
    root = make_checkpoint(tmp_path / "c", max_length=long, quantized=True)
    llm = open_checkpoint(root).config.llm
    cache_bytes = 2 * llm.num_layers * llm.num_kv_heads * llm.head_dim * long * 4
    build_engine(root, tmp_path / "engine", BuildOptions("cpu", max_seq_len=long))
    run = subprocess.run(
        [sys.executable, "-c", MEMORY_OF_STEPS, tmp_path / "engine"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    print(run.stdout, cache_bytes)
    assert int(run.stdout) < cache_bytes / 2


def test_it_keeps_the_contract(tmp_path: Path, int4: Checkpoint) -> None:
    session = open_session(*build(tmp_path / "engine", int4, 24))
    check_session(session, ReferenceSession(int4), INT4_TOLERANCE)


def test_too_many_tokens_are_refused(tmp_path: Path, int4: Checkpoint) -> None:
    session = open_session(*build(tmp_path / "engine", int4, 8))
    session.prefill(0, session.embed_tokens(range(3, 10)))
    session.decode([0], [4])
    with pytest.raises(VilaDeployError, match="9 tokens don't fit into the 8 positions"):
        session.decode([0], [5])
    with pytest.raises(VilaDeployError, match="--max-seq-len"):
        session.prefill(0, session.embed_tokens([3]))
    session.keep(0, 0)
    with pytest.raises(VilaDeployError, match="empty"):
        session.prefill(0, session.embed_tokens([]))
    session.prefill(0, session.embed_tokens(range(3, 11)))
    session.close()


def test_models_that_have_no_kernel_are_refused(int4: Checkpoint) -> None:
    llm = int4.config.llm
    assert llm.quantization is not None
    config = replace(llm, quantization=replace(llm.quantization, group_size=96))
    with pytest.raises(VilaDeployError, match=r"group size 96.*16, 32, 64, 128, 256.*--group-size"):
        BACKEND.check(replace(int4.config, llm=config), request())
    with pytest.raises(VilaDeployError, match="head_dim"):
        BACKEND.check(replace(int4.config, llm=replace(llm, head_dim=36)), request())


def test_file_that_onnxruntime_refuses_is_named(tmp_path: Path, int4: Checkpoint) -> None:
    folder, manifest = build(tmp_path / "engine", int4)
    (folder / "llm" / "model.onnx").write_bytes(b"\x08\x0a")
    with pytest.raises(VilaDeployError, match=r"llm/model\.onnx: onnxruntime .* can't load"):
        open_session(folder, manifest)


def test_equal_checkpoints_give_equal_files(tmp_path: Path, int4: Checkpoint) -> None:
    first, _ = build(tmp_path / "first", int4)
    second, _ = build(tmp_path / "second", int4)
    names = sorted(p.relative_to(first) for p in first.rglob("*") if p.is_file())
    assert Path("llm/prefill.onnx") in names
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_random_weights_run_with_logits_that_differ(tmp_path: Path, precision: str) -> None:
    config = preset("VILA1.5-3b", precision)
    llm = replace(
        config.llm, hidden_size=256, num_layers=6, num_heads=2, num_kv_heads=2,
        intermediate_size=512, vocab_size=1000,
    )  # fmt: skip
    vision = replace(
        config.vision, hidden_size=64, num_layers=3, num_heads=4, intermediate_size=96,
        image_size=42,
    )  # fmt: skip
    config = replace(config, llm=llm, vision=vision)
    sources = dict(zip(("llm", "vision", "projector"), random_weights(config), strict=True))
    checkpoint = SimpleNamespace(config=config, **sources)
    session, reference = opened(tmp_path / "engine", checkpoint), ReferenceSession(checkpoint)
    embeds = prompt(session, 42)
    logits = session.prefill(0, embeds)
    assert 0.1 < logits.std() < 10
    assert deviation(logits, reference.prefill(embeds)) < (
        INT4_TOLERANCE if precision == "int4" else TOLERANCE
    )


def test_random_layers_differ() -> None:
    """Equal layers would be kept once and be measured faster than trained ones."""
    config = preset("VILA1.5-3b", "int4")
    llm = random_weights(config).llm
    first, second = (llm.linear(f"model.layers.{i}.self_attn.k_proj") for i in (0, 1))
    assert (first.q == second.q).float().mean() < 0.1
    assert not torch.equal(first.zero, second.zero)
    assert torch.equal(
        first.q, random_weights(config).llm.linear("model.layers.0.self_attn.k_proj").q
    )
    dense = random_weights(preset("VILA1.5-3b", "fp16")).llm
    names = [f"model.layers.{i}.self_attn.k_proj" for i in (0, 1)]
    assert not torch.equal(dense.linear(names[0]), dense.linear(names[1]))


def test_weight_bytes_of_a_token(tmp_path: Path, int4: Checkpoint) -> None:
    """What a step reads, counted from the shapes: 4.5 + 2 bits per level and float32 the rest."""
    _, manifest = build(tmp_path / "engine", int4)
    llm, group = int4.config.llm, 64
    linears = llm.num_layers * llm.hidden_size * (4 * llm.hidden_size + 3 * llm.intermediate_size)
    groups = linears // group
    norms = (2 * llm.num_layers + 1) * llm.hidden_size
    expected = linears // 2 + groups // 2 + 4 * (groups + norms + llm.vocab_size * llm.hidden_size)
    assert manifest.weight_bytes_per_token == expected


@pytest.mark.parametrize(("asked", "threads"), [("", 6), ("2", 2), ("64", 6), ("0", 6), ("a,b", 6)])
def test_omp_num_threads_bounds_the_threads(
    monkeypatch: pytest.MonkeyPatch, asked: str, threads: int
) -> None:
    monkeypatch.setattr(session_module, "physical_cores", lambda: 6)
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert session_module.threads_to_use() == threads
