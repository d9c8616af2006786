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
from tests.support.padded_llm import pad_llm
from tests.support.paths import REPOSITORY
from tests.support.tiny import make_checkpoint
from vila_deploy.backends.edge_llm import files
from vila_deploy.backends.edge_llm.exporter import EXPORTER
from vila_deploy.builder.build import build_engine
from vila_deploy.builder.resolve import BuildOptions
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.formats.base import QuantizedLinear, QuantScheme
from vila_deploy.formats.tinychat import TinychatV2
from vila_deploy.model.vila import ReferenceSession

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


def quantized(name: str, folder: Path) -> Path:
    """A checkpoint rounded to 4 bits, symmetric and in groups of 128."""
    if name == "tiny-vila":
        root = REPOSITORY / "examples" / "tiny-vila" / "checkpoint"
    elif name == "SmolLM2, padded":
        root = pad_llm(make_model("SmolLM2", folder / "smollm2"), folder / "fp16")
    else:
        sizes = {**SIZES, "vocab": 401} if name == "Llama, odd vocabulary" else SIZES
        root = make_checkpoint(folder / "fp16", **sizes, qwen2=name == "Qwen2")
    return round_checkpoint(root, folder / "int4", ["awq"], SYMMETRIC)


@pytest.mark.parametrize("name", ["Llama, odd vocabulary", "Qwen2", "tiny-vila", "SmolLM2, padded"])
def test_repacked_values_and_scales_are_ours(tmp_path: Path, name: str) -> None:
    """The plugin's layout is TinyChat's: [out/4, in] int16, viewed as int8 [out/2, in]."""
    root = quantized(name, tmp_path)
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


def test_padding_changes_no_logits(tmp_path: Path) -> None:
    """Against the float16 that the weights are in."""
    root = make_model("SmolLM2", tmp_path / "smollm2")
    ids, logits = [1, 500, 600, 42, 7, 9, 1000], []
    for folder in (root, pad_llm(root, tmp_path / "padded")):
        session = ReferenceSession(open_checkpoint(folder))
        logits.append(session.prefill(session.embed_tokens(ids)))
    error = np.abs(logits[0] - logits[1]).max() / np.abs(logits[0]).max()
    assert error < 2e-3
    assert logits[0].argmax() == logits[1].argmax()


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
