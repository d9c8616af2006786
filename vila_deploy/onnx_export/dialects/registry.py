"""Name the dialects: one table from the names in engines/*.toml and tensorrt.json to classes."""

from __future__ import annotations

from collections.abc import Mapping

from vila_deploy.onnx_export.dialects.base import Dialect
from vila_deploy.onnx_export.dialects.onnxruntime import OnnxRuntimeDialect
from vila_deploy.onnx_export.dialects.tensorrt import TensorRtDialect
from vila_deploy.onnx_export.dialects.tensorrt_10_3 import TensorRt10_3Dialect
from vila_deploy.onnx_export.dialects.tensorrt_10_15 import TensorRt10_15Dialect

# The names are persisted; they mean TensorRT from 10.15 and TensorRT from 10.3.
TENSORRT_DIALECTS: Mapping[str, type[TensorRtDialect]] = {
    "standard": TensorRt10_15Dialect,
    "primitive": TensorRt10_3Dialect,
}
DIALECTS: Mapping[str, type[Dialect]] = {"onnxruntime": OnnxRuntimeDialect, **TENSORRT_DIALECTS}
