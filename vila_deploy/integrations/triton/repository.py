"""Write a Triton model repository around an engine: config.pbtxt and the Python backend's model.

Source: docs/user_guide/model_configuration.md of triton-inference-server/server.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from vila_deploy.engine.manifest import read_manifest
from vila_deploy.utils.errors import VilaDeployError, check_at_least
from vila_deploy.utils.files import new_folder

MODEL, VERSION, ENGINE = "vila", "1", "engine"
CPU_BACKENDS = ("onnxruntime",)
DEFAULT_SLOTS = 8
MODEL_PY = '''\
"""Triton loads this file; the model itself is vila-deploy's."""

import os
import sys

# The server's Python does not look there by itself.
sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))

from vila_deploy.integrations.triton.python_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


@dataclass(frozen=True)
class Tensor:
    """An input or output: Triton's type, and whether it has any number of values or one."""

    name: str
    data_type: str
    several: bool = False
    optional: bool = True

    def text(self) -> str:
        """Return it as config.pbtxt has it."""
        optional = " optional: true" if self.optional else ""
        size = -1 if self.several else 1
        return f'{{ name: "{self.name}" data_type: {self.data_type} dims: [ {size} ]{optional} }}'


INPUTS = (
    Tensor("text_input", "TYPE_STRING", optional=False),
    Tensor("image", "TYPE_STRING", several=True),
    Tensor("system", "TYPE_STRING"),
    Tensor("stream", "TYPE_BOOL"),
    Tensor("max_tokens", "TYPE_INT32"),
    Tensor("temperature", "TYPE_FP32"),
    Tensor("top_p", "TYPE_FP32"),
    Tensor("top_k", "TYPE_INT32"),
    Tensor("seed", "TYPE_INT64"),
    Tensor("stop", "TYPE_STRING", several=True),
)
OUTPUTS = (
    Tensor("text_output", "TYPE_STRING", optional=False),
    Tensor("finish_reason", "TYPE_STRING", optional=False),
)


def write_repository(engine: Path, out: Path, slots: int = DEFAULT_SLOTS) -> None:
    """Write the model repository `out`, whose one model answers with the engine where it lies.

    Args:
        slots: sequences that are answered at once.

    Raises:
        VilaDeployError: no finished engine, one with random weights, or `out` exists.
    """
    manifest = read_manifest(engine)
    if manifest.pending_steps:
        raise VilaDeployError(
            "is not finished", where=engine, fix="finish it with vila-build-engine on the device"
        )
    if manifest.weights != "trained":
        raise VilaDeployError(
            "has random weights and no tokenizer", where=engine, fix="build one of a checkpoint"
        )
    check_at_least("slots", slots, 1)
    kind = "KIND_CPU" if manifest.backend in CPU_BACKENDS else "KIND_GPU"
    with new_folder(out) as folder:
        version = folder / MODEL / VERSION
        version.mkdir(parents=True)
        (version / "model.py").write_text(MODEL_PY, "utf-8")
        config = model_config(engine.resolve(), slots, kind)
        (folder / MODEL / "config.pbtxt").write_text(config, "utf-8")


def model_config(engine: Path, slots: int, kind: str) -> str:
    """Return config.pbtxt of a model that sends any number of responses to a request.

    Args:
        engine: folder; where it lies relative to the model's folder will do too.
        kind: of instance, KIND_CPU or KIND_GPU.
    """
    inputs = ",\n".join(f"  {tensor.text()}" for tensor in INPUTS)
    outputs = ",\n".join(f"  {tensor.text()}" for tensor in OUTPUTS)
    parameters = {ENGINE: str(engine), "slots": str(slots)}
    entries = ",\n".join(
        f'  {{ key: "{name}" value: {{ string_value: {json.dumps(value)} }} }}'
        for name, value in parameters.items()
    )
    return (
        f'name: "{MODEL}"\nbackend: "python"\nmax_batch_size: 0\n'
        "model_transaction_policy { decoupled: true }\n"
        f"input [\n{inputs}\n]\noutput [\n{outputs}\n]\nparameters [\n{entries}\n]\n"
        # Several sequences share one engine: its scheduler batches them, not several instances.
        f"instance_group [ {{ count: 1 kind: {kind} }} ]\n"
    )
