"""Run the LLM's engine with its cache: prompts in chunks, single tokens as a CUDA graph."""

from __future__ import annotations

from typing import Any

import numpy as np

from vila_deploy.backends.tensorrt.cuda import Buffer, Pinned, Stream
from vila_deploy.backends.tensorrt.cuda_engine import CudaEngine
from vila_deploy.engine.manifest import Limits
from vila_deploy.engine.model_info import ModelInfo
from vila_deploy.utils.arrays import Floats
from vila_deploy.utils.errors import VilaDeployError

# Tokens of a prompt that one pass of the engine takes.
PREFILL_TOKENS = 256
# Indices of the engine's profiles; engines of tensorrt-rtx have one for both.
DECODE, PREFILL = 0, -1
# tensorrt-rtx makes kernels for each length of a chunk that it meets, in the background, and keeps
# them in a cache: a few lengths are enough, since tokens behind the last one are padding.
PADDED_LENGTHS = (16, 64, PREFILL_TOKENS)
# Runs before a CUDA graph is captured, so that all kernels are loaded by then.
RUNS_BEFORE_CAPTURE = 2
ALIGNMENT_BYTES = 256
NEW_CACHE = "new_cache"
HALF_BYTES = np.dtype(np.float16).itemsize


class Decoder:
    """Append tokens to one sequence's cache.

    The cache is one buffer, keys and values of each layer in turn, each
    [1, kv_heads, max_seq_len, head_dim] float16. Engines of dialect standard update it in place
    (present_key_0 is bound to the memory of past_key_0); those of dialect primitive return the new
    rows, which are then copied into it.
    """

    def __init__(self, engine: CudaEngine, model: ModelInfo, limits: Limits, stream: Stream):
        self._engine, self._stream = engine, stream
        self.chunk = min(PREFILL_TOKENS, limits.max_input_len)
        self._hidden, self._layers = model.hidden_size, model.num_layers
        self._kv_heads, self._head_dim = model.num_kv_heads, model.head_dim
        self._max_seq_len = limits.max_seq_len
        self._in_place = NEW_CACHE not in engine.names
        self._host = (
            Pinned((self.chunk, self._hidden), np.float32),
            Pinned((self.chunk,), np.int64),
            Pinned((1,), np.int64),
        )
        self._logits = Pinned((model.vocab_size,), np.float32)
        inputs = ("inputs_embeds", "positions", "last")
        self._device = {
            name: Buffer(pinned.array.nbytes)
            for name, pinned in zip(inputs, self._host, strict=True)
        }
        self._device["logits"] = Buffer(self._logits.array.nbytes)
        rows = self._kv_heads * self._max_seq_len * self._head_dim * HALF_BYTES
        self._stride = -(-rows // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        self._cache = Buffer(2 * self._layers * self._stride)
        if not self._in_place:
            self._device[NEW_CACHE] = Buffer(2 * self._layers * self._new_bytes(self.chunk))
        # Uninitialized memory may hold NaN, which a mask does not remove.
        stream.zero(self._cache)
        self._contexts = {profile: self._bound_context(profile) for profile in (DECODE, PREFILL)}
        self._decoded, self._cuda_graph, self._capturable = 0, None, True

    def append(self, embeds: Floats, position: int) -> Floats:
        """Append [tokens, hidden] at `position` and return the last token's logits [vocab]."""
        count = len(embeds)
        profile = DECODE if count == 1 else PREFILL
        context = self._contexts[profile]
        length = self._padded_length(count, position)
        host_embeds, host_positions, host_last = (pinned.array for pinned in self._host)
        host_embeds[:count], host_embeds[count:length] = embeds, 0
        host_positions[:length] = np.arange(position, position + length)
        host_last[0] = count - 1
        if profile == PREFILL:
            self._shape(context, length)
        for name, array in (
            ("inputs_embeds", host_embeds[:length]),
            ("positions", host_positions[:length]),
            ("last", host_last),
        ):
            self._stream.upload(self._device[name], array)
        if profile == DECODE:
            self._step(context)
        else:
            self._engine.run(context, self._stream)
        if not self._in_place:
            self._store_new_rows(position, length)
        self._stream.download(self._logits.array, self._device["logits"])
        self._stream.synchronize()
        return self._logits.array.copy()

    def close(self) -> None:
        """Free the engine, its contexts and all buffers."""
        if self._cuda_graph is not None:
            self._stream.destroy(self._cuda_graph)
            self._cuda_graph = None
        self._contexts.clear()
        self._engine.close()
        for buffer in (*self._device.values(), self._cache):
            buffer.close()
        for pinned in (*self._host, self._logits):
            pinned.close()

    def _bound_context(self, profile: int) -> Any:
        """Return a context with all buffers bound; the decoding one never changes its shapes."""
        context = self._engine.context(profile, self._stream, captured=profile == DECODE)
        self._engine.bind(context, {name: b.address for name, b in self._device.items()})
        for layer in range(self._layers):
            for offset, kind in enumerate(("key", "value")):
                address = self._cache.address + (2 * layer + offset) * self._stride
                self._engine.bind(context, {f"past_{kind}_{layer}": address})
                if self._in_place:
                    self._engine.bind(context, {f"present_{kind}_{layer}": address})
        cache = (1, self._kv_heads, self._max_seq_len, self._head_dim)
        names = [f"past_{kind}_{n}" for n in range(self._layers) for kind in ("key", "value")]
        self._engine.shape(context, {name: cache for name in names})
        self._shape(context, 1)
        return context

    def _padded_length(self, count: int, position: int) -> int:
        """Return the length that a chunk is padded to; the cache must have room for it."""
        if count == 1 or not self._engine.compiles_for_each_shape:
            return count
        room = min(self.chunk, self._max_seq_len - position)
        lengths = (*PADDED_LENGTHS, self.chunk)
        return min((n for n in lengths if count <= n <= room), default=count)

    def _shape(self, context: Any, count: int) -> None:
        shapes = {"inputs_embeds": (1, count, self._hidden), "positions": (1, count), "last": (1,)}
        self._engine.shape(context, shapes)

    def _step(self, context: Any) -> None:
        """Decode one token, as a CUDA graph unless TensorRT captures graphs itself."""
        if self._cuda_graph is not None:
            self._stream.launch(self._cuda_graph)
            return
        own_graphs = self._capturable and not self._engine.captures_cuda_graphs
        if own_graphs and self._decoded >= RUNS_BEFORE_CAPTURE:
            self._capture(context)
        self._decoded += 1
        if self._cuda_graph is not None:
            self._stream.launch(self._cuda_graph)
        else:
            self._engine.run(context, self._stream)

    def _capture(self, context: Any) -> None:
        """Record a step as a CUDA graph; there are engines that can't be, which run without."""
        capturing = False
        try:
            self._stream.begin_capture()
            capturing = True
            self._engine.run(context, self._stream)
            capturing = False
            self._cuda_graph = self._stream.end_capture()
        except VilaDeployError:
            self._capturable = False
            if capturing:
                self._stream.abandon_capture()

    def _new_bytes(self, count: int) -> int:
        return self._kv_heads * count * self._head_dim * HALF_BYTES

    def _store_new_rows(self, position: int, count: int) -> None:
        """Copy the rows that the engine returned to their positions in the cache."""
        row, width = self._head_dim * HALF_BYTES, self._new_bytes(count)
        pitch, blocks, rows = self._max_seq_len * row, 2 * self._layers, self._kv_heads
        if self._stride == rows * pitch:
            # All layers are contiguous: one copy is enough.
            blocks, rows = 1, blocks * rows
        for index in range(blocks):
            self._stream.copy_rows(
                self._cache.address + index * self._stride + position * row,
                pitch,
                self._device[NEW_CACHE].address + index * width,
                count * row,
                rows,
            )
