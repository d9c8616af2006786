"""Runs an engine on the CPU; numpy only, everything bound once so that a step copies nothing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from vila_deploy.backends.onnxruntime import files
from vila_deploy.engine.manifest import Manifest
from vila_deploy.formats.module_dtypes import FP16
from vila_deploy.processing.s2 import merge_s2_blocks, s2_features
from vila_deploy.utils.arrays import Floats
from vila_deploy.utils.errors import VilaDeployError

# Tokens that go through the LLM at a time: enough to keep the cores busy, little scratch memory.
PREFILL_TOKENS = 256
ERRORS_ONLY = 3
# Below this many bytes of weights a step, threads wait for each other longer than they work.
ONE_THREAD_BYTES = 16 << 20


class OnnxRuntimeSession:
    """Implements `vila_deploy.engine.session.SequenceSession`.

    `cache` holds key and value of each layer in turn, [1, kv_heads, max_seq_len, head_dim].
    """

    def __init__(self, folder: Path, manifest: Manifest):
        model, limits = manifest.model, manifest.limits
        self.position, self.max_seq_len = 0, limits.max_seq_len
        self._table = np.load(folder / files.EMBEDDING, mmap_mode="r")
        small = manifest.weight_bytes_per_token < ONE_THREAD_BYTES
        threads = 1 if small else threads_to_use()
        self._tiling = model.tiling
        self._vision = _load(folder / files.VISION / files.GRAPH, threads, repack=True)
        if self._tiling.uses_s2:
            projector = folder / files.VISION / files.PROJECTOR_GRAPH
            self._projector = _load(projector, threads, repack=True)
        llm = folder / files.LLM
        single = not (llm / files.PREFILL_GRAPH).exists()
        # Repacking float32 weights would only slow down decoding; quantized ones need it.
        repack = not single or manifest.module_precision.lm_head != FP16
        decoder = _load(llm / files.GRAPH, threads, repack=repack)
        cache_shape = (1, model.num_kv_heads, limits.max_seq_len, model.head_dim)
        # Zeros are pages that the system makes real when they are first written.
        self.cache = [np.zeros(cache_shape, np.float32) for _ in range(2 * model.num_layers)]
        self._logits = np.empty((1, model.vocab_size), np.float32)
        self._embed = np.empty((1, 1, model.hidden_size), np.float32)
        self._decoder = _Bound(decoder, self.cache, self._logits)
        self._decoder.bind_embeds(self._embed)
        if single:
            self._prefill = _Bound(decoder, self.cache, self._logits)
        else:
            filler = _load(llm / files.PREFILL_GRAPH, threads, repack=True)
            self._prefill = _Bound(filler, self.cache, None)
        self._single = single

    def encode_images(self, pixels: Floats, grid: tuple[int, int] | None = None) -> Floats:
        """Tiles [tiles, 3, size, size] → [images, tokens, hidden], one tile at a time."""
        features = _each(self._vision, "pixels", pixels)
        if not self._tiling.uses_s2:
            return features
        blocks = s2_features(features, self._tiling, grid)
        return merge_s2_blocks(_each(self._projector, "features", blocks), self._tiling, grid)

    def embed_tokens(self, tokens: Sequence[int]) -> Floats:
        return self._table[np.asarray(tokens, np.int64)].astype(np.float32)

    def prefill(self, embeds: Floats) -> Floats:
        """Appends [tokens, hidden] to the cache → logits of the last token [vocab]."""
        embeds = np.ascontiguousarray(embeds, np.float32)[None]
        count = embeds.shape[1]
        # The graph for one token is the one that has logits.
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
        """Frees the models and the cache."""
        for name in ("_vision", "_projector", "_decoder", "_prefill", "_table", "cache"):
            self.__dict__.pop(name, None)


class _Bound:
    """A decoder graph with its cache bound: each cache buffer is input and output at once."""

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
        self._kept = [*cache, logits]

    def bind_embeds(self, embeds: NDArray[np.float32]) -> None:
        """The next runs read these [1, tokens, hidden]."""
        self._embeds = np.ascontiguousarray(embeds)
        self._bind("inputs_embeds", self._embeds)

    def run(self, total: int) -> None:
        """One pass; afterwards the cache holds `total` tokens."""
        self._seqlens_k[0], self._total[...] = total - 1, total
        self._session.run_with_iobinding(self._io, self._run_options)

    def _bind(self, name: str, array: NDArray[np.generic], output: bool = False) -> None:
        bind = self._io.bind_output if output else self._io.bind_input
        bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def _each(session: onnxruntime.InferenceSession, name: str, batch: Floats) -> Floats:
    """The graph's only output for each item of a batch; activations of one at a time in memory."""
    (output,) = session.get_outputs()
    outputs = [session.run([output.name], {name: np.ascontiguousarray(x[None])})[0] for x in batch]
    return np.concatenate(outputs)


def _load(path: Path, threads: int, *, repack: bool) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.disable_prepacking", "0" if repack else "1")
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own types derive from Exception only
        first_line = str(error).partition("\n")[0]
        raise VilaDeployError(
            f"onnxruntime {onnxruntime.__version__} can't load it ({first_line})",
            where=path,
            fix="build the engine again with this version",
        ) from error


def threads_to_use() -> int:
    """One a core, or fewer if OMP_NUM_THREADS says so, as in other programs for numbers."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    cores = physical_cores()
    return min(cores, int(asked)) if asked.isdigit() and int(asked) else cores


def physical_cores() -> int:
    """Cores that this process may use, hyper-threads of one core counted once."""
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text() if siblings.exists() else str(cpu))
    return len(cores)
