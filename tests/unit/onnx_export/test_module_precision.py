"""Quantized output heads and vision towers on onnxruntime, against the same weights in fp64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from tests.support.module_precision_cases import Replaced, rounded, with_head
from tests.support.tensorrt_cases import DIALECTS, needs_rtx, refusals, write_engine
from tests.support.tiny import make_checkpoint
from vila_deploy.backends.tensorrt import files
from vila_deploy.builder.build import build_engine
from vila_deploy.builder.resolve import BuildOptions
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.engine.manifest import load_manifest
from vila_deploy.engine.precision import ModulePrecision
from vila_deploy.formats.int8_linear import round_int8
from vila_deploy.model.vila import ReferenceSession
from vila_deploy.onnx_export.dialects.base import Dialect
from vila_deploy.onnx_export.dialects.onnxruntime import OnnxRuntimeDialect
from vila_deploy.onnx_export.dialects.tensorrt import LARGEST_OF_PAIR
from vila_deploy.onnx_export.dialects.tensorrt_10_3 import TensorRt10_3Dialect
from vila_deploy.onnx_export.dialects.tensorrt_10_15 import TensorRt10_15Dialect
from vila_deploy.onnx_export.graph_writer import GraphWriter, WeightFile
from vila_deploy.onnx_export.rounding import round_int4
from vila_deploy.runtime.open_engine import open_engine
from vila_deploy.utils.errors import VilaDeployError

VOCAB, HIDDEN = 200, 192
# onnxruntime's kernel for the CPU reads two int8 terms of each group of activations.
EMITTERS: dict[str, tuple[Dialect, int, float]] = {
    "onnxruntime": (OnnxRuntimeDialect(), 127, 1e-4),
    "standard": (TensorRt10_15Dialect(), LARGEST_OF_PAIR, 2e-4),
    "primitive": (TensorRt10_3Dialect(), LARGEST_OF_PAIR, 2e-4),
}


def loaded(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    # Otherwise onnxruntime would round activations to int8, which no GPU engine does.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def head_weight() -> torch.Tensor:
    """Rows of very different size, one of them zero."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn((VOCAB, HIDDEN), generator=random) * 0.05
    weight *= torch.logspace(-2, 1, VOCAB)[:, None]
    weight[7] = 0
    return weight.half()


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("dialect", EMITTERS)
def test_head_gives_the_products_of_its_rounded_weights(
    tmp_path: Path, dialect: str, dtype: str
) -> None:
    emitter, largest, tolerance = EMITTERS[dialect]
    weight = head_weight()
    half = dialect != "onnxruntime"
    kind = np.float16 if half else np.float32
    x = np.random.default_rng(0).standard_normal((1, HIDDEN)).astype(kind)
    with WeightFile(tmp_path / "w.data") as file:
        stored = emitter.store_head(file, weight, dtype)
    graph = GraphWriter(emitter.opset)
    graph.input("x", kind, [1, HIDDEN])
    graph.output("logits", np.float32, [1, VOCAB])
    emitter.head(graph, "x", stored)
    graph.save(tmp_path / "w.onnx")
    onnx_model = onnx.load(tmp_path / "w.onnx", load_external_data=False)
    assert dialect != "primitive" or refusals(onnx_model) == []
    (found,) = loaded(tmp_path / "w.onnx").run(None, {"x": x})
    exact = rounded(weight, dtype, largest, grouped=not half)
    expected = x.astype(np.float64) @ exact.T
    # Rows differ in size, so each is compared with what its own terms add up to.
    size = np.sqrt((x.astype(np.float64) ** 2) @ (exact**2).T) + 1e-6
    assert (np.abs(found - expected) / size).max() < tolerance
    assert abs(found[0, 7]) < 1e-9
    bits = {"int8": 8 + 32 / 64, "int4": 4 + (16 if half else 40) / 64}[dtype]
    assert stored.bytes_per_step <= VOCAB * HIDDEN * bits / 8


