"""Graphs of dialect primitive hold nothing that TensorRT 10.3 lacks; all pass the checker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from tests.support.tensorrt_cases import refusals, write_engine
from tests.support.tiny import make_checkpoint
from vila_deploy.backends.tensorrt import files, graphs
from vila_deploy.backends.tensorrt.compile import Job, compile_graph
from vila_deploy.backends.tensorrt.compilers import COMPILERS
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.formats.base import QuantizedLinear
from vila_deploy.onnx_export.dialects.tensorrt_10_15 import TensorRt10_15Dialect
from vila_deploy.onnx_export.graph_writer import GraphWriter, WeightFile

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "siglip, int4": {"quantized": True, "kv_heads": 2},
    "clip, fp16": {"tower": "clip"},
    "internvit, Qwen2": {"tower": "internvit", "qwen2": True, "quantized": True},
    "two scales": {
        "scales": 2,
        "image": 70,
        "root_config": {"s2": True, "s2_scales": "70,140", "s2_max_split_size": 70},
        "preprocessor_config": {"size": {"height": 140, "width": 140}},
    },
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_primitive_graphs_hold_only_what_tensorrt_10_3_parses(tmp_path: Path, name: str) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "c", **CHECKPOINTS[name]))
    write_engine(tmp_path / "primitive", checkpoint, "primitive")
    for module in graphs.modules_of(checkpoint.config):
        file = tmp_path / "primitive" / module / files.GRAPH
        onnx.checker.check_model(file, full_check=True)
        assert refusals(onnx.load(file)) == []


@pytest.mark.skipif(not COMPILERS["tensorrt-rtx"].present, reason="needs the package tensorrt-rtx")
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_real_compiler_takes_primitive_graphs(tmp_path: Path, name: str) -> None:
    """TensorRT-RTX, newer than a board's TensorRT, in its place: it has the same kind of parser."""
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "c", **CHECKPOINTS[name]))
    write_engine(tmp_path / "e", checkpoint, "primitive")
    described = json.loads((tmp_path / "e" / files.DESCRIPTION).read_text("utf-8"))
    for module in graphs.modules_of(checkpoint.config):
        folder, profile = tmp_path / "e" / module, described["profiles"][module][:1]
        job = Job(folder / files.GRAPH, folder / "compiled", profile, "8.9")
        compile_graph(COMPILERS["tensorrt-rtx"], job, lambda text="", steps=1: None)
        assert job.plan.stat().st_size > 100_000


def test_the_check_finds_what_is_not_there(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "c", quantized=True))
    write_engine(tmp_path / "standard", checkpoint, "standard")
    file = tmp_path / "standard" / files.LLM / files.GRAPH
    onnx.checker.check_model(file, full_check=True)
    found = set(refusals(onnx.load(file)))
    assert found >= {"opset :24", "operator :RMSNormalization", "operator :Attention"}
    assert found >= {"operator :TensorScatter", "operator :RotaryEmbedding"}


def test_weights_of_four_bits_take_four_bits(tmp_path: Path) -> None:
    """And zero points 16 more for each group; without them nothing is added."""
    random = torch.Generator().manual_seed(0)
    q = torch.randint(0, 16, (48, 256), generator=random, dtype=torch.uint8)
    scale = torch.rand((48, 4), generator=random).half() * 0.01
    x = np.random.default_rng(0).standard_normal((1, 5, 256)).astype(np.float16)
    for zero in (torch.full((48, 4), 8, dtype=torch.uint8), torch.arange(192).reshape(48, 4) % 16):
        linear = QuantizedLinear(q, scale, zero.to(torch.uint8), bias=torch.arange(48).half())
        graph, dialect = GraphWriter(24), TensorRt10_15Dialect()
        name = f"{int(zero[0, 0])}"
        with WeightFile(tmp_path / f"{name}.data") as file:
            stored = dialect.store_linear(file, "linear", [linear])
        assert stored.tensors["weight"].size_bytes == 48 * 256 // 2
        assert ("correction" in stored.tensors) == (not linear.symmetric)
        assert (stored.out_features, stored.in_features) == (48, 256)
        graph.input("x", np.float16, [1, 5, 256])
        y = dialect.linear(graph, "x", stored)
        graph.output(graph.node("Identity", y, output="y"), np.float16, [1, 5, 48])
        graph.save(tmp_path / f"{name}.onnx")
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        run = onnxruntime.InferenceSession(
            tmp_path / f"{name}.onnx", options, providers=["CPUExecutionProvider"]
        )
        expected = x.astype(np.float64) @ linear.dequantize().double().numpy().T + np.arange(48)
        error = np.abs(run.run(None, {"x": x})[0] - expected).max()
        assert error < 2e-3 * np.abs(expected).max()


def test_int4_is_written_low_half_first(tmp_path: Path) -> None:
    """As ONNX lays it out, read back by onnx itself."""
    quantized = torch.arange(256, dtype=torch.uint8).reshape(16, 16) % 16
    linear = QuantizedLinear(
        quantized, torch.ones(16, 1).half(), torch.full((16, 1), 8, dtype=torch.uint8)
    )
    with WeightFile(tmp_path / "w.data") as file:
        stored = TensorRt10_15Dialect().store_linear(file, "linear", [linear])
    graph = GraphWriter(24)
    weight = graph.weight("w", stored.tensors["weight"])
    graph.output(graph.node("Cast", weight, to=TensorProto.FLOAT, output="y"), np.float32, [16, 16])
    graph.save(tmp_path / "w.onnx")
    (found,) = onnx.load(tmp_path / "w.onnx").graph.initializer
    values = onnx.numpy_helper.to_array(found).astype(np.int32)
    assert (values == quantized.T.numpy().astype(np.int32) - 8).all()
    assert helper.tensor_dtype_to_string(found.data_type) == "TensorProto.INT4"
