"""Run an engine on a GPU; numpy in and out, every buffer allocated once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vila_deploy.backends.tensorrt import cuda, files
from vila_deploy.backends.tensorrt.compilers import COMPILERS
from vila_deploy.backends.tensorrt.cuda_engine import CudaEngine
from vila_deploy.backends.tensorrt.decoder import Decoder
from vila_deploy.engine.manifest import Manifest
from vila_deploy.processing.s2 import merge_s2_blocks, s2_features
from vila_deploy.utils.arrays import Floats
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.files import read_json_object


class TensorRtSession:
    """Run an engine folder; implements `vila_deploy.engine.session.SequenceSession`."""

    def __init__(self, folder: Path, manifest: Manifest):
        model, limits = manifest.model, manifest.limits
        trt = _checked_package(folder, manifest)
        self.position, self.max_seq_len = 0, limits.max_seq_len
        self._table = np.load(folder / files.EMBEDDING, mmap_mode="r")
        self._tiling = model.tiling
        self._stream = cuda.Stream()
        self._vision = _Encoder(trt, folder / files.VISION, self._stream)
        self._projector = None
        if self._tiling.uses_s2:
            self._projector = _Encoder(trt, folder / files.PROJECTOR, self._stream)
        llm = folder / files.LLM
        engine = CudaEngine(trt, llm / files.PLAN, llm / files.RUNTIME_CACHE)
        self._decoder = Decoder(engine, model, limits, self._stream)

    def encode_images(self, pixels: Floats, grid: tuple[int, int] | None = None) -> Floats:
        """Return features [images, tokens, hidden] of tiles [tiles, 3, size, size], one by one."""
        features = self._vision.run_each(pixels)
        if self._projector is None:
            return features
        blocks = s2_features(features, self._tiling, grid)
        return merge_s2_blocks(self._projector.run_each(blocks), self._tiling, grid)

    def embed_tokens(self, tokens: Sequence[int]) -> Floats:
        return self._table[np.asarray(tokens, np.int64)].astype(np.float32)

    def prefill(self, embeds: Floats) -> Floats:
        """Append [tokens, hidden] to the cache; return logits of the last token [vocab]."""
        for start in range(0, len(embeds), self._decoder.chunk):
            logits = self._append(embeds[start : start + self._decoder.chunk])
        return logits

    def decode(self, token: int) -> Floats:
        return self._append(self.embed_tokens([token]))

    def _append(self, embeds: Floats) -> Floats:
        logits = self._decoder.append(embeds, self.position)
        self.position += len(embeds)
        return logits

    def truncate(self, tokens: int) -> None:
        self.position = tokens

    def close(self) -> None:
        """Free the engines, the cache and the stream."""
        for resource in (self._vision, self._projector, self._decoder, self._stream):
            if resource is not None:
                resource.close()


class _Encoder:
    """An engine with one input and one output, run item by item."""

    def __init__(self, trt: Any, folder: Path, stream: cuda.Stream):
        self._stream = stream
        self._engine = CudaEngine(trt, folder / files.PLAN, folder / files.RUNTIME_CACHE)
        self._context = self._engine.context(0, stream)
        self._names = self._engine.names
        self._buffers: list[cuda.Buffer] = []

    def run_each(self, batch: Floats) -> Floats:
        return np.concatenate([self._run(item[None]) for item in batch])

    def _run(self, item: Floats) -> Floats:
        source, target = self._names
        item = np.ascontiguousarray(item, np.float32)
        self._engine.shape(self._context, {source: item.shape})
        output = np.empty(tuple(self._context.get_tensor_shape(target)), np.float32)
        if not self._buffers:
            self._buffers = [cuda.Buffer(item.nbytes), cuda.Buffer(output.nbytes)]
            addresses = (buffer.address for buffer in self._buffers)
            self._engine.bind(self._context, dict(zip(self._names, addresses, strict=True)))
        self._stream.upload(self._buffers[0], item)
        self._engine.run(self._context, self._stream)
        self._stream.download(output, self._buffers[1])
        self._stream.synchronize()
        return output

    def close(self) -> None:
        del self._context
        self._engine.close()
        for buffer in self._buffers:
            buffer.close()


def _checked_package(folder: Path, manifest: Manifest) -> Any:
    """Import the package that compiled the engine and check its version and this GPU."""
    description = read_json_object(folder / files.DESCRIPTION)
    compiler = COMPILERS[description["package"]]
    trt = compiler.load()
    built, here = manifest.versions.get(compiler.package), str(trt.__version__)
    if built != here:
        raise VilaDeployError(
            f"was built with {compiler.package} {built}, here is {here}",
            where=folder,
            fix=f"install {compiler.package} {built}, or build the engine again with this one",
        )
    built_for, found = manifest.versions.get(files.CAPABILITY), cuda.compute_capability()
    if built_for != found:
        raise VilaDeployError(
            f"was built for compute capability {built_for} ({manifest.target}), "
            f"this GPU has {found}",
            where=folder,
            fix="build it again with this GPU's --target",
        )
    return trt
