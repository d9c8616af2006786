"""NVIDIA's exporter over folders of backend edge-llm: it takes them whole, and their very values.

Needs tensorrt-edgellm-export on PATH, from an environment with tensorrt-edgellm[export].
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.support.baseline_environment import make_model, round_checkpoint
from tests.support.tiny import make_checkpoint
from vila_deploy.backends.edge_llm import files
from vila_deploy.backends.edge_llm.exporter import EXPORTER
from vila_deploy.builder.build import build_engine
from vila_deploy.builder.resolve import BuildOptions
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.formats.base import QuantizedLinear, QuantScheme
from vila_deploy.formats.tinychat import TinychatV2

pytestmark = [
    pytest.mark.skipif(shutil.which(EXPORTER) is None, reason=f"needs {EXPORTER}"),
    pytest.mark.slow,
]
SIZES: dict[str, Any] = {"hidden": 256, "heads": 4, "kv_heads": 2, "intermediate": 512}
OPTIONS = BuildOptions("orin", "edge-llm", max_seq_len=256)
SYMMETRIC = QuantScheme(128, symmetric=True)


def exported(root: Path, out: Path) -> onnx.ModelProto:
    """Build and finish an engine with the real exporter; return its graph with weights."""
    build_engine(root, out, OPTIONS)
    if not (out / files.EXPORTED).exists():
        build_engine(out, out, OPTIONS)
    return onnx.load(out / files.EXPORTED / files.LLM / files.GRAPH)


@pytest.mark.parametrize(("qwen2", "vocab"), [(False, 401), (True, 384)])
def test_repacked_values_and_scales_are_ours(tmp_path: Path, qwen2: bool, vocab: int) -> None:
    """The plugin's layout is TinyChat's: [out/4, in] int16, viewed as int8 [out/2, in]."""
    root = make_checkpoint(tmp_path / "fp16", **SIZES, qwen2=qwen2, vocab=vocab)
    root = round_checkpoint(root, tmp_path / "int4", ["awq"], SYMMETRIC)
    graph = exported(root, tmp_path / "e").graph
    stored = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    found = []
    for node in graph.node:
        if node.op_type == "Int4GroupwiseGemmPlugin":
            _, weight, scale = node.input[:3]
            found.append((stored[weight].tobytes(), stored[scale].astype(np.float16).tobytes()))
    llm, config = open_checkpoint(root).llm, open_checkpoint(root).config.llm
    expected = []
    for index in range(config.num_layers):
        for name in config.layer_linears(index):
            linear = llm.linear(name)
            assert isinstance(linear, QuantizedLinear)
            packed = TinychatV2().pack(linear)["qweight"]
            scale = linear.scale.T.contiguous()
            expected.append((packed.numpy().tobytes(), scale.numpy().tobytes()))
    assert len(found) == 7 * config.num_layers
    assert sorted(found) == sorted(expected)
    assert len(set(expected)) == len(expected)


def test_a_real_model_in_float16(tmp_path: Path) -> None:
    """SmolLM2's sizes have no groups of 128: it is exported as it is, and refused in 4 bits."""
    root = make_model("SmolLM2", tmp_path / "fp16")
    graph = exported(root, tmp_path / "e").graph
    stored = {t.name: tuple(t.dims) for t in graph.initializer}
    config = open_checkpoint(root).config.llm
    head = {(config.vocab_size, config.hidden_size), (config.hidden_size, config.vocab_size)}
    assert head & set(stored.values())
    embedding = tmp_path / "e" / files.EXPORTED / files.LLM / files.EMBEDDING
    assert embedding.stat().st_size > 2 * config.vocab_size * config.hidden_size
