"""Write a Triton model repository around an engine: config.pbtxt and the Python backend's model."""

from __future__ import annotations

from pathlib import Path

from vila_deploy.backends.tensorrt_llm.releases import release_for
from vila_deploy.engine.manifest import Manifest, read_manifest
from vila_deploy.engine.target import get_target
from vila_deploy.integrations.triton.pbtxt import Tensor, parameters_text, tensors_text
from vila_deploy.integrations.triton.trtllm_config import LLM_MODEL, llm_config
from vila_deploy.utils.errors import VilaDeployError, check_at_least
from vila_deploy.utils.files import new_folder

MODEL, VERSION, ENGINE, SLOTS = "vila", "1", "engine", "slots"
CPU_BACKENDS = ("onnxruntime",)
DEFAULT_SLOTS = 8
# Modules with the class that Triton's Python backend calls.
OWN_SCHEDULER = "vila_deploy.integrations.triton.python_model"
BEFORE_TRTLLM = "vila_deploy.integrations.triton.trtllm_model"
MODEL_PY = '''\
"""Triton loads this file; the model itself is vila-deploy's."""

import os
import sys

# The server's Python does not look there by itself.
sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))

from {module} import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''
INPUTS = (
    Tensor("text_input", "TYPE_STRING", optional=False),
    Tensor("image", "TYPE_STRING", (-1,)),
    Tensor("system", "TYPE_STRING"),
    Tensor("stream", "TYPE_BOOL"),
    Tensor("max_tokens", "TYPE_INT32"),
    Tensor("temperature", "TYPE_FP32"),
    Tensor("top_p", "TYPE_FP32"),
    Tensor("top_k", "TYPE_INT32"),
    Tensor("seed", "TYPE_INT64"),
    Tensor("stop", "TYPE_STRING", (-1,)),
)
OUTPUTS = (
    Tensor("text_output", "TYPE_STRING", optional=False),
    Tensor("finish_reason", "TYPE_STRING", optional=False),
)


def write_repository(engine: Path, out: Path, slots: int = DEFAULT_SLOTS) -> None:
    """Write the model repository `out`, whose model `vila` answers with the engine where it lies.

    Engines of TensorRT-LLM for GPUs that Triton's backend for TensorRT-LLM runs on get a second
    model, in which that backend runs the LLM.

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
    with new_folder(out) as folder:
        write_models(engine.resolve(), manifest, folder, slots)


def write_models(engine: Path, manifest: Manifest, folder: Path, slots: int) -> None:
    """Write the models of a repository into `folder`."""
    kind = "KIND_CPU" if manifest.backend in CPU_BACKENDS else "KIND_GPU"
    config = model_config(engine, slots, kind)
    if not in_trtllm_backend(manifest):
        _write_model(folder / MODEL, config, OWN_SCHEDULER)
        return
    _write_model(folder / MODEL, config, BEFORE_TRTLLM)
    release = release_for(get_target(manifest.target).compute_capability, manifest.target)
    _write_model(folder / LLM_MODEL, llm_config(engine, manifest.limits, release))


def in_trtllm_backend(manifest: Manifest) -> bool:
    """Return whether Triton's own backend for TensorRT-LLM runs the LLM; Jetsons have none."""
    if manifest.backend != "tensorrt-llm":
        return False
    target = get_target(manifest.target)
    return release_for(target.compute_capability, target.name).reuses_cache


def _write_model(folder: Path, config: str, module: str | None = None) -> None:
    """Write a model whose version is empty, or names `module` to the Python backend."""
    version = folder / VERSION
    version.mkdir(parents=True)
    if module is not None:
        (version / "model.py").write_text(MODEL_PY.format(module=module), "utf-8")
    (folder / "config.pbtxt").write_text(config, "utf-8")


def model_config(engine: Path, slots: int, kind: str) -> str:
    """Return config.pbtxt of a model that sends any number of responses to a request.

    Args:
        engine: folder; where it lies relative to the model's folder will do too.
        kind: of instance, KIND_CPU or KIND_GPU.
    """
    return (
        f'name: "{MODEL}"\nbackend: "python"\nmax_batch_size: 0\n'
        "model_transaction_policy { decoupled: true }\n"
        f"{tensors_text('input', INPUTS)}{tensors_text('output', OUTPUTS)}"
        f"{parameters_text({ENGINE: str(engine), SLOTS: str(slots)})}"
        # Several sequences share one engine: its scheduler batches them, not several instances.
        f"instance_group [ {{ count: 1 kind: {kind} }} ]\n"
    )
