"""Load an engine's weights onto the device, once it is known to be the right one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from vila_deploy.backends.native import files
from vila_deploy.backends.native.decode_step import StepConfig
from vila_deploy.backends.native.memory import EMBEDDINGS, STORAGE, VISION
from vila_deploy.backends.native.model_file import Prescales, read_model
from vila_deploy.backends.native.offload import stream_layers
from vila_deploy.backends.native.pinned import pinned
from vila_deploy.backends.native.tower import load_encoder
from vila_deploy.backends.native.weights import (
    PackedLlm,
    Shard,
    empty_llm,
    map_tensors,
    shard_names,
    with_prescales,
)
from vila_deploy.engine.manifest import Manifest
from vila_deploy.engine.memory import cache_item
from vila_deploy.engine.target import get_target
from vila_deploy.kernels.capability import INTERPRETER, ComputeCapability
from vila_deploy.kernels.interpreter import INTERPRETED
from vila_deploy.kernels.launch_mode import possible_modes
from vila_deploy.model.vision import VisionEncoder
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.estimates import available_memory_bytes

HOST = "host"


def vision_dtype(device: str) -> torch.dtype:
    """Return the precision that the tower is fast in there."""
    return torch.float32 if device == "cpu" else torch.float16


def check_memory(folder: Path, manifest: Manifest, slots: int) -> None:
    """Raise VilaDeployError unless weights and `slots` caches fit into free memory.

    Before anything is loaded; on a CPU it is the computer's memory.
    """
    device, _ = find_device()
    model, limits = read_model(folder / files.MODEL), replace(manifest.limits, max_batch_size=slots)
    dtype = manifest.module_precision.kv_cache
    cache = cache_item(model.config.llm, limits, STORAGE, dtype).bytes
    weights = sum(file.stat().st_size for file in (folder / files.LLM).iterdir())
    if EMBEDDINGS in model.in_host_memory:
        weights -= 2 * model.config.llm.vocab_size * model.config.llm.hidden_size
    if VISION not in model.in_host_memory:
        weights += (folder / files.VISION).stat().st_size
    free = free_memory_bytes(device)
    if weights + cache > free:
        caches = "the key/value cache takes" if slots == 1 else f"the caches of {slots} slots take"
        raise VilaDeployError(
            f"{caches} {cache / 1e9:.1f} GB beside {weights / 1e9:.1f} GB of weights, "
            f"{free / 1e9:.1f} GB are free",
            where=folder,
            fix="ask for fewer slots, or build the engine with a smaller --max-seq-len or "
            "--kv-cache int8",
        )


def free_memory_bytes(device: str) -> int:
    """Return the free bytes of the GPU, or of the computer for device cpu."""
    if device == "cpu":
        return available_memory_bytes()
    # What torch keeps of an engine that was closed is free too.
    torch.cuda.empty_cache()
    free: int = torch.cuda.mem_get_info()[0]
    return free


def find_device() -> tuple[str, ComputeCapability]:
    """Return torch's name of the device and its compute capability, or INTERPRETER.

    Raises:
        VilaDeployError: torch has no CUDA, or finds no GPU.
    """
    if INTERPRETED:
        return "cpu", INTERPRETER
    if torch.version.cuda is None:
        raise VilaDeployError(
            f"backend native needs torch with CUDA, {torch.__version__} is built without",
            fix="install it on the target, or set TRITON_INTERPRET=1 to try it slowly on the CPU",
        )
    if not torch.cuda.is_available():
        raise VilaDeployError(
            "backend native needs a CUDA GPU, and torch finds none here",
            fix="open it on the target (nvidia-smi says whether the driver works and how new it "
            "is), or set TRITON_INTERPRET=1 to try it slowly on the CPU",
        )
    return "cuda", ComputeCapability(*torch.cuda.get_device_capability())


def _check_capability(target: str, here: ComputeCapability) -> None:
    if here == INTERPRETER:
        return
    asked = get_target(target).compute_capability
    if str(here) != asked:
        raise VilaDeployError(
            f"was built for target {target} with compute capability {asked}, this GPU has {here}",
            fix="build it with the --target of this GPU",
        )


def load_weights(folder: Path, manifest: Manifest) -> tuple[StepConfig, PackedLlm, VisionEncoder]:
    """Return an engine's decoder and vision encoder on the device.

    Raises:
        VilaDeployError: no CUDA GPU, or one of another compute capability than the target's.
    """
    device, capability = find_device()
    _check_capability(manifest.target, capability)
    max_seq_len, modules = manifest.limits.max_seq_len, manifest.module_precision
    model = read_model(folder / files.MODEL)
    config, in_host_memory = model.config, model.in_host_memory
    empty = empty_llm(config.llm, max_seq_len, lm_head=modules.lm_head)
    table_at = HOST if EMBEDDINGS in in_host_memory else device
    llm = _load_llm(folder, empty, model.norm_prescales, device, table_at)
    encoder = load_encoder(load_file(folder / files.VISION), config, vision_dtype(device))
    move = stream_layers if VISION in in_host_memory else VisionEncoder.to
    modes = possible_modes(model.kernel_launch, capability)
    step_config = StepConfig(config.llm, max_seq_len, capability, device, *modes)
    return step_config, llm, move(encoder, device)


def _load_llm(
    folder: Path, empty: PackedLlm, prescales: Prescales, device: str, table_at: str
) -> PackedLlm:
    """Return the decoder on `device`, its embedding table there or in HOST memory."""

    def load(name: str, shard: Shard) -> Shard:
        # What isn't for the device must not pass through its memory either.
        stored = load_file(folder / files.LLM / files.shard_file(name))

        def take(tensor: str, _: Tensor) -> Tensor:
            value = stored.pop(tensor)
            if tensor == "table" and table_at == HOST:
                return pinned(value, device)
            return value.to(device)

        return with_prescales(map_tensors(shard, take), prescales[name])

    *names, rest = shard_names(len(empty.layers))
    layers = tuple(load(name, layer) for name, layer in zip(names, empty.layers, strict=True))
    return replace(load(rest, replace(empty, layers=())), layers=layers)
