"""Matrices cut into pieces of columns, odd numbers of columns, and what feeds each MatMul."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto

from tests.support.module_precision_cases import rounded
from tests.support.tensorrt_cases import refusals, write_engine
from tests.support.tiny import make_checkpoint
from vila_deploy.backends.tensorrt import files, graphs
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.checkpoint.presets import preset
from vila_deploy.formats.base import QuantizedLinear
from vila_deploy.onnx_export.dialects.tensorrt import TensorRtDialect
from vila_deploy.onnx_export.dialects.tensorrt_10_3 import TensorRt10_3Dialect
from vila_deploy.onnx_export.dialects.tensorrt_10_15 import TensorRt10_15Dialect
from vila_deploy.onnx_export.graph_writer import GraphWriter, StoredTensor, WeightFile
from vila_deploy.onnx_export.matrix_pieces import (
    COLUMN_MULTIPLE,
    MAX_MATRIX_BYTES,
    column_ranges,
    largest_piece_bytes,
)

EMITTERS: dict[str, type[TensorRtDialect]] = {
    "standard": TensorRt10_15Dialect,
    "primitive": TensorRt10_3Dialect,
}
HIDDEN = 192
RELEASED = ("VILA1.5-3b", "Llama-3-VILA1.5-8B", "VILA1.5-13b", "VILA1.5-40b", "NVILA-8B")
ISSUE_LIMIT_BYTES = 128_000_000


@pytest.mark.parametrize("columns", [1, 63, 64, 65, 1000, 32003, 128256])
@pytest.mark.parametrize("max_bytes", [None, 1, 100, 12_800, 1 << 20, 1 << 40])
def test_pieces_cover_every_column_once(columns: int, max_bytes: int | None) -> None:
    ranges = column_ranges(columns, 8, max_bytes)
    assert ranges[0][0] == 0
    assert ranges[-1][1] == columns
    assert all(end == first for (_, end), (first, _) in pairwise(ranges))
    widths = [end - first for first, end in ranges]
    assert all(width > 0 for width in widths)
    assert largest_piece_bytes(columns, 8, max_bytes) == 8 * max(widths)
    if max_bytes is None or max_bytes >= 8 * columns:
        assert len(ranges) == 1
    elif max_bytes >= 8 * COLUMN_MULTIPLE:
        assert 8 * max(widths) <= max_bytes
        assert all(first % COLUMN_MULTIPLE == 0 for first, _ in ranges)
    else:
        assert max(widths) <= max(1, max_bytes // 8)


def run_linear(folder: Path, dialect: TensorRtDialect, stored: Any, x: Any, name: str) -> Any:
    graph = GraphWriter(dialect.opset)
    graph.input("x", np.float16, ["rows", x.shape[1]])
    graph.output("logits", np.float32, ["rows", stored.out_features])
    dialect.head(graph, "x", stored)
    graph.save(folder / f"{name}.onnx")
    model = onnx.load(folder / f"{name}.onnx", load_external_data=False)
    onnx.checker.check_model(folder / f"{name}.onnx", full_check=True)
    assert dialect.opset > 21 or refusals(model) == []
    for tensor in model.graph.initializer:
        assert tensor.data_type != TensorProto.INT4 or tensor.dims[1] % 2 == 0
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(
        folder / f"{name}.onnx", options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x})[0], model


@pytest.mark.parametrize("vocab", [383, 384, 386, 1])
@pytest.mark.parametrize("max_bytes", [None, 2 * HIDDEN * 100])
@pytest.mark.parametrize("dtype", ["fp16", "int8", "int4"])
@pytest.mark.parametrize("dialect", EMITTERS)
def test_a_head_of_any_vocabulary(
    tmp_path: Path, dialect: str, dtype: str, max_bytes: int | None, vocab: int
) -> None:
    random = torch.Generator().manual_seed(vocab)
    weight = (torch.randn((vocab, HIDDEN), generator=random) * 0.05).half()
    emitter = EMITTERS[dialect](max_matrix_bytes=max_bytes)
    with WeightFile(tmp_path / "w.data") as file:
        stored = emitter.store_head(file, weight, dtype)
    assert stored.out_features == vocab
    x = np.random.default_rng(0).standard_normal((3, HIDDEN)).astype(np.float16)
    found, model = run_linear(tmp_path, emitter, stored, x, "w")
    exact = weight.double().numpy() if dtype == "fp16" else rounded(weight, dtype, 119)
    expected = x.astype(np.float64) @ exact.T
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 2e-3
    pieces = 1 if max_bytes is None else -(-vocab // COLUMN_MULTIPLE)
    products = {"fp16": 1, "int8": 2, "int4": 1}[dtype] * pieces
    assert len([node for node in model.graph.node if node.op_type == "MatMul"]) == products


@pytest.mark.parametrize("max_bytes", [None, HIDDEN // 2 * 64])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dialect", EMITTERS)
def test_a_quantized_linear_in_pieces_is_the_same_linear(
    tmp_path: Path, dialect: str, symmetric: bool, max_bytes: int | None
) -> None:
    random = torch.Generator().manual_seed(0)
    linears = []
    prequant = (0.5 + torch.rand(HIDDEN, generator=random)).half()
    for rows in (130, 71):
        q = torch.randint(0, 16, (rows, HIDDEN), generator=random, dtype=torch.uint8)
        zero = torch.randint(0, 16, (rows, 3), generator=random, dtype=torch.uint8)
        zero = torch.full_like(zero, 8) if symmetric else zero
        scale = torch.rand((rows, 3), generator=random).half() * 0.01 + 0.001
        bias = torch.randn(rows, generator=random).half()
        linears.append(QuantizedLinear(q, scale, zero, bias=bias, prequant_scale=prequant))
    emitter = EMITTERS[dialect](max_matrix_bytes=max_bytes)
    with WeightFile(tmp_path / "w.data") as file:
        stored = emitter.store_linear(file, "linear", linears)
    x = np.random.default_rng(0).standard_normal((5, HIDDEN)).astype(np.float16)
    found, model = run_linear(tmp_path, emitter, stored, x, "w")
    weight = torch.cat([replace(each, prequant_scale=None).dequantize() for each in linears])
    bias = torch.cat([each.bias for each in linears if each.bias is not None])
    scaled = x.astype(np.float64) * prequant.double().numpy()
    expected = scaled @ weight.double().numpy().T + bias.double().numpy()
    assert np.abs(found - expected).max() < 3e-3 * np.abs(expected).max()
    # What concerns the input is computed once, however many pieces there are.
    operators = [node.op_type for node in model.graph.node]
    assert operators.count("Mul") == 1
    assert operators.count("ReduceMean") == (0 if symmetric else 1)
    assert operators.count("DequantizeLinear") == (1 if max_bytes is None else 4)


class ShapesOnly:
    """A WeightFile that keeps no bytes, for matrices at true sizes."""

    def append(self, array: Any) -> StoredTensor:
        return StoredTensor("none", TensorProto.FLOAT16, array.shape, 0, array.nbytes)


@pytest.mark.parametrize("model", RELEASED)
@pytest.mark.parametrize("dialect", EMITTERS)
def test_no_matmul_of_a_released_models_head_is_large(model: str, dialect: str) -> None:
    config = preset(model, "int4").llm
    weight = torch.empty((config.vocab_size, config.hidden_size), dtype=torch.float16)
    emitter = EMITTERS[dialect](max_matrix_bytes=MAX_MATRIX_BYTES)
    stored: Any = emitter._store_float(ShapesOnly(), "lm_head", weight.numpy(), None)  # type: ignore[arg-type]
    pieces = stored.parts or (stored,)
    assert sum(piece.out_features for piece in pieces) == config.vocab_size
    assert max(piece.tensors["weight"].size_bytes for piece in pieces) <= ISSUE_LIMIT_BYTES


CHECKPOINTS: dict[str, dict[str, Any]] = {
    "int4 with zero points": {"quantized": True, "kv_heads": 2, "vocab": 401},
    "Qwen2, two scales": {
        "quantized": True,
        "qwen2": True,
        "scales": 2,
        "image": 70,
        "root_config": {"s2": True, "s2_scales": "70,140", "s2_max_split_size": 70},
        "preprocessor_config": {"size": {"height": 140, "width": 140}},
    },
    "fp16": {},
}


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("dialect", EMITTERS)
def test_each_matmul_of_weights_is_small_and_reads_rows(
    tmp_path: Path, dialect: str, name: str
) -> None:
    """No reshape stands between a DequantizeLinear and its MatMul, nor is one implied by ranks."""
    limit = 128 * 2 * COLUMN_MULTIPLE
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "c", **CHECKPOINTS[name]))
    write_engine(tmp_path / "e", checkpoint, dialect, max_matrix_bytes=limit)
    file = tmp_path / "e" / files.LLM / files.GRAPH
    model = onnx.shape_inference.infer_shapes(
        onnx.load(file, load_external_data=False), check_type=True, strict_mode=True
    )
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in model.graph.value_info}
    weights = {t.name: t for t in model.graph.initializer}
    readers: dict[str, list[Any]] = {}
    dequantized = {}
    for node in model.graph.node:
        for value in node.input:
            readers.setdefault(value, []).append(node)
        if node.op_type == "DequantizeLinear":
            dequantized[node.output[0]] = weights[node.input[0]]
    matrices = 0
    for node in model.graph.node:
        if node.op_type != "MatMul" or node.input[1] not in (*dequantized, *weights):
            continue
        x, matrix = node.input
        weight = dequantized.get(matrix) or weights[matrix]
        assert ranks[x] == len(weight.dims) == 2
        bits = 4 if weight.data_type == TensorProto.INT4 else 16
        assert np.prod(weight.dims) * bits <= 8 * limit
        matrices += 1
    for value in dequantized:
        (reader,) = readers[value]
        assert (reader.op_type, reader.input[1]) == ("MatMul", value)
    assert matrices > len(checkpoint.config.llm.linears) * checkpoint.config.llm.num_layers
    for module in graphs.modules_of(checkpoint.config)[:-1]:
        model = onnx.load(tmp_path / "e" / module / files.GRAPH, load_external_data=False)
        matrix_sizes = [2 * np.prod(t.dims) for t in model.graph.initializer if len(t.dims) == 2]
        assert max(matrix_sizes) <= limit
