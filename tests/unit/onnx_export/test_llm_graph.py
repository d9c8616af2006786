"""Building blocks of the graphs, each against an independent computation."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from tests.support.tiny import make_checkpoint
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.formats.base import QuantizedLinear
from vila_deploy.model import llm as reference
from vila_deploy.onnx_export.arrays import float16
from vila_deploy.onnx_export.dialects.base import pack_nibbles, pack_transposed_nibbles
from vila_deploy.onnx_export.dialects.onnxruntime import OnnxRuntimeDialect
from vila_deploy.onnx_export.graph_writer import GraphWriter, WeightFile
from vila_deploy.onnx_export.llm import store_llm
from vila_deploy.onnx_export.rotary import rotary_tables
from vila_deploy.utils.errors import VilaDeployError


def quantized(out: int, width: int, group: int, seed: int, **extra: Any) -> QuantizedLinear:
    random = torch.Generator().manual_seed(seed)
    shape = (out, width // group)
    return QuantizedLinear(
        q=torch.randint(0, 16, (out, width), generator=random, dtype=torch.uint8),
        scale=(torch.rand(shape, generator=random) * 0.01 + 0.001).half(),
        zero=torch.randint(0, 16, shape, generator=random, dtype=torch.uint8),
        **extra,
    )


def run_linear(
    folder: Path, dialect: OnnxRuntimeDialect, parts: list[Any], x: np.ndarray
) -> np.ndarray:
    folder.mkdir()
    with WeightFile(folder / "model.data") as file:
        stored = dialect.store_linear(file, "linear", parts)
    graph = GraphWriter()
    graph.input("x", np.float32, list(x.shape))
    y = dialect.linear(graph, "x", stored)
    graph.node("Identity", y, output="y")
    graph.output("y", np.float32, [len(x), stored.out_features])
    graph.save(folder / "model.onnx")
    session = onnxruntime.InferenceSession(
        folder / "model.onnx", providers=["CPUExecutionProvider"]
    )
    return session.run(["y"], {"x": x})[0]


def exact(parts: list[QuantizedLinear], x: np.ndarray) -> np.ndarray:
    weight = torch.cat([part.dequantize() for part in parts]).double().numpy()
    return x.astype(np.float64) @ weight.T


def activations(rows: int, width: int) -> np.ndarray:
    """Gaussian with an outlier, a group of zeros, and groups of very different size."""
    x = np.random.default_rng(0).standard_normal((rows, width)).astype(np.float32)
    x[:, 7] *= 50
    x[:, 64:128] = 0
    x[:, 128:192] *= 1e-6
    return x


@pytest.mark.parametrize("group", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("rows", [1, 9])
def test_float32_linear(tmp_path: Path, group: int, rows: int) -> None:
    parts = [quantized(48, 768, group, 1), quantized(80, 768, group, 2)]
    x = activations(rows, 768)
    found, expected = run_linear(tmp_path / "m", OnnxRuntimeDialect(), parts, x), exact(parts, x)
    assert np.abs(found - expected).max() < 1e-5 * expected.std()


# Largest error, of the outputs' spread: each term of int8 adds about seven bits.
TERMS = {1: 2e-1, 2: 2e-3, 3: 2e-5}


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("group", [16, 32, 64, 128, 256])
def test_int8_terms(tmp_path: Path, group: int, terms: int) -> None:
    parts = [quantized(48, 768, group, 1), quantized(80, 768, group, 2)]
    x = activations(1, 768)
    found = run_linear(tmp_path / "m", OnnxRuntimeDialect(terms), parts, x)
    expected = exact(parts, x)
    error = np.abs(found - expected).max() / expected.std()
    assert error < TERMS[terms]
    if terms < 3:
        assert error > TERMS[terms + 1] / 10, "then fewer terms would do"


def test_odd_number_of_groups_and_biases(tmp_path: Path) -> None:
    bias = torch.arange(48).half()
    parts = [quantized(48, 192, 64, 1, bias=bias), quantized(16, 192, 64, 2)]
    x = np.random.default_rng(0).standard_normal((1, 192)).astype(np.float32)
    expected = exact(parts, x) + np.concatenate([bias.numpy(), np.zeros(16)])
    for terms in (0, 3):
        found = run_linear(tmp_path / str(terms), OnnxRuntimeDialect(terms), parts, x)
        assert np.abs(found - expected).max() < 1e-4


def test_dense_linear(tmp_path: Path) -> None:
    parts = [torch.randn(24, 64).half(), torch.randn(40, 64).half()]
    x = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    expected = x.astype(np.float64) @ torch.cat(parts).double().numpy().T
    found = run_linear(tmp_path / "m", OnnxRuntimeDialect(), parts, x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_pre_quantization_scale_is_refused(tmp_path: Path) -> None:
    part = quantized(16, 64, 64, 1, prequant_scale=torch.ones(64).half())
    with pytest.raises(VilaDeployError, match="linear: has a pre-quantization scale"):
        run_linear(tmp_path / "m", OnnxRuntimeDialect(), [part], np.zeros((1, 64), np.float32))


def test_nibbles_low_half_first() -> None:
    values = torch.tensor([[1, 2, 3], [15, 0, 7]], dtype=torch.uint8)
    assert pack_nibbles(values).tolist() == [[0x21, 0x03], [0x0F, 0x07]]
    assert pack_transposed_nibbles(values).tolist() == pack_nibbles(values.T.contiguous()).tolist()
    assert pack_transposed_nibbles(values.T).tolist() == pack_nibbles(values).tolist()


def test_values_beyond_float16_are_refused() -> None:
    with pytest.raises(VilaDeployError, match=r"some_tensor: a value of 7e\+04 is too large"):
        float16(torch.tensor([1.0, -7e4]), "some_tensor")
    assert float16(torch.tensor([65504.0, 0.1]), "some_tensor").dtype == np.float16


def test_rotary_tables_equal_transformers(tmp_path: Path) -> None:
    config = open_checkpoint(make_checkpoint(tmp_path / "c")).config.llm
    cos, sin = reference.rotary(config, torch.arange(4096))
    half = config.head_dim // 2
    for found, expected in zip(rotary_tables(config, 4096), (cos, sin), strict=True):
        torch.testing.assert_close(found, expected[0, :, :half], rtol=0, atol=0)


def test_weights_are_found_beside_the_graph(tmp_path: Path) -> None:
    arrays = {"a": np.arange(7, dtype=np.uint8), "b": np.eye(3, dtype=np.float32)}
    graph = GraphWriter()
    with WeightFile(tmp_path / "model.data") as file:
        stored = {name: file.append(array) for name, array in arrays.items()}
    for name, tensor in stored.items():
        assert tensor.offset % 64 == 0
        graph.node("Identity", graph.weight(name, tensor), output=f"{name}_out")
        graph.output(f"{name}_out", arrays[name].dtype.type, list(arrays[name].shape))
    graph.save(tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(model)
    found = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)


class Watched:
    """A WeightSource that counts how many of the tensors it gave are alive."""

    def __init__(self, source: Any):
        self.source, self.most = source, 0
        self.alive: list[weakref.ref[Any]] = []

    def _watch(self, value: Any) -> Any:
        self.alive = [ref for ref in self.alive if ref() is not None]
        self.alive.append(weakref.ref(value))
        self.most = max(self.most, len(self.alive))
        return value

    def tensor(self, name: str) -> Any:
        return self._watch(self.source.tensor(name))

    def linear(self, prefix: str) -> Any:
        return self._watch(self.source.linear(prefix))


@pytest.mark.parametrize("quantized", [False, True])
def test_one_decoder_layer_in_memory(tmp_path: Path, quantized: bool) -> None:
    root = make_checkpoint(tmp_path / "c", layers=6, quantized=quantized)
    checkpoint = open_checkpoint(root)
    watched, steps = Watched(checkpoint.llm), []
    with WeightFile(tmp_path / "model.data") as file:
        store_llm(
            checkpoint.config.llm, watched, 64, file, OnnxRuntimeDialect(),
            lambda text="", steps_done=1: steps.append(text),
        )  # fmt: skip
    assert watched.most <= 4
    assert len(steps) == 7
