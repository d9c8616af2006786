"""How many layers of a model a GPU holds, with their caches."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from vila_deploy.backends.llamacpp.library import GpuDevice
from vila_deploy.backends.llamacpp.memory import cache_bytes, scratch_bytes, shape_in_file
from vila_deploy.checkpoint.gguf_layout import ENDS
from vila_deploy.checkpoint.llm_config import EMBEDDING, HEAD
from vila_deploy.engine.manifest import Manifest
from vila_deploy.formats.gguf_file import read_header

LAYER = re.compile(r"blk\.(\d+)\.")
# Of a GPU's free memory; other programs and the driver need some too.
GPU_SHARE = 0.9


def resolve_gpu_layers(path: Path, manifest: Manifest, slots: int, gpu: GpuDevice | None) -> int:
    """Return how many layers of the engine go on `gpu`, the head counted as the last one.

    Args:
        path: of the GGUF file.
    """
    if gpu is None:
        return 0
    if manifest.gpu_layers is not None:
        return manifest.gpu_layers
    header = read_header(path)
    sizes = {name: tensor.bytes for name, tensor in header.tensors.items()}
    shape, length = shape_in_file(header.metadata), manifest.limits.max_seq_len
    cache = slots * cache_bytes(shape, length, manifest.module_precision.kv_cache)
    room = int(gpu.free_bytes * GPU_SHARE) - scratch_bytes(shape, length)
    return layers_that_fit(sizes, cache, room)


def layers_that_fit(sizes: Mapping[str, int], cache_bytes: int, room_bytes: int) -> int:
    """Return how many layers fit, the head counted as the last one.

    Args:
        sizes: bytes of all tensors, by their names in a GGUF file.
        cache_bytes: keys and values of one layer.
    """
    layers: dict[int, int] = {}
    for name, size in sizes.items():
        if found := LAYER.match(name):
            index = int(found[1])
            layers[index] = layers.get(index, cache_bytes) + size
    # A tied head is the embedding table, which is then held twice.
    head = sizes.get(ENDS[HEAD], sizes[ENDS[EMBEDDING]])
    # llama.cpp puts the last layers on the GPU, the head first of all.
    count = 0
    for size in [head, *(layers[index] for index in sorted(layers, reverse=True))]:
        room_bytes -= size
        if room_bytes < 0:
            break
        count += 1
    return count