def test_rounding_is_of_the_checkpoint_s_own_values() -> None:
    weight = head_weight()
    for largest in (127, LARGEST_OF_PAIR):
        int8 = round_int8(weight, "head", largest)
        assert int(int8.q.abs().max()) == largest
        assert np.array_equal(int8.dequantize().double().numpy(), rounded(weight, "int8", largest))
    int4 = round_int4(weight, 64, "head")
    assert np.array_equal(int4.dequantize().double().numpy(), rounded(weight, "int4", 0))
    assert int4.symmetric
    with pytest.raises(VilaDeployError, match="lm_head"):
        round_int4(weight.double() * 1e8, 64, "lm_head")


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("quantized", [True, False], ids=["int4 layers", "fp16 layers"])
def test_cpu_engine_equals_the_reference_with_the_same_head(
    tmp_path: Path, quantized: bool, dtype: str
) -> None:
    root = make_checkpoint(tmp_path / "c", quantized=quantized, hidden=192, heads=6, kv_heads=2)
    options = BuildOptions(
        "cpu", max_seq_len=96, module_precision=ModulePrecision(lm_head=dtype),
        activations="int8x2" if quantized else None,
    )  # fmt: skip
    plain = build_engine(
        root, tmp_path / "plain", replace(options, module_precision=ModulePrecision())
    )
    manifest = build_engine(root, tmp_path / "engine", options)
    assert load_manifest(tmp_path / "engine").module_precision == options.module_precision
    assert manifest.weight_bytes_per_token < plain.weight_bytes_per_token
    reference = ReferenceSession(with_head(open_checkpoint(root), dtype, 127, grouped=True))
    with open_engine(tmp_path / "engine") as engine:
        embeds = engine.session.embed_tokens(range(20, 50))
        found, expected = engine.session.prefill(0, embeds), reference.prefill(embeds)
        for _ in range(32):
            assert np.abs(found - expected).max() < 1e-3 * expected.std()
            token = int(expected.argmax())
            (found,) = engine.session.decode([0], [token])
            expected = reference.decode(token)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("tower", ["siglip", "internvit"])
def test_int8_tower_equals_the_reference_with_the_same_matrices(
    tmp_path: Path, tower: str, dialect: str
) -> None:
    """Both dialects can be written; which compilers take it is said in SUPPORTED."""
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "c", tower=tower, vision_layers=4))
    write_engine(
        tmp_path / "e", checkpoint, dialect, module_precision=ModulePrecision(vision="int8")
    )
    write_engine(tmp_path / "plain", checkpoint, dialect)
    size, plain = (
        (tmp_path / name / files.VISION / files.WEIGHTS).stat().st_size for name in ("e", "plain")
    )
    vision: Any = checkpoint.vision
    names = [name for name in vision.names() if ".layers." in name and name.endswith("weight")]
    matrices = {name: vision.tensor(name) for name in names if vision.tensor(name).ndim == 2}
    assert checkpoint.config.vision_layers_used == 3
    used = sum(m.numel() for name, m in matrices.items() if ".layers.3." not in name)
    assert 0.9 * used < plain - size < used
    exact = {n: torch.from_numpy(rounded(m, "int8", 127)).float() for n, m in matrices.items()}
    reference = ReferenceSession(
        SimpleNamespace(  # type: ignore[arg-type]
            config=checkpoint.config,
            llm=checkpoint.llm,
            vision=Replaced(vision, exact),
            projector=checkpoint.projector,
        )
    )
    pixels = np.random.default_rng(0).standard_normal((1, 3, 42, 42), np.float32)
    (found,) = loaded(tmp_path / "e" / files.VISION / files.GRAPH).run(None, {"pixels": pixels})
    expected = reference.encode_images(pixels)
    rough = ReferenceSession(checkpoint).encode_images(pixels)
    error, rounding = (np.abs(each - expected).mean() for each in (found, rough))
    # float16 arithmetic changes less than the rounding to int8 that is the same on both sides.
    assert error < rounding / 3
    assert np.abs(found - expected).max() < 1e-2 * expected.std()


@needs_rtx
def test_compiled_engines_hold_heads_and_towers_in_their_bits(tmp_path: Path) -> None:
    """Nothing is widened when it is compiled: plans differ by what int8 takes more than int4."""
    sizes = {"vocab": 8192, "hidden": 256, "layers": 1, "intermediate": 256}
    root = make_checkpoint(tmp_path / "c", quantized=True, vision_layers=2, **sizes)
    plans = {}
    for name, module_precision in {
        "int8": ModulePrecision(vision="int8", lm_head="int8"),
        "int4": ModulePrecision(lm_head="int4"),
    }.items():
        options = BuildOptions("rtx4090", max_seq_len=64, module_precision=module_precision)
        manifest = build_engine(root, tmp_path / name, options)
        assert manifest.module_precision == module_precision
        plans[name] = (tmp_path / name / files.LLM / files.PLAN).stat().st_size
    more, kernels = 8192 * 256 * (1 - 0.5 + 2 / 128), 200_000
    assert plans["int8"] - plans["int4"] == pytest.approx(more, abs=kernels)
