"""Engine folders and graph checks that the tests of TensorRT share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto

from tests.support.paths import GOLDEN
from vila_deploy.backends.tensorrt import files, graphs
from vila_deploy.backends.tensorrt.backend import write_description
from vila_deploy.backends.tensorrt.compilers import COMPILERS
from vila_deploy.engine.build_request import BuildRequest
from vila_deploy.engine.manifest import Limits, Manifest
from vila_deploy.engine.model_info import ModelInfo
from vila_deploy.engine.precision import ALL_FP16, ModulePrecision
from vila_deploy.engine.target import get_target

needs_rtx = pytest.mark.skipif(
    not COMPILERS["tensorrt-rtx"].present, reason="needs the package tensorrt-rtx"
)


MAX_SEQ_LEN = 160


# dialect → target that takes it, JetPack, package, version
DIALECTS = {
    "standard": ("rtx4090", None, "tensorrt-rtx", "1.7.1"),
    "primitive": ("orin", "6", "tensorrt", "10.3.0"),
}


def write_engine(
    folder: Path,
    checkpoint: Any,
    dialect: str,
    max_batch_size: int = 1,
    module_precision: ModulePrecision = ALL_FP16,
    max_matrix_bytes: int | None = None,
) -> Manifest:
    """Write an engine folder whose plans are paths of the graphs."""
    folder.mkdir()
    name, jetpack, package, version = DIALECTS[dialect]
    config, target = checkpoint.config, get_target(name)
    limits = Limits(max_batch_size, MAX_SEQ_LEN, MAX_SEQ_LEN)
    write_description(folder, config, BuildRequest(target, limits, jetpack=jetpack))

    def advance(text: str = "", steps: int = 1) -> None: ...

    vision, head = module_precision.vision, module_precision.lm_head
    weights = checkpoint.vision, checkpoint.projector
    largest = max_matrix_bytes
    graphs.write_vision(folder, config, *weights, dialect, advance, vision, largest)
    size = graphs.write_llm(
        folder, config, checkpoint.llm, MAX_SEQ_LEN, dialect, advance, head,
        max_matrix_bytes=largest,
    )  # fmt: skip
    for module in graphs.modules_of(config):
        (folder / module / files.PLAN).write_text(str(folder / module / files.GRAPH))
    return Manifest(
        name="tiny",
        target=name,
        backend="tensorrt",
        precision="int4",
        weights="trained",
        weight_bytes_per_token=size,
        checkpoint_fingerprint=None,
        limits=limits,
        model=ModelInfo.from_config(config, None),
        versions={package: version, files.CAPABILITY: str(target.compute_capability)},
    )


KNOWN = json.loads((GOLDEN / "tensorrt_10_operators.json").read_text("utf-8"))["operators"]


NAMES = {
    TensorProto.FLOAT: "FP32", TensorProto.FLOAT16: "FP16", TensorProto.INT64: "INT64",
    TensorProto.BOOL: "BOOL", TensorProto.INT4: "INT4",
}  # fmt: skip


# These take their shape or axes as constants only; Conv with computed factors loses its kernel's.
CONSTANT_ARGUMENTS = {
    "ReduceMean": [1], "Unsqueeze": [1], "Slice": [1, 2, 3], "Pad": [1, 3], "Conv": [1, 2],
}  # fmt: skip


def refusals(model: onnx.ModelProto) -> list[str]:
    """Return what TensorRT 10.3's parser would refuse."""
    model = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    constants = {tensor.name for tensor in model.graph.initializer}
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        types[value.name] = value.type.tensor_type.elem_type
    found = [
        f"opset {o.domain}:{o.version}" for o in model.opset_import if o.domain or o.version > 21
    ]
    for node in model.graph.node:
        if node.domain or node.op_type not in KNOWN:
            found.append(f"operator {node.domain}:{node.op_type}")
            continue
        for index in CONSTANT_ARGUMENTS.get(node.op_type, []):
            if len(node.input) > index and node.input[index] not in constants:
                found.append(f"{node.op_type} with computed input {index}")
        if node.op_type == "DequantizeLinear" and len(node.input) > 2:
            found.append("a zero point")
        data = [node.input[0]] if node.op_type in ("DequantizeLinear", "Gather") else node.input
        for name in data:
            kind = NAMES.get(types[name], str(types[name]))
            shape_argument = name in constants and kind == "INT64"
            if not shape_argument and kind not in KNOWN[node.op_type] and kind != "BOOL":
                found.append(f"{node.op_type} of {kind}")
            if kind == "INT4" and node.op_type != "DequantizeLinear":
                found.append(f"{node.op_type} of INT4")
    return found
