"""Run an engine on the CPU; numpy only, all buffers bound once so that a step copies nothing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from vila_deploy.backends.onnxruntime import files
from vila_deploy.backends.onnxruntime.inference import NO_PREPACKING, load_graph, run_each
from vila_deploy.backends.onnxruntime.memory import PREFILL_TOKENS
from vila_deploy.engine.manifest import Manifest
from vila_deploy.formats.module_dtypes import FP16
from vila_deploy.processing.s2 import merge_s2_blocks, s2_features
from vila_deploy.utils.arrays import Floats

# With fewer bytes of weights a step, threads wait for each other longer than they compute.
ONE_THREAD_BYTES = 16 << 20


class OnnxRuntimeSession:
    """Run an engine folder; implements `vila_deploy.engine.session.SequenceSession`.

    `cache` holds key and value of each layer in turn, [1, kv_heads, max_seq_len, head_dim].
    """

    def __init__(self, folder: Path, manifest: Manifest):
        model, limits = manifest.model, manifest.limits
        self.position, self.max_seq_len = 0, limits.max_seq_len
        self._table = np.load(folder / files.EMBEDDING, mmap_mode="r")
        small = manifest.weight_bytes_per_token < ONE_THREAD_BYTES
        threads = 1 if small else threads_to_use()
        self._tiling = model.tiling
        self._vision = load_graph(folder / files.VISION / files.GRAPH, threads=threads)
        if self._tiling.uses_s2:
            projector = folder / files.VISION / files.PROJECTOR_GRAPH
            self._projector = load_graph(projector, threads=threads)
        llm = folder / files.LLM
        single = not (llm / files.PREFILL_GRAPH).exists()
        # Repacking float32 weights would only slow down decoding; quantized ones need it.
        repack = {manifest.precision, manifest.module_precision.lm_head} != {FP16}
        options = {} if repack else NO_PREPACKING
        decoder = load_graph(llm / files.GRAPH, threads=threads, options=options)
        cache_shape = (1, model.num_kv_heads, limits.max_seq_len, model.head_dim)
        # The system allocates these pages when they are first written.
        self.cache = [np.zeros(cache_shape, np.float32) for _ in range(2 * model.num_layers)]
        self._logits = np.empty((1, model.vocab_size), np.float32)
        self._embed = np.empty((1, 1, model.hidden_size), np.float32)
        self._decoder = _Bound(decoder, self.cache, self._logits)
        self._decoder.bind_embeds(self._embed)
        if single:
            self._prefill = _Bound(decoder, self.cache, self._logits)
        else:
            prefill = load_graph(llm / files.PREFILL_GRAPH, threads=threads)
            self._prefill = _Bound(prefill, self.cache, None)
        self._single = single

    def encode_images(self, pixels: Floats, grid: tuple[int, int] | None = None) -> Floats:
        """Return features [images, tokens, hidden] of tiles [tiles, 3, size, size], one by one."""
        features = run_each(self._vision, pixels)
        if not self._tiling.uses_s2:
            return features
        blocks = s2_features(features, self._tiling, grid)
        return merge_s2_blocks(run_each(self._projector, blocks), self._tiling, grid)

    def embed_tokens(self, tokens: Sequence[int]) -> Floats:
        return self._table[np.asarray(tokens, np.int64)].astype(np.float32)

    def prefill(self, embeds: Floats) -> Floats:
        """Append [tokens, hidden] to the cache; return logits of the last token [vocab]."""
        embeds = np.ascontiguousarray(embeds, np.float32)[None]
        count = embeds.shape[1]
        # Where there are two graphs, only the one for a single token returns logits.
        many = count if self._single else count - 1
        for start in range(0, many, PREFILL_TOKENS):
            chunk = embeds[:, start : min(start + PREFILL_TOKENS, many)]
            self._prefill.bind_embeds(chunk)
            self._run(self._prefill, chunk.shape[1])
        if not self._single:
            self._embed[:] = embeds[:, -1:]
            self._run(self._decoder, 1)
        return self._logits[0].copy()

    def decode(self, token: int) -> Floats:
        self._embed[0, 0] = self._table[token]
        self._run(self._decoder, 1)
        return self._logits[0].copy()

    def _run(self, bound: _Bound, tokens: int) -> None:
        bound.run(self.position + tokens)
        self.position += tokens

    def truncate(self, tokens: int) -> None:
        self.position = tokens

    def close(self) -> None:
        """Free the models and the cache."""
        for name in ("_vision", "_projector", "_decoder", "_prefill", "_table", "cache"):
            self.__dict__.pop(name, None)


class _Bound:
    """A decoder graph with its cache bound: each cache buffer is both input and output."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        cache: Sequence[NDArray[np.float32]],
        logits: NDArray[np.float32] | None,
    ):
        self._session, self._io = session, session.io_binding()
        self._run_options = onnxruntime.RunOptions()
        self._seqlens_k = np.zeros(1, np.int32)
        self._total = np.zeros((), np.int32)
        self._bind("seqlens_k", self._seqlens_k)
        self._bind("total_sequence_length", self._total)
        if logits is not None:
            self._bind("logits", logits, output=True)
        names = [f"{kind}_{layer}" for layer in range(len(cache) // 2) for kind in ("key", "value")]
        for name, buffer in zip(names, cache, strict=True):
            self._bind(f"past_{name}", buffer)
            self._bind(f"present_{name}", buffer, output=True)
        # onnxruntime keeps bare addresses: these arrays must live as long as the binding.
        self._bound_arrays = [*cache, logits]

    def bind_embeds(self, embeds: NDArray[np.float32]) -> None:
        """Bind the input [1, tokens, hidden] of the next runs."""
        self._embeds = np.ascontiguousarray(embeds)
        self._bind("inputs_embeds", self._embeds)

    def run(self, total: int) -> None:
        """Run one pass; afterwards the cache holds `total` tokens."""
        self._seqlens_k[0], self._total[...] = total - 1, total
        self._session.run_with_iobinding(self._io, self._run_options)

    def _bind(self, name: str, array: NDArray[np.generic], output: bool = False) -> None:
        bind = self._io.bind_output if output else self._io.bind_input
        bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def threads_to_use() -> int:
    """Return one thread a core, or OMP_NUM_THREADS if that is fewer, as numeric libraries do."""
    limit = os.environ.get("OMP_NUM_THREADS", "")
    cores = physical_cores()
    return min(cores, int(limit)) if limit.isdigit() and int(limit) else cores


def physical_cores() -> int:
    """Return how many cores this process may use, hyper-threads of a core counted once."""
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text() if siblings.exists() else str(cpu))
    return len(cores)
